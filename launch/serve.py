"""OpenAI's /v1/embeddings over HTTP, and /v1/decode.

python -m launch.serve MODEL [key=value ...]
"""

from launch import start
from llm2vec_gen_jax.config import ServeConfig
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.files import install_command


def main(path, config):
    try:
        from llm2vec_gen_jax.serve import serve
    except ModuleNotFoundError as error:
        raise InputError(f"the server needs more ({error}): {install_command('serve')}") from None
    serve(path, config)


if __name__ == "__main__":
    start.run(ServeConfig, main, "MODEL")
