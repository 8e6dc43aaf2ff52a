"""Rows of text, JSONL, CSV, Parquet and Arrow files, and of saved datasets."""

import csv
import functools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from llm2vec_gen_jax.common.errors import InputError, first_line, nearest
from llm2vec_gen_jax.common.jsonl import lines_of, parse_object, read_lines

SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet", ".arrow")
LINE_FORMATS = (".txt", ".jsonl", ".csv")
_CHUNK_ROWS = 1024  # rows of a table in memory
_MAX_ROWS = 2**34  # the count in a damaged file can be 2**62
_LONGEST_FIELD = 1 << 26  # characters of a CSV field; Python's default is 2**17

Row = tuple[str, dict[str, Any]]  # (place, for errors; row)
Chunk = tuple[int, Callable[[], Iterable[Row]]]  # (number of rows, function that reads them)


def format_of(path: str | os.PathLike[str]) -> str:
    """Returns a file's format: its suffix without .gz. A folder is .arrow, an unknown suffix .jsonl."""
    path = pathlib.Path(path)
    if path.is_dir():
        return ".arrow"
    suffix = pathlib.Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    return suffix if suffix in SUFFIXES else ".jsonl"


def chunks(path: pathlib.Path, columns: Mapping[str, str], optional: Iterable[str] = ()) -> Iterator[Chunk]:
    """Yields the rows of a file or a saved dataset in chunks, which are parsed only when they are read.

    columns: {name of a column that is needed: end of the error if it is missing}; the first is that of a .txt file.
    optional: columns that are read if present. Places count lines from 1, and rows of tables from 0.
    Raises InputError naming the file, the line, and a missing column with those that exist.
    """
    kind = format_of(path)
    if kind in LINE_FORMATS:
        yield from _line_chunks(path, kind, columns, read_lines(path, keep_ends=kind == ".csv"))
    else:
        yield from _table_chunks(path, kind, columns, optional)


def stream_chunks(file: Any, name: object, kind: str, columns: Mapping[str, str]) -> Iterator[Chunk]:
    """`chunks` of a binary file object. kind: one of LINE_FORMATS. name: for errors."""
    return _line_chunks(name, kind, columns, lines_of(file, name, keep_ends=kind == ".csv"))


def require_columns(place: object, names: Iterable[str], columns: Mapping[str, str]) -> None:
    """Raises InputError for the first of `columns` that is not in `names`. See `chunks`."""
    names = list(names)
    for column, remedy in columns.items():
        if column not in names:
            hint = nearest(column, names)
            listed = f" (columns: {', '.join(names)})" if hint.startswith(", did") else ""
            raise InputError(f"{place}: no column {column!r}{hint}{listed}{remedy}")


def _line_chunks(name, kind, columns, lines):
    if kind == ".csv":
        yield from _csv_chunks(lines, name, columns)
        return
    if kind == ".txt" and len(columns) != 1:
        raise InputError(f"{name}: plain text has no column {list(columns)[1]!r}. Use JSONL, CSV or Parquet")
    for number, line in lines:
        place = f"{name}, line {number}"
        if kind == ".txt":
            yield 1, functools.partial(_one_row, place, columns, [line])
        elif line.strip():
            yield 1, functools.partial(_json_row, place, columns, line)


def _one_row(place, names, values):
    return [(place, dict(zip(names, values)))]


def _json_row(place, columns, line):
    row = parse_object(line, place)
    require_columns(place, row, columns)
    return [(place, row)]


def _csv_chunks(lines, name, columns):
    csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))
    header = None
    for place, fields in _csv_rows(lines, name):
        if header is None:
            header = fields
            _check_header(name, header, columns)
        elif fields:  # not a blank line
            if len(fields) != len(header):
                raise InputError(f"{place}: {len(fields)} fields, the header has {len(header)}")
            yield 1, functools.partial(_one_row, place, header, fields)


def _csv_rows(lines, name):
    reader = csv.reader((line for _, line in lines), strict=True)
    while True:
        place = f"{name}, line {reader.line_num + 1}"
        try:
            yield place, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise InputError(f"{place}: not valid CSV ({error})") from None


def _check_header(name, names, columns):
    require_columns(name, names, columns)
    if duplicates := [column for column in columns if list(names).count(column) > 1]:
        raise InputError(f"{name}: two columns are called {duplicates[0]!r}. Rename one")


def _table_chunks(path, kind, columns, optional):
    def guarded(read):
        try:
            return read()
        except ImportError:
            raise
        except Exception as error:  # damaged files raise nearly any exception in pyarrow and datasets
            raise InputError(f"{path}: damaged or not readable ({first_line(error)})") from None

    names, tables = guarded(lambda: _open_parquet(path) if kind == ".parquet" else _open_arrow(path))
    _check_header(path, names, columns)
    optional = [column for column in optional if column not in columns and list(names).count(column) == 1]
    start = 0
    for length, table in tables([*columns, *optional]):
        yield length, functools.partial(_table_rows, path, start, table, guarded)
        start += length


def _table_rows(path, start, table, guarded):
    rows = guarded(lambda: _rows(table()))
    return ((f"{path}, row {number}", row) for number, row in enumerate(rows, start))


def _rows(table):
    """Returns the rows of an Arrow table as dicts. Validates it first, because a wrong offset would crash."""
    table.validate(full=True)
    return table.to_pylist()


def _check_rows(counts):
    if min(counts, default=0) < 0 or sum(counts) > _MAX_ROWS:
        raise ValueError(f"invalid number of rows, {sum(counts)}")


def _open_parquet(path):
    """Returns (column names, chunks): chunks(columns) yields (number of rows, function that returns an Arrow table)."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    _check_rows(groups)

    def chunks(columns):
        for group, rows in enumerate(groups):
            # A row group may be large: it is read in chunks, and only if one of them is used.
            batches = None

            def chunk(index, group=group):
                nonlocal batches
                if batches is None:
                    batches = enumerate(file.iter_batches(_CHUNK_ROWS, [group], columns))
                return next(batch for number, batch in batches if number == index)

            for start in range(0, rows, _CHUNK_ROWS):
                yield min(_CHUNK_ROWS, rows - start), lambda start=start: chunk(start // _CHUNK_ROWS)

    return file.schema_arrow.names, chunks


def _open_arrow(path):
    """`_open_parquet` for a folder of save_to_disk, or an Arrow file or stream."""
    if path.is_dir():
        import datasets

        dataset = datasets.load_from_disk(str(path)).with_format("arrow")
        names, slice_of = dataset.column_names, lambda start, stop: dataset[start:stop]
    else:
        import pyarrow

        source = pyarrow.memory_map(str(path))
        try:
            table = pyarrow.ipc.open_file(source).read_all()
        except pyarrow.ArrowInvalid:
            source.seek(0)
            table = pyarrow.ipc.open_stream(source).read_all()
        dataset, names, slice_of = table, table.column_names, lambda start, stop: table.slice(start, stop - start)

    _check_rows([len(dataset)])

    def chunks(columns):
        for start in range(0, len(dataset), _CHUNK_ROWS):
            stop = min(start + _CHUNK_ROWS, len(dataset))
            yield stop - start, lambda start=start, stop=stop: slice_of(start, stop).select(columns)

    return names, chunks
