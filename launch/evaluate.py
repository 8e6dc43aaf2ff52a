"""Runs llm2vec_gen_jax.commands.evaluate."""

from llm2vec_gen_jax.commands.evaluate import run

if __name__ == "__main__":
    run()
