"""The whole recipe, small, on the default backbone.

python -m launch.quickstart [key=value ...]
"""

from launch import start
from llm2vec_gen_jax.config import QuickstartConfig


def main(config):
    from llm2vec_gen_jax.quickstart import quickstart

    quickstart(config)


if __name__ == "__main__":
    start.run(QuickstartConfig, main)
