"""`python -m launch.evaluate`, in a checkout: llm2vec_gen_jax/commands/evaluate.py."""

from llm2vec_gen_jax.commands.evaluate import run

if __name__ == "__main__":
    run()
