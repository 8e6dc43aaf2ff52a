"""Streams texts from text, JSONL, CSV, Parquet and Arrow files, saved datasets and standard input."""

import glob
import hashlib
import io
import os
import pathlib
import select
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import check_file, has_lone_surrogate, read_json, sha256_file, shipped, visible
from llm2vec_gen_jax.common.hub import DEFAULT_HUB, HubOptions
from llm2vec_gen_jax.common.jsonl import read_lines
from llm2vec_gen_jax.data import tables
from llm2vec_gen_jax.data.records import read_records


def read_texts(path: str | os.PathLike[str], field: str, hub: HubOptions = DEFAULT_HUB) -> list[str]:
    """Returns all lines of a .txt[.gz] file, or `field` of all rows of another source of `read_records`."""
    if tables.format_of(path) != ".txt":
        return [row[field] for row in read_records(path, (field,), remedy="Set field=", hub=hub)]
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
    objects or columns of tables. stdin: format of `-`, "txt", "jsonl" or "csv". check: called repeatedly while no data
    arrives on `-`; it may raise to stop. Files are read in the order of `source`, those of a pattern or folder sorted.
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
            if tables.format_of(file) in (".txt", ".jsonl"):
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
            for length, read in self._chunks(file):
                if is_selected(number, length):
                    for row, (place, record) in enumerate(read(), number):
                        if is_selected(row, 1):
                            yield self._row(record, row, place)
                number += length
        if number == 0:
            raise InputError(f"input={self.source}: no texts")
        self.rows = number

    def _chunks(self, file):
        columns = {self.field: ". Set field="}
        if self.id_field is not None:
            columns.setdefault(self.id_field, ". Set id_field=")
        if file != "-":
            return tables.chunks(file, columns)
        return tables.stream_chunks(_standard_input(self.check), "standard input", f".{self.stdin}", columns)

    def _row(self, record, number, place):
        text, id_ = record[self.field], number
        if not isinstance(text, str):
            raise InputError(f"{place}: {self.field!r} must be a string, found {type(text).__name__}")
        if has_lone_surrogate(text):
            raise InputError(f"{place}: {self.field!r} has an unpaired surrogate (not valid Unicode)")
        if self.id_field is not None:
            if not isinstance(record[self.id_field], str | int):
                raise InputError(f"{place}: {self.id_field!r} must be a string or an integer")
            id_ = str(record[self.id_field])
            if has_lone_surrogate(id_):
                raise InputError(f"{place}: {self.id_field!r} has an unpaired surrogate (not valid Unicode)")
        return Row(number, id_, text)


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


def _expand(source):
    """Returns the paths, and "-", of an input setting."""
    paths = []
    is_path = bool(source) and pathlib.Path(source).expanduser().exists()  # a path may contain a comma
    for part in [source] if is_path else source.split(","):
        if not part.strip():  # such as from an unset shell variable
            raise InputError(f"input={source}: an empty path. Pass . for this folder")
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
            if not path.name.endswith(tables.SUFFIXES):
                raise InputError(
                    f"{path}: unknown file type; supported: {', '.join(tables.SUFFIXES)}, and saved datasets"
                )
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
    files = [path for path in visible(folder) if path.name.endswith(tables.SUFFIXES)]
    if not files:
        raise InputError(f"{folder}: contains no supported file ({', '.join(tables.SUFFIXES)})")
    return files


def _sha256(path):
    if not path.is_dir():
        return sha256_file(path)
    digest = hashlib.sha256()
    for file in visible(path):
        digest.update(f"{file.relative_to(path)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def read_instructions(path: str | os.PathLike[str], key: str) -> list[str]:
    """Returns the stripped lines of a text file; a blank line is no instruction. key: the setting, for errors.

    Raises InputError naming a line that is repeated, and for a file without lines.
    """
    instructions: list[str] = []
    for number, line in read_lines(pathlib.Path(shipped(path))):
        if line.strip() in instructions:
            raise InputError(f"{key}={path}, line {number}: {line.strip()!r} is repeated")
        instructions.append(line.strip())
    if not instructions:
        raise InputError(f"{key}={path}: no lines")
    return instructions
