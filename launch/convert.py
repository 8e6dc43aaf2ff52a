"""`python -m launch.convert`, in a checkout: llm2vec_gen_jax/commands/convert.py."""

from llm2vec_gen_jax.commands.convert import run

if __name__ == "__main__":
    run()
