"""Trains one run for each config, and prints one table of them.

python -m launch.ablate CONFIG... [key=value ...]
"""

from launch import start
from llm2vec_gen_jax.config import AblateConfig


def main(files, configs):
    from llm2vec_gen_jax.ablate import ablate

    print(ablate(files, configs))


if __name__ == "__main__":
    start.run(AblateConfig, main, "CONFIG...")
