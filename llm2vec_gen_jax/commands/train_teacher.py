"""Trains an unsupervised teacher for a backbone: MNTP, then SimCSE.

python -m launch.train_teacher [CONFIG] [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import TeacherTrainConfig


def main(config: TeacherTrainConfig) -> None:
    from llm2vec_gen_jax.training.train_teacher import train_teacher

    adapters = ",".join(map(str, train_teacher(config)))
    print(f"adapters, in merging order; use them with: teacher.adapters={adapters}")


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(TeacherTrainConfig, main)
