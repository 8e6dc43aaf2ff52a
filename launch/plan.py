"""`python -m launch.plan`, in a checkout: llm2vec_gen_jax/commands/plan.py."""

from llm2vec_gen_jax.commands.plan import run

if __name__ == "__main__":
    run()
