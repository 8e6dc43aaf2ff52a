"""Published analysis of decoded text: a sample of a dataset, and the text decoded from each embedding."""

import csv
import io
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import atomic_path, require_new
from llm2vec_gen_jax.common.jsonl import write_jsonl

_COLUMNS = ("input_text", "output_text")


def check_output(path: str | os.PathLike[str]) -> None:
    """Raises InputError if a table cannot be written to `path`."""
    require_new(path, "output")
    if pathlib.Path(path).suffix not in (".csv", ".jsonl"):
        raise InputError(f"output={path}: must end in .csv or .jsonl")


def sample(texts: list[str], limit: int | None, seed: int) -> list[str]:
    """Returns at most `limit` texts: the first rows of `datasets.Dataset.shuffle(seed)`."""
    if limit is None:
        return texts
    return [texts[row] for row in np.random.default_rng(seed).permutation(len(texts))[:limit]]


def generations(
    embedder: Any,
    texts: Sequence[str],
    max_new_tokens: int,
    batch_size: int = 16,
    max_length: int | None = None,
    show_progress_bar: bool = False,
) -> list[dict[str, str]]:
    """Returns [{"input_text", "output_text"}]: the greedily decoded text of each embedding. embedder: an LLM2VecGen."""
    options = {"batch_size": batch_size, "show_progress_bar": show_progress_bar}
    _, soft_prompts = embedder.encode(texts, max_length=max_length, return_soft_prompts=True, **options)
    decoded = embedder.decode(soft_prompts, max_new_tokens, **options)
    return [dict(zip(_COLUMNS, pair)) for pair in zip(texts, decoded)]


def write_table(path: str | os.PathLike[str], rows: Iterable[Mapping[str, str]]) -> None:
    """Writes rows of `generations` atomically as .csv (RFC 4180) or .jsonl."""
    if pathlib.Path(path).suffix == ".jsonl":
        write_jsonl(path, rows)
        return
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, _COLUMNS, lineterminator="\r\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_path(path) as temporary:  # as bytes: line ends inside a text stay unchanged
        temporary.write_bytes(table.getvalue().encode())
