"""JSON Lines: streamed reading, and crash-safe appending."""

import gzip
import io
import json
import logging
import os
import pathlib
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import (
    check_file,
    diff,
    name_os_errors,
    read_json,
    removed,
    require_same_run,
    to_json,
    write_json,
    write_text,
)

logger = logging.getLogger(__name__)

_LONGEST_LINE = 1 << 26  # bytes


def write_jsonl(path: str | os.PathLike, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, atomically."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def read_lines(path: str | os.PathLike, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """Yields (line number, text) of a UTF-8 text file, plain or .gz. Raises InputError naming file and line.

    keep_ends: whether the text includes the line end.
    """
    path = pathlib.Path(path)
    check_file(path)
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        yield from lines_of(file, path, keep_ends)


def lines_of(file: IO[bytes] | io.BufferedIOBase, name: object, keep_ends: bool = False) -> Iterator[tuple[int, str]]:
    """`read_lines` of a binary file object; `name` is for errors."""
    number = 0
    try:
        for number, raw in enumerate(iter(lambda: file.readline(_LONGEST_LINE + 1), b""), 1):
            if len(raw) > _LONGEST_LINE:
                raise InputError(f"{name}, line {number}: longer than {_LONGEST_LINE} bytes")
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                raw = raw[3:]
            text = raw.decode("utf-8")
            yield number, text if keep_ends else text.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}, line {number}: not UTF-8 (byte {error.start} is {raw[error.start]:#04x}). "
            "Convert the file, for example with `iconv -t utf-8`"
        ) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{name}, after line {number}: damaged gzip file ({error})") from None


def read_jsonl(path: str | os.PathLike) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number, object) of a JSONL file, plain or .gz; empty lines are skipped.

    Raises InputError naming file and line for malformed JSON and non-objects.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, parse_object(line, f"{path}, line {number}")


def parse_object(line: str, where: object) -> dict[str, Any]:
    """Returns the JSON object of a line; `where` is for errors."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # thousands of digits, or of nested brackets
        raise InputError(f"{where}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


class JsonlAppender:
    """Appends objects to a JSONL file so that a kill at any moment neither loses nor repeats any.

    Opening truncates an incomplete last line (a kill during a write), and prints a message if it truncates from a line
    with a wrong checksum on (a damaged disk or copy). `rows`: the objects in the file.
    `FILE.run.json` records the settings `run` of the file, `FILE.crc32` a CRC-32 of each line (4 bytes, little-endian).
    overwrite: whether a file with another `run` record is emptied. Raises InputError if the file has another record and
    is not to be overwritten, has no record, or is open in another process.
    """

    def __init__(self, path: str | os.PathLike, run: Mapping[str, Any], overwrite: bool = False) -> None:
        self.path = pathlib.Path(path)
        self.sidecar, self.sums = self.sidecars(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self._open()
        try:
            self._begin(run, overwrite)
        except BaseException:
            self.file.close()
            raise
        self.removed = False

    def _open(self):
        """Returns the open file, locked before it or its sidecars are changed."""
        while True:
            file = open(self.path, "ab+")
            if locks.try_lock(file.fileno()) is False:
                file.close()
                raise InputError(f"{self.path}: another process is writing to it")
            if locks.is_at(file.fileno(), self.path):
                return file
            file.close()  # the previous holder has removed it

    def _begin(self, run, overwrite):
        if os.fstat(self.file.fileno()).st_size and not self.sidecar.exists():
            raise InputError(f"{self.path}: exists, and was not written by this command. Choose another output")
        if overwrite and self.sidecar.exists() and self._is_of_another(run):
            self.file.truncate(0)
        if os.fstat(self.file.fileno()).st_size:
            remedy = "choose another output, or pass overwrite=true"
            require_same_run(self.path, read_json(self.sidecar), run, remedy)
        else:
            self.sums.unlink(missing_ok=True)
            write_json(self.sidecar, run)
        self._truncate_damaged()
        self.rows = [row for _, row in read_jsonl(self.path)]

    def _is_of_another(self, run):
        try:
            return bool(diff(read_json(self.sidecar), run))
        except InputError:  # damaged
            return True

    @staticmethod
    def sidecars(path: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
        """Returns the paths of the run record and the checksums of a file."""
        return path.with_name(f"{path.name}.run.json"), path.with_name(f"{path.name}.crc32")

    def _truncate_damaged(self):
        self.file.seek(0)
        *lines, _ = self.file.read().split(b"\n")
        sums = self.sums.read_bytes() if self.sums.exists() else b""
        # A kill can happen between a line and its checksum: lines without one are accepted.
        for number, (line, (crc,)) in enumerate(zip(lines, struct.iter_unpack("<I", sums[: len(sums) // 4 * 4]))):
            if zlib.crc32(line) != crc:
                logger.warning(f"{self.path}, line {number + 1}: wrong checksum; computed again from this line on")
                lines = lines[:number]
                break
        self.file.truncate(sum(len(line) + 1 for line in lines))
        with open(self.sums, "wb") as file:
            file.write(_crc32(lines))

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Writes a list of objects with a single write, and syncs it to disk."""
        lines = [to_json(row).encode() for row in rows]
        with name_os_errors(self.path):
            self.file.write(b"".join(line + b"\n" for line in lines))
            self.file.flush()
            os.fsync(self.file.fileno())
            with open(self.sums, "ab") as file:
                file.write(_crc32(lines))
        self.check()
        self.rows.extend(rows)

    def check(self) -> None:
        """Raises OSError if the file or its run record was removed or replaced."""
        if not (locks.is_at(self.file.fileno(), self.path) and self.sidecar.exists()):
            raise removed(self.path)

    def remove(self) -> None:
        """Removes the file and its sidecars."""
        self.removed = True
        for path in (self.path, self.sidecar, self.sums):
            path.unlink(missing_ok=True)

    def __enter__(self) -> "JsonlAppender":
        return self

    def __exit__(self, error, *_):
        try:
            if error is None and not self.removed:
                self.check()
        finally:
            with name_os_errors(self.path):  # close() flushes again
                self.file.close()


def _crc32(lines):
    return b"".join(struct.pack("<I", zlib.crc32(line)) for line in lines)
