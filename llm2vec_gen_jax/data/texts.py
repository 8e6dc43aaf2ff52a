"""Large inputs: texts out of text, JSONL, Parquet and Arrow files, streamed in one order, any part of them."""

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

_SUFFIXES = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz", ".parquet", ".arrow")
_PIECE = 1024  # rows of an Arrow table that are in memory
_MOST_ROWS = 2**34  # of a table: what a damaged file says may be 2**62


class Row(NamedTuple):
    """A text and where it is: its number in the whole input, from 0, and its id."""

    number: int
    id: str | int
    text: str


class Corpus:
    """The texts of an `input=` setting.

    source: files, folders and patterns (`**` too), separated by commas; `-` is standard input. A folder is a Hugging
    Face dataset (save_to_disk) or stands for the files in it, but for names that begin with a dot. field, id_field:
    keys of JSON objects, columns of tables. stdin: what `-` holds, "txt" or "jsonl". check: called while `-` is silent;
    what it raises ends the reading. Files come in the order given, those of a pattern or folder sorted.
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
        """Returns {"files": names in their order, "sha256": {name: hash}}; standard input has no hash."""
        return {
            "files": [str(file) for file in self.files],
            "sha256": {str(file): _sha256(file) for file in self.files if file != "-"},
        }

    def count(self) -> int | None:
        """Returns about how many texts there are (blank lines included), or None where only reading them would tell."""
        total = 0
        for file in self.files:
            if file == "-" or file.suffix == ".gz":
                return None
            if file.suffix in (".txt", ".jsonl"):
                with open(file, "rb") as lines:
                    total += sum(1 for _ in lines)
            else:
                total += sum(length for length, _ in self._pieces(file))
        return total

    def read(self, wanted: Callable[[int, int], bool] = lambda first, count: True) -> Iterator[Row]:
        """Yields the Rows for which wanted(row number, 1). What is not wanted is skipped, unparsed.

        wanted(first, count) says whether any of `count` rows from `first` is. Raises InputError naming file and line.
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
                    if wanted(number, 1):
                        where = f"{name}, line {line_number}"
                        record = {self.field: line} if suffix == ".txt" else parse_object(line, where)
                        yield self._row(record, number, where, suffix == ".txt")
                    number += 1
            else:
                start = number
                for length, records in self._pieces(file):
                    if wanted(number, length):
                        for row, record in enumerate(records(), number):
                            if wanted(row, 1):
                                yield self._row(record, row, f"{file}, row {row - start}", False)
                    number += length
        if number == 0:
            raise InputError(f"input={self.source}: no texts in it")
        self.rows = number

    def _row(self, record, number, where, plain):
        text, id_ = record.get(self.field), number
        if self.field not in record:
            raise InputError(f"{where}: no column {self.field!r}{nearest(self.field, record)}. Set field=")
        if not isinstance(text, str):
            raise InputError(f"{where}: {self.field!r} must be a string, found {type(text).__name__}")
        if has_lone_surrogate(text):
            raise InputError(f"{where}: {self.field!r} contains an unpaired surrogate (not valid Unicode)")
        if self.id_field is not None:
            if plain:
                raise InputError(f"{where}: lines of text have no {self.id_field!r}: leave id_field out, or use JSONL")
            if self.id_field not in record:
                raise InputError(f"{where}: no column {self.id_field!r}{nearest(self.id_field, record)}. Set id_field=")
            if not isinstance(record[self.id_field], str | int):
                raise InputError(f"{where}: {self.id_field!r} must be a string or a whole number")
            id_ = str(record[self.id_field])
        return Row(number, id_, text)

    def _pieces(self, file):
        """Yields (rows, a function that reads them as dicts) of a Parquet or Arrow file or a saved dataset."""
        columns = [self.field] if self.id_field in (None, self.field) else [self.field, self.id_field]

        def guarded(read):
            try:
                return read()
            except ImportError:
                raise
            except Exception as error:  # of a saved dataset's JSON, a column's name, a type: damage raises nearly any
                raise InputError(f"{file}: damaged or not readable ({first_line(error)})") from None

        names, pieces = guarded(lambda: _open_parquet(file) if file.suffix == ".parquet" else _open_arrow(file))
        if twice := [name for name in columns if list(names).count(name) > 1]:
            raise InputError(f"{file}: two of its columns are called {twice[0]!r}. Rename one")
        if missing := [name for name in columns if name not in names]:
            key = "field" if missing[0] == self.field else "id_field"
            raise InputError(f"{file}: no column {missing[0]!r}{nearest(missing[0], names)}. Set {key}=")
        for length, table in pieces(columns):
            yield length, lambda table=table: guarded(lambda: _rows(table()))


