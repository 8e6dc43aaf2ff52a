"""Runs llm2vec_gen_jax.commands.convert."""

from llm2vec_gen_jax.commands.convert import run

if __name__ == "__main__":
    run()
