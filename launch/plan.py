"""Runs llm2vec_gen_jax.commands.plan."""

from llm2vec_gen_jax.commands.plan import run

if __name__ == "__main__":
    run()
