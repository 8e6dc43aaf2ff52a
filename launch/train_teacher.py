"""`python -m launch.train_teacher`, in a checkout: llm2vec_gen_jax/commands/train_teacher.py."""

from llm2vec_gen_jax.commands.train_teacher import run

if __name__ == "__main__":
    run()
