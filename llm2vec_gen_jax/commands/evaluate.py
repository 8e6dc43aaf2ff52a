"""Evaluates a model or a baseline on task folders, MTEB or BRIGHT.

python -m launch.evaluate MODEL tasks=DIR output=OUT [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import EvaluateConfig


def main(path: str, config: EvaluateConfig) -> None:
    from llm2vec_gen_jax.evaluation.evaluate import evaluate

    results = evaluate(path, config)
    print(f"written: {config.output}/results.json ({len(results)} tasks)")


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(EvaluateConfig, main, "MODEL")
