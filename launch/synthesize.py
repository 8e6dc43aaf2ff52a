"""The LLM writes queries itself.

python -m launch.synthesize [CONFIG] [key=value ...]
"""

from launch import start
from llm2vec_gen_jax.config import SynthesizeConfig


def main(config):
    from llm2vec_gen_jax.synthesize import synthesize

    print(f"written: {synthesize(config)}")


if __name__ == "__main__":
    start.run(SynthesizeConfig, main)
