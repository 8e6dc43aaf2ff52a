"""Turns unlabeled texts into training records with instructions.

python -m launch.instruct [CONFIG] [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import InstructConfig


def main(config: InstructConfig) -> None:
    from llm2vec_gen_jax.experiments.splits import evaluation_texts
    from llm2vec_gen_jax.inference.instruct import instruct

    print(f"written: {instruct(config, evaluation_texts(config.exclude) if config.exclude else ())}")


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(InstructConfig, main)
