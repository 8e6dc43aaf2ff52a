"""Runs llm2vec_gen_jax.commands.synthesize."""

from llm2vec_gen_jax.commands.synthesize import run

if __name__ == "__main__":
    run()
