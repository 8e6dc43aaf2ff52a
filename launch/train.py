"""`python -m launch.train`, in a checkout: llm2vec_gen_jax/commands/train.py."""

from llm2vec_gen_jax.commands.train import run

if __name__ == "__main__":
    run()
