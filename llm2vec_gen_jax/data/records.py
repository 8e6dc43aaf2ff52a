"""Training records from JSONL files, Hugging Face datasets and memory."""

import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm2vec_gen_jax.common.errors import InputError, first_line, nearest
from llm2vec_gen_jax.common.files import has_lone_surrogate
from llm2vec_gen_jax.common.jsonl import read_jsonl

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


def read_records(
    source: Source,
    columns: Sequence[str],
    split: str = "train",
    limit: int | None = None,
    key: str = "input",
) -> list[dict[str, Any]]:
    """Returns the string `columns`, and `id` if present, of the rows of a source.

    source: a JSONL[.gz] file, a Hugging Face dataset id, or dicts in memory, such as a datasets.Dataset. key: the
    setting of the source, for errors.
    Raises InputError naming file, line and column for a missing column, a value that is not a string, or no rows.
    """
    name: object = source
    if isinstance(source, str | os.PathLike):
        rows = _read(source, split, key)
    elif isinstance(source, Iterable):
        name, rows = key, ((f"{key}, row {number}", row) for number, row in enumerate(source))
    else:
        raise InputError(f"{key}: expected a path or a list of dicts, found {type(source).__name__}")
    records: list[dict[str, Any]] = []
    for where, row in rows:
        if limit is not None and len(records) == limit:
            break
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected a dict, found {type(row).__name__}")
        if not isinstance(row.get("id", 0), (str, int)):
            raise InputError(f"{where}: 'id' must be a string or an integer, found {row['id']!r}")
        for column in columns:
            if column not in row:
                raise InputError(f"{where}: no column {column!r}{nearest(column, row)}")
            if not isinstance(row[column], str):
                raise InputError(f"{where}: {column!r} must be a string, found {type(row[column]).__name__}")
        record = {column: row[column] for column in ("id", *columns) if column in row}
        for column, value in record.items():
            if isinstance(value, str) and has_lone_surrogate(value):
                raise InputError(f"{where}: {column!r} has an unpaired surrogate (not valid Unicode)")
        records.append(record)
    if not records:
        raise InputError(f"{name}: no rows")
    return records


def _read(source, split, key):
    """Yields (place, row) of a file or a Hugging Face dataset."""
    path = pathlib.Path(source).expanduser()
    if not path.exists() and path.suffix in (".jsonl", ".gz", ".json"):
        raise InputError(f"{key}={source}: no such file")
    if path.exists():
        yield from ((f"{source}, line {number}", row) for number, row in read_jsonl(path))
    else:
        yield from ((f"{source}, row {number}", row) for number, row in enumerate(_hub_dataset(source, split)))


def _hub_dataset(source, split):
    import datasets

    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # datasets raises many types for a dataset that cannot be loaded
        raise InputError(
            f"data {source!r} (split {split!r}): neither a file nor a Hugging Face dataset ({first_line(error)})"
        ) from None
