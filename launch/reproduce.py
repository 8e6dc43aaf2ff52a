"""`python -m launch.reproduce`, in a checkout: llm2vec_gen_jax/commands/reproduce.py."""

from llm2vec_gen_jax.commands.reproduce import run

if __name__ == "__main__":
    run()
