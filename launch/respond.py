"""The LLM responds to queries.

python -m launch.respond [CONFIG] [key=value ...]
"""

from launch import start
from llm2vec_gen_jax.config import RespondConfig


def main(config):
    from llm2vec_gen_jax.respond import respond

    print(f"written: {respond(config)}")


if __name__ == "__main__":
    start.run(RespondConfig, main)
