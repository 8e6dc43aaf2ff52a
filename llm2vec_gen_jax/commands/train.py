"""Teacher targets, training, and a model directory.

python -m launch.train [CONFIG] [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import TrainConfig


def main(config):
    from llm2vec_gen_jax.training.train import train

    print(f"model: {train(config)}")


def run():
    """Runs the command with the words of sys.argv."""
    cli.run(TrainConfig, main)
