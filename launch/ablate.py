"""Runs llm2vec_gen_jax.commands.ablate."""

from llm2vec_gen_jax.commands.ablate import run

if __name__ == "__main__":
    run()
