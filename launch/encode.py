"""Runs llm2vec_gen_jax.commands.encode."""

from llm2vec_gen_jax.commands.encode import run

if __name__ == "__main__":
    run()
