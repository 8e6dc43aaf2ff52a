"""Runs the complete study: training, baselines, ablations, tables and plots.

python -m launch.reproduce [CONFIG] tasks=DIR [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import ReproduceConfig


def main(config: ReproduceConfig) -> None:
    from llm2vec_gen_jax.experiments.reproduce import reproduce

    print(f"written: {reproduce(config)}")


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(ReproduceConfig, main)
