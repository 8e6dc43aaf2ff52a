"""Scores of a model or a baseline on task folders, MTEB and BRIGHT.

python -m launch.evaluate MODEL tasks=DIR output=OUT [key=value ...]
"""

from launch import start
from llm2vec_gen_jax.config import EvaluateConfig


def main(path, config):
    from llm2vec_gen_jax.evaluate import evaluate

    results = evaluate(path, config)
    print(f"written: {config.output}/results.json ({len(results)} tasks)")


if __name__ == "__main__":
    start.run(EvaluateConfig, main, "MODEL")
