"""Prints the list of commands, as `llm2vec-gen` does."""

from llm2vec_gen_jax.commands.__main__ import main

if __name__ == "__main__":
    main()
