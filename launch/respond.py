"""Runs llm2vec_gen_jax.commands.respond."""

from llm2vec_gen_jax.commands.respond import run

if __name__ == "__main__":
    run()
