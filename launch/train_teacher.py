"""Runs llm2vec_gen_jax.commands.train_teacher."""

from llm2vec_gen_jax.commands.train_teacher import run

if __name__ == "__main__":
    run()
