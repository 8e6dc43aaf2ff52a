"""Streams texts from text, JSONL, Parquet and Arrow files, saved datasets and standard input."""

import glob
import hashlib
import io
import os
import pathlib
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llm2vec_gen_jax.common.errors import InputError, first_line, nearest
from llm2vec_gen_jax.common.files import check_file, has_lone_surrogate, read_json, sha256_file, visible
from llm2vec_gen_jax.common.jsonl import lines_of, parse_object, read_lines
from llm2vec_gen_jax.data.records import read_records

_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ".arrow")
_CHUNK_ROWS = 1024  # rows of a table in memory
_MAX_ROWS = 2**34  # the count in a damaged file can be 2**62


def read_texts(path: str | os.PathLike[str], field: str) -> list[str]:
    """Returns all lines of a .txt file, or `field` of all rows of a .jsonl[.gz] file or a Hugging Face dataset."""
    if pathlib.Path(path).suffix != ".txt":
        return [row[field] for row in read_records(path, (field,))]
    texts = [line for _, line in read_lines(path)]
    if not texts:
        raise InputError(f"{path}: no lines")
    return texts


def comparison_key(text: str) -> str:
    """Returns the text in lower case with single spaces: texts with equal keys are duplicates."""
    return " ".join(text.lower().split())


class Row(NamedTuple):
    """A text, its index in the complete input (from 0), and its id."""

    number: int
    id: str | int
    text: str


class Corpus:
    """The texts of an `input=` setting.

    source: files, folders and glob patterns (including `**`), separated by commas; `-` is standard input. A folder is a
    Hugging Face dataset (save_to_disk), or all its files except names with a leading dot. field, id_field: keys of JSON
    objects or columns of tables. stdin: format of `-`, "txt" or "jsonl". check: called repeatedly while no data arrives
    on `-`; it may raise to stop. Files are read in the order of `source`, those of a pattern or folder sorted.
    """

    def __init__(
        self,
        source: str,
        field: str = "text",
        id_field: str | None = None,
        stdin: str = "txt",
        check: Callable[[], None] = lambda: None,
    ) -> None:
        self.source, self.field, self.id_field, self.stdin, self.check = source, field, id_field, stdin, check
        self.files = _expand(source)
        self.streamed = "-" in self.files

    def identity(self) -> dict[str, Any]:
        """Returns {"files": names in order, "sha256": {name: digest}}; standard input has no digest."""
        return {
            "files": [str(file) for file in self.files],
            "sha256": {str(file): _sha256(file) for file in self.files if file != "-"},
        }

    def count(self) -> int | None:
        """Returns the number of texts, including blank lines, or None if it is unknown before reading."""
        total = 0
        for file in self.files:
            if file == "-" or file.suffix == ".gz":
                return None
            if file.suffix in (".txt", ".jsonl"):
                with open(file, "rb") as lines:
                    total += sum(1 for _ in lines)
            else:
                total += sum(length for length, _ in self._chunks(file))
        return total

    def read(self, is_selected: Callable[[int, int], bool] = lambda first, count: True) -> Iterator[Row]:
        """Yields the Rows for which is_selected(row number, 1). Other rows are skipped without parsing.

        is_selected(first, count): whether any of `count` rows from `first` is selected. Raises InputError naming file
        and line.
        """
        number = 0
        for file in self.files:
            suffix = f".{self.stdin}" if file == "-" else file.suffix
            if suffix == ".gz":
                suffix = pathlib.Path(file.stem).suffix
            if suffix in (".txt", ".jsonl"):
                name = "standard input" if file == "-" else file
                lines = lines_of(_standard_input(self.check), name) if file == "-" else read_lines(file)
                for line_number, line in lines:
                    if suffix == ".jsonl" and not line.strip():
                        continue
                    if is_selected(number, 1):
                        where = f"{name}, line {line_number}"
                        record = {self.field: line} if suffix == ".txt" else parse_object(line, where)
                        yield self._row(record, number, where, suffix == ".txt")
                    number += 1
            else:
                start = number
                for length, records in self._chunks(file):
                    if is_selected(number, length):
                        for row, record in enumerate(records(), number):
                            if is_selected(row, 1):
                                yield self._row(record, row, f"{file}, row {row - start}", False)
                    number += length
        if number == 0:
            raise InputError(f"input={self.source}: no texts")
        self.rows = number

    def _row(self, record, number, where, plain):
        text, id_ = record.get(self.field), number
        if self.field not in record:
            raise InputError(f"{where}: no column {self.field!r}{nearest(self.field, record)}. Set field=")
        if not isinstance(text, str):
            raise InputError(f"{where}: {self.field!r} must be a string, found {type(text).__name__}")
        if has_lone_surrogate(text):
            raise InputError(f"{where}: {self.field!r} has an unpaired surrogate (not valid Unicode)")
        if self.id_field is not None:
            if plain:
                raise InputError(f"{where}: plain text has no {self.id_field!r}. Omit id_field, or use JSONL")
            if self.id_field not in record:
                raise InputError(f"{where}: no column {self.id_field!r}{nearest(self.id_field, record)}. Set id_field=")
            if not isinstance(record[self.id_field], str | int):
                raise InputError(f"{where}: {self.id_field!r} must be a string or an integer")
            id_ = str(record[self.id_field])
        return Row(number, id_, text)

    def _chunks(self, file):
        """Yields (number of rows, function that reads them as dicts) of a Parquet or Arrow file or a saved dataset."""
        columns = [self.field] if self.id_field in (None, self.field) else [self.field, self.id_field]

        def guarded(read):
            try:
                return read()
            except ImportError:
                raise
            except Exception as error:  # damaged files raise nearly any exception in pyarrow and datasets
                raise InputError(f"{file}: damaged or not readable ({first_line(error)})") from None

        names, chunks = guarded(lambda: _open_parquet(file) if file.suffix == ".parquet" else _open_arrow(file))
        if duplicates := [name for name in columns if list(names).count(name) > 1]:
            raise InputError(f"{file}: two columns are called {duplicates[0]!r}. Rename one")
        if missing := [name for name in columns if name not in names]:
            key = "field" if missing[0] == self.field else "id_field"
            raise InputError(f"{file}: no column {missing[0]!r}{nearest(missing[0], names)}. Set {key}=")
        for length, table in chunks(columns):
            yield length, lambda table=table: guarded(lambda: _rows(table()))


