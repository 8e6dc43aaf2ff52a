"""The whole study: trainings, baselines, ablations, tables and plots.

python -m launch.reproduce [CONFIG] tasks=DIR [key=value ...]
"""

from launch import start
from llm2vec_gen_jax.config import ReproduceConfig


def main(config):
    from llm2vec_gen_jax.study.stages import reproduce

    print(f"written: {reproduce(config)}")


if __name__ == "__main__":
    start.run(ReproduceConfig, main)
