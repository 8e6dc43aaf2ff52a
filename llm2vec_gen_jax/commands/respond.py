"""Generates responses to queries.

python -m launch.respond [CONFIG] [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import RespondConfig


def main(config: RespondConfig) -> None:
    from llm2vec_gen_jax.inference.respond import respond

    print(f"written: {respond(config)}")


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(RespondConfig, main)