class _StandardInput(io.RawIOBase):
    """Standard input with a `check` that can interrupt a read while no data arrives.

    A thread blocked in sys.stdin.read would abort the process at interpreter exit.
    """

    def __init__(self, descriptor: int, check: Callable[[], None]) -> None:
        self.descriptor, self.check = descriptor, check

    def readable(self):
        return True

    def readinto(self, buffer):
        while not select.select([self.descriptor], [], [], 0.1)[0]:
            self.check()
        try:
            return os.readv(self.descriptor, [buffer])
        except OSError as error:  # opened for writing only, a directory, or a closed terminal
            raise InputError(f"input=-: standard input cannot be read ({error.strerror})") from None


def _standard_input(check):
    try:
        descriptor = sys.stdin.fileno()
    except OSError:  # not a file
        return sys.stdin.buffer
    return io.BufferedReader(_StandardInput(descriptor, check), 1 << 16)


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


def _expand(source):
    """Returns the paths, and "-", of an input setting."""
    paths = []
    is_path = pathlib.Path(source).expanduser().exists()  # a path may contain a comma
    for part in [source] if is_path else source.split(","):
        path = pathlib.Path(part).expanduser()
        if part == "-":
            paths.append(part)
        elif path.is_dir():
            paths += _files_in(path)
        elif path.exists():
            paths.append(path)
        else:
            matches = [pathlib.Path(name) for name in glob.glob(str(path), recursive=True)]
            if not matches:
                raise InputError(f"{part}: no such file")
            files = {file for match in matches for file in (_files_in(match) if match.is_dir() else [match])}
            paths += sorted(file for file in files if files.isdisjoint(file.parents))  # not those of a saved dataset
    for path in paths:
        if path != "-" and not path.is_dir():
            check_file(path)
            if not path.name.endswith(_SUFFIXES):
                raise InputError(f"{path}: unknown file type; supported: {', '.join(_SUFFIXES)}, and saved datasets")
    if paths.count("-") > 1:
        raise InputError(f"input={source}: standard input (-) can be read once")
    return paths


def _files_in(folder):
    if (folder / "state.json").is_file():
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise InputError(f"{folder / 'dataset_dict.json'}: splits must be a list of names")
        raise InputError(
            f"{folder}: contains several splits. Pass one of {', '.join(str(folder / name) for name in splits)}"
        )
    files = [path for path in visible(folder) if path.name.endswith(_SUFFIXES)]
    if not files:
        raise InputError(f"{folder}: contains no supported file ({', '.join(_SUFFIXES)})")
    return files


def _sha256(path):
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in visible(path):
        digest.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()
