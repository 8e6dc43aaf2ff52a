"""Runs llm2vec_gen_jax.commands.instruct."""

from llm2vec_gen_jax.commands.instruct import run

if __name__ == "__main__":
    run()
