"""`python -m launch.respond`, in a checkout: llm2vec_gen_jax/commands/respond.py."""

from llm2vec_gen_jax.commands.respond import run

if __name__ == "__main__":
    run()
