"""`python -m launch.ablate`, in a checkout: llm2vec_gen_jax/commands/ablate.py."""

from llm2vec_gen_jax.commands.ablate import run

if __name__ == "__main__":
    run()
