"""Training records from files, Hugging Face datasets and memory."""

import os
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import check_file, has_lone_surrogate
from llm2vec_gen_jax.common.hub import DEFAULT_HUB, HubOptions, load_dataset
from llm2vec_gen_jax.data import tables

Source = str | os.PathLike[str] | Iterable[Mapping[str, Any]]


def read_records(
    source: Source,
    columns: Sequence[str],
    split: str = "train",
    limit: int | None = None,
    name: str = "records",
    remedy: str = "",
    hub: HubOptions = DEFAULT_HUB,
) -> list[dict[str, Any]]:
    """Returns the string `columns`, and `id` if present, of the rows of a source.

    source: a file (`tables.chunks`), a Hugging Face dataset id, or dicts in memory, such as a datasets.Dataset. The
    lines of a .txt file are a single column; blank lines are skipped. name: of dicts in memory, for errors. remedy:
    the fix for a missing column. hub: of a dataset id. Raises InputError naming file, line and column for a missing
    column, a value that is not a string, or no rows.
    """
    needed = dict.fromkeys(columns, remedy and f". {remedy}")
    records: list[dict[str, Any]] = []
    for where, row in _rows(source, needed, split, name, hub):
        if limit is not None and len(records) == limit:
            break
        if not isinstance(row.get("id", 0), (str, int)):
            raise InputError(f"{where}: 'id' must be a string or an integer, found {row['id']!r}")
        for column in columns:
            if not isinstance(row[column], str):
                raise InputError(f"{where}: {column!r} must be a string, found {type(row[column]).__name__}")
        record = {column: row[column] for column in ("id", *columns) if column in row}
        for column, value in record.items():
            if isinstance(value, str) and has_lone_surrogate(value):
                raise InputError(f"{where}: {column!r} has an unpaired surrogate (not valid Unicode)")
        records.append(record)
    if not records:
        raise InputError(f"{source if isinstance(source, str | os.PathLike) else name}: no rows")
    return records


def _rows(source, needed, split, name, hub) -> Iterator[tables.Row]:
    if not isinstance(source, str | os.PathLike):
        yield from _rows_in_memory(source, needed, name)
        return
    path = pathlib.Path(source).expanduser()
    if path.exists():
        if path.is_dir() and not (path / "state.json").exists():
            check_file(path)  # a folder that is not a saved dataset
        is_text = tables.format_of(path) == ".txt"
        for _, read in tables.chunks(path, needed, ["id"]):
            yield from (pair for pair in read() if not is_text or next(iter(pair[1].values())).strip())
        return
    if path.name.endswith((*tables.SUFFIXES, ".gz", ".json")):
        raise InputError(f"{source}: no such file")
    for number, row in enumerate(load_dataset(str(source), split, hub)):
        where = f"{source}, row {number}"
        tables.require_columns(where, row, needed)
        yield where, row


def _rows_in_memory(source, needed, name):
    if not isinstance(source, Iterable):
        raise InputError(f"{name}: expected a path or a list of dicts, found {type(source).__name__}")
    for number, row in enumerate(source):
        where = f"{name}, row {number}"
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: expected a dict, found {type(row).__name__}")
        tables.require_columns(where, row, needed)
        yield where, row
