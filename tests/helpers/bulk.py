"""Settings, inputs and outputs for the tests of the encode command."""

import pathlib

from llm2vec_gen_jax import config
from tests.conftest import write_jsonl
from tests.helpers.embedders import TEXTS


def settings(tmp_path, output="out", **changes):
    """Returns an EncodeConfig that writes tmp_path/output with eight texts per shard."""
    defaults = {"input": str(tmp_path / "texts.jsonl"), "shard_size": 8, "batch_size": 4}
    return config.EncodeConfig(output=str(tmp_path / output), **defaults | changes)


def write_texts(tmp_path, texts=TEXTS):
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": text, "id": f"n{n}"} for n, text in enumerate(texts)])


def bytes_of(path):
    return {file.name: file.read_bytes() for file in pathlib.Path(path).iterdir()}
