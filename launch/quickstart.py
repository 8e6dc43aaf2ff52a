"""Runs llm2vec_gen_jax.commands.quickstart."""

from llm2vec_gen_jax.commands.quickstart import run

if __name__ == "__main__":
    run()
