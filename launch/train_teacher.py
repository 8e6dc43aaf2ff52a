"""Trains an unsupervised teacher for any backbone: MNTP, then SimCSE.

python -m launch.train_teacher [CONFIG] [key=value ...]
"""

from launch import start
from llm2vec_gen_jax.config import TeacherTrainConfig


def main(config):
    from llm2vec_gen_jax.train_teacher import train_teacher

    adapters = ",".join(map(str, train_teacher(config)))
    print(f"adapters, in merging order; use them with: teacher.adapters={adapters}")


if __name__ == "__main__":
    start.run(TeacherTrainConfig, main)