class _StandardInput(io.RawIOBase):
    """Standard input that can be given up while its producer is silent: a thread in a read of sys.stdin, when Python
    ends, aborts the process."""

    def __init__(self, descriptor, check):
        self.descriptor, self.check = descriptor, check

    def readable(self):
        return True

    def readinto(self, buffer):
        while not select.select([self.descriptor], [], [], 0.1)[0]:
            self.check()
        try:
            return os.readv(self.descriptor, [buffer])
        except OSError as error:  # opened for writing only, a directory, a terminal that is gone
            raise InputError(f"input=-: standard input cannot be read ({error.strerror})") from None


def _standard_input(check):
    try:
        descriptor = sys.stdin.fileno()
    except OSError:  # not a file
        return sys.stdin.buffer
    return io.BufferedReader(_StandardInput(descriptor, check), 1 << 16)


def _rows(table):
    """Returns the dicts of an Arrow table. An Arrow file is not checked as it is opened: a wrong offset is a crash."""
    table.validate(full=True)
    return table.to_pylist()


def _check_rows(numbers):
    if min(numbers, default=0) < 0 or sum(numbers) > _MOST_ROWS:
        raise ValueError(f"it says that it has {sum(numbers)} rows")


def _open_parquet(path):
    """Returns (column names, pieces): pieces(columns) yields (rows, a function that returns their Arrow table)."""
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    _check_rows(groups)

    def pieces(columns):
        for group, rows in enumerate(groups):
            # A row group may be large, so it is read in pieces, and not at all where none of it is wanted.
            batches = None

            def piece(index, group=group):
                nonlocal batches
                if batches is None:
                    batches = enumerate(file.iter_batches(_PIECE, [group], columns))
                return next(batch for number, batch in batches if number == index)

            for start in range(0, rows, _PIECE):
                yield min(_PIECE, rows - start), lambda start=start: piece(start // _PIECE)

    return file.schema_arrow.names, pieces


def _open_arrow(path):
    """`_open_parquet` of a folder that save_to_disk wrote, or of an Arrow file or stream."""
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

    def pieces(columns):
        for start in range(0, len(dataset), _PIECE):
            stop = min(start + _PIECE, len(dataset))
            yield stop - start, lambda start=start, stop=stop: slice_of(start, stop).select(columns)

    return names, pieces


def _expand(source):
    """Returns the paths, and "-", of an input setting."""
    found = []
    whole = pathlib.Path(source).expanduser().exists()  # a name may hold a comma
    for part in [source] if whole else source.split(","):
        path = pathlib.Path(part).expanduser()
        if part == "-":
            found.append(part)
        elif path.is_dir():
            found += _files_in(path)
        elif path.exists():
            found.append(path)
        else:
            matches = sorted(pathlib.Path(name) for name in glob.glob(str(path), recursive=True))
            if not matches:
                raise InputError(f"{part}: no such file")
            found += matches
    for path in found:
        if path != "-" and not path.is_dir():
            check_file(path)
        if path != "-" and not path.is_dir() and not path.name.endswith(_SUFFIXES):
            raise InputError(f"{path}: cannot be read; supported: {', '.join(_SUFFIXES)}, and saved datasets")
    if found.count("-") > 1:
        raise InputError(f"input={source}: standard input (-) can be read once")
    return found


def _files_in(folder):
    if (folder / "state.json").is_file():
        return [folder]
    if (folder / "dataset_dict.json").is_file():
        splits = read_json(folder / "dataset_dict.json").get("splits")
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise InputError(f"{folder / 'dataset_dict.json'}: no list of splits")
        raise InputError(
            f"{folder}: holds several splits; name one: {', '.join(str(folder / name) for name in splits)}"
        )
    files = [path for path in visible(folder) if path.name.endswith(_SUFFIXES)]
    if not files:
        raise InputError(f"{folder}: no file in it that can be read; supported: {', '.join(_SUFFIXES)}")
    return files


def _sha256(path):
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in visible(path):
        digest.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()
