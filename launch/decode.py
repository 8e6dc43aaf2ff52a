"""`python -m launch.decode`, in a checkout: llm2vec_gen_jax/commands/decode.py."""

from llm2vec_gen_jax.commands.decode import run

if __name__ == "__main__":
    run()
