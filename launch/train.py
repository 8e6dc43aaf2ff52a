"""Runs llm2vec_gen_jax.commands.train."""

from llm2vec_gen_jax.commands.train import run

if __name__ == "__main__":
    run()
