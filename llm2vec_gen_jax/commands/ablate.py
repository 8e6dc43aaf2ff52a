"""Trains one run per config and prints a table of the results.

python -m launch.ablate CONFIG... [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import AblateConfig


def main(files: list[str], configs: list[AblateConfig]) -> None:
    from llm2vec_gen_jax.experiments.ablate import ablate

    print(ablate(files, configs))


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(AblateConfig, main, "CONFIG...")
