"""Teacher targets, training, and a model directory.

python -m launch.train [CONFIG] [key=value ...]
"""

from launch import start
from llm2vec_gen_jax.config import TrainConfig


def main(config):
    from llm2vec_gen_jax.train import train

    print(f"model: {train(config)}")


if __name__ == "__main__":
    start.run(TrainConfig, main)
