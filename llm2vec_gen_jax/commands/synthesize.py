"""Generates queries with the LLM itself.

python -m launch.synthesize [CONFIG] [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import SynthesizeConfig


def main(config: SynthesizeConfig) -> None:
    from llm2vec_gen_jax.inference.synthesize import synthesize

    print(f"written: {synthesize(config)}")


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(SynthesizeConfig, main)
