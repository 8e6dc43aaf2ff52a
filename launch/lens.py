"""`python -m launch.lens`, in a checkout: llm2vec_gen_jax/commands/lens.py."""

from llm2vec_gen_jax.commands.lens import run

if __name__ == "__main__":
    run()
