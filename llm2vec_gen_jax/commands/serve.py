"""Serves embeddings over HTTP with the APIs of OpenAI and text-embeddings-inference, and decodes them.

python -m launch.serve MODEL [key=value ...]
"""

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import install_command
from llm2vec_gen_jax.config import ServeConfig


def main(path: str, config: ServeConfig) -> None:
    try:
        from llm2vec_gen_jax.serving.server import serve
    except ModuleNotFoundError as error:
        raise InputError(f"the server needs additional packages ({error}): {install_command('serve')}") from None
    serve(path, config)


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    cli.run(ServeConfig, main, "MODEL")
