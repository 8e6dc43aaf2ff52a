"""Runs the complete recipe at a small scale on the default backbone.

python -m launch.quickstart [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import QuickstartConfig


def main(config: QuickstartConfig) -> None:
    from llm2vec_gen_jax.experiments.quickstart import quickstart

    quickstart(config)


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(QuickstartConfig, main)
