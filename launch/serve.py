"""`python -m launch.serve`, in a checkout: llm2vec_gen_jax/commands/serve.py."""

from llm2vec_gen_jax.commands.serve import run

if __name__ == "__main__":
    run()
