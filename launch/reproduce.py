"""Runs llm2vec_gen_jax.commands.reproduce."""

from llm2vec_gen_jax.commands.reproduce import run

if __name__ == "__main__":
    run()
