"""The published analysis of decoded text: a sample of a dataset, and what the LLM reads out of each embedding."""

import csv
import io
import pathlib

import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import atomic_path, require_new
from llm2vec_gen_jax.common.jsonl import write_jsonl

_COLUMNS = ("input_text", "output_text")


def check_output(path):
    """Raises InputError where a table cannot be written to `path`."""
    require_new(path, "output")
    if pathlib.Path(path).suffix not in (".csv", ".jsonl"):
        raise InputError(f"output={path}: must end in .csv or .jsonl")


def sample(texts, limit, seed):
    """Returns at most `limit` of the texts, drawn as `Dataset.shuffle(seed)` of datasets and its first rows are."""
    if limit is None:
        return texts
    return [texts[row] for row in np.random.default_rng(seed).permutation(len(texts))[:limit]]


def generations(embedder, texts, max_new_tokens, batch_size=16, max_length=None, show_progress_bar=False):
    """Returns [{"input_text", "output_text"}]: what `embedder`, an LLM2VecGen, decodes greedily from each text."""
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    _, soft_prompts = embedder.encode(texts, max_length=max_length, return_soft_prompts=True, **options)
    decoded = embedder.decode(soft_prompts, max_new_tokens, **options)
    return [dict(zip(_COLUMNS, pair)) for pair in zip(texts, decoded)]


def write_table(path, rows):
    """Writes rows of `generations` as .csv (RFC 4180) or .jsonl, complete or not at all."""
    if pathlib.Path(path).suffix == ".jsonl":
        return write_jsonl(path, rows)
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, _COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_path(path) as temporary:  # as bytes: the line ends inside a text stay what they are
        temporary.write_bytes(table.getvalue().encode())
