"""Runs llm2vec_gen_jax.commands.serve."""

from llm2vec_gen_jax.commands.serve import run

if __name__ == "__main__":
    run()
