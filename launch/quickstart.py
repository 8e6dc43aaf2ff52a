"""`python -m launch.quickstart`, in a checkout: llm2vec_gen_jax/commands/quickstart.py."""

from llm2vec_gen_jax.commands.quickstart import run

if __name__ == "__main__":
    run()
