"""`python -m launch.encode`, in a checkout: llm2vec_gen_jax/commands/encode.py."""

from llm2vec_gen_jax.commands.encode import run

if __name__ == "__main__":
    run()
