"""Training records from JSONL files and Hugging Face datasets."""

import os
import pathlib
from collections.abc import Sequence
from typing import Any

from llm2vec_gen_jax.common.errors import InputError, first_line, nearest
from llm2vec_gen_jax.common.files import has_lone_surrogate
from llm2vec_gen_jax.common.jsonl import read_jsonl


def read_records(
    source: str | os.PathLike[str], columns: Sequence[str], split: str = "train", limit: int | None = None
) -> list[dict[str, Any]]:
    """Reads the string `columns`, and `id` if present, of a JSONL[.gz] file or a Hugging Face dataset.

    Raises InputError naming file, line and column for a missing column, a value that is not a string, or no rows.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists() and path.suffix in (".jsonl", ".gz", ".json"):
        raise InputError(f"{source}: no such file")
    if path.exists():
        rows = ((f"{source}, line {number}", row) for number, row in read_jsonl(path))
    else:
        rows = ((f"{source}, row {number}", row) for number, row in enumerate(_hub_dataset(source, split)))
    records: list[dict[str, Any]] = []
    for where, row in rows:
        if limit is not None and len(records) == limit:
            break
        if not isinstance(row.get("id", 0), (str, int)):
            raise InputError(f"{where}: 'id' must be a string or an integer, found {row['id']!r}")
        for column in columns:
            if column not in row:
                raise InputError(f"{where}: no column {column!r}{nearest(column, row)}")
            if not isinstance(row[column], str):
                raise InputError(f"{where}: {column!r} must be a string, found {type(row[column]).__name__}")
        record = {key: row[key] for key in ("id", *columns) if key in row}
        for key, value in record.items():
            if isinstance(value, str) and has_lone_surrogate(value):
                raise InputError(f"{where}: {key!r} has an unpaired surrogate (not valid Unicode)")
        records.append(record)
    if not records:
        raise InputError(f"{source}: no rows")
    return records


def _hub_dataset(source, split):
    import datasets

    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # datasets raises many types for a dataset that cannot be loaded
        raise InputError(
            f"{source}: neither a file nor a Hugging Face dataset with the split {split!r} ({first_line(error)})"
        ) from None
