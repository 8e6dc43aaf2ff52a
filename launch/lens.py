"""Runs llm2vec_gen_jax.commands.lens."""

from llm2vec_gen_jax.commands.lens import run

if __name__ == "__main__":
    run()
