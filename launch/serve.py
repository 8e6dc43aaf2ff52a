"""python -m launch.serve MODEL [key=value ...]"""

from launch import start
from llm2vec_gen_jax.config import ServeConfig
from llm2vec_gen_jax.errors import InputError


def main(path, config):
    try:
        from llm2vec_gen_jax.serve import serve
    except ModuleNotFoundError as error:
        raise InputError(f"the server needs more ({error}): pip install -r requirements-serve.txt") from None
    serve(path, config)


if __name__ == "__main__":
    start.run(ServeConfig, main, "MODEL")
