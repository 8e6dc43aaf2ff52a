"""Trains one run for each config, and prints one table of them.

python -m launch.ablate CONFIG... [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import AblateConfig


def main(files, configs):
    from llm2vec_gen_jax.experiments.ablate import ablate

    print(ablate(files, configs))


def run():
    """Runs the command with the words of sys.argv."""
    cli.run(AblateConfig, main, "CONFIG...")
