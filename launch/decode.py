"""Runs llm2vec_gen_jax.commands.decode."""

from llm2vec_gen_jax.commands.decode import run

if __name__ == "__main__":
    run()
