"""Computes teacher targets and trains a model.

python -m launch.train [CONFIG] [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import TrainConfig


def main(config: TrainConfig) -> None:
    from llm2vec_gen_jax.training.train import train

    print(f"model: {train(config)}")


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(TrainConfig, main)
