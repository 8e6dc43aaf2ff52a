"""`python -m launch.synthesize`, in a checkout: llm2vec_gen_jax/commands/synthesize.py."""

from llm2vec_gen_jax.commands.synthesize import run

if __name__ == "__main__":
    run()
