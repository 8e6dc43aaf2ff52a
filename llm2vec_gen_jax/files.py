"""Files that appear complete or not at all, and JSONL that survives a kill."""

import contextlib
import errno
import fcntl
import gzip
import hashlib
import json
import os
import pathlib
import shutil
import struct
import tempfile
import time
import zlib

import numpy as np
import yaml

from llm2vec_gen_jax.errors import InputError

_HERE = pathlib.Path(__file__).parent
SHIPPED = _HERE if (_HERE / "configs").is_dir() else _HERE.parent  # of an installed package, of a checkout


@contextlib.contextmanager
def writing(path):
    """Names `path` in an OSError of the block, which writes it: the system's names a temporary file or none at all."""
    path = pathlib.Path(path)
    try:
        yield
    except OSError as error:
        parts = pathlib.Path(error.filename or f".{path.name}.").parts
        if not any(part.startswith(f".{path.name}.") for part in parts):
            raise
        reason = error.strerror or f"cannot be written whole ({error})"  # numpy says no more than that
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error


@contextlib.contextmanager
def atomic_path(path):
    """Yields a temporary path beside `path`; on success it becomes `path`, on any error it is removed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
        os.close(handle)
        try:
            yield pathlib.Path(temporary)
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            pathlib.Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def atomic_directory(path):
    """Yields a temporary directory beside `path`; on success it becomes `path`, on any error it is removed."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        try:
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    with open(file, "rb") as handle:
                        os.fsync(handle.fileno())
            os.chmod(temporary, 0o755)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


@contextlib.contextmanager
def exclusive(path, waiting=lambda: None):
    """Lets one process at a time into the block; the others wait. A kill lets the next one in.

    waiting: called twice a second while it waits; what it raises ends that. path: of a lock file, removed when the
    block succeeds; who waited for it must check whether there is still work.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if not _lock(file):
            print(f"waiting for another process, which holds {path}", flush=True)
            while not _lock(file):
                waiting()
                time.sleep(0.5)
        yield
        path.unlink(missing_ok=True)


def _lock(file):
    """Locks an open file where no other process has. Returns whether it did."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_text(path, text):
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Writes indented JSON atomically."""
    write_text(path, to_json(value, indent=2) + "\n")


def write_jsonl(path, rows):
    """Writes a JSON object to a line, atomically."""
    write_text(path, "".join(to_json(row) + "\n" for row in rows))


def to_json(value, indent=None):
    """Returns JSON with all letters as they are, but for half of a surrogate pair, of which no file can be written."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return json.dumps(value, indent=indent) if is_broken(text) else text


def install_command(extra):
    """Returns the command that installs what an extra needs: from a checkout's requirements, else by its name."""
    return f"pip install -r requirements-{extra}.txt" if SHIPPED != _HERE else f'pip install "llm2vec-gen-jax[{extra}]"'


def shipped(path):
    """Returns `path`; where nothing is there and it is configs/NAME, the path of the file that this package brings."""
    parts = pathlib.Path(path).parts
    if parts[:1] == ("configs",) and ".." not in parts and not os.path.exists(path):
        if (found := SHIPPED.joinpath(*parts)).exists():
            return str(found)
    return path


def read_json(path):
    """Reads a JSON object. Raises InputError that names the file (and line) when it is missing or malformed."""
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class _StrictLoader(yaml.SafeLoader):
    """YAML of which no key is repeated: PyYAML would take the last and say nothing."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path, what="file"):
    """Reads a YAML file. Raises InputError that names it (as `what`) when it is missing or malformed."""
    try:
        with open(path, encoding="utf-8") as file:
            return yaml.load(file, Loader=_StrictLoader)
    except FileNotFoundError:
        raise InputError(f"{path}: no such {what}") from None
    except OSError as error:
        raise InputError(f"{path}: not a readable {what} ({error.strerror})") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that there is not
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None


def read_array(path, key):
    """Returns the array of a .npy file, mapped, not read. Raises InputError that names `key`, the setting it is of."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python: damage of it raises nearly anything
        raise InputError(f"{key}={path}: not a .npy array ({error})") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{key}={path}: holds many arrays (.npz), expected one (.npy)")
    return array


def new_array(path, shape, dtype=np.float32):
    """Returns a new mapped array that has its place on the disk. Raises OSError where there is none for it."""
    try:
        with writing(path):
            array = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # on Linux: later, a full disk would end the process without a word
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array
    except OSError:
        path.unlink(missing_ok=True)
        raise


def require_new(path, key=None):
    """Raises InputError where something is at `path` already; `key` is the setting that names it."""
    if os.path.lexists(path):
        place = path if key is None else f"{key}={path}"
        raise InputError(f"{place}: exists already. Choose another, or remove it")


def sha256_file(path):
    """Returns the hex SHA-256 of a file, read in 1 MiB pieces."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(value):
    """Returns 16 hex digits that identify a JSON-serialisable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def is_broken(text):
    """Whether a string holds half of a surrogate pair: JSON can write it, but it is no valid text."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def read_lines(path):
    """Yields (line number, text) of a UTF-8 text file, plain or .gz. Raises InputError naming file and line."""
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
        yield from lines_of(file, path)


def lines_of(file, name):
    """`read_lines` of a file that is open for reading bytes; `name` is for its errors."""
    number = 0
    try:
        for number, raw in enumerate(file, 1):
            if number == 1 and raw.startswith(b"\xef\xbb\xbf"):
                raw = raw[3:]
            yield number, raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name}, line {number}: not UTF-8 (byte {error.start} is {raw[error.start]:#04x}). "
            "Convert the file, for example with `iconv -t utf-8`"
        ) from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise InputError(f"{name}, after line {number}: damaged gzip file ({error})") from None


def read_jsonl(path):
    """Yields (line number, object) of a JSONL file, plain or .gz; empty lines are skipped.

    Raises InputError naming file and line for malformed JSON, and for a line that is not an object.
    """
    for number, line in read_lines(path):
        if line.strip():
            yield number, parse_object(line, f"{path}, line {number}")


def parse_object(line, where):
    """Returns the object that a line of JSON is; `where` is for its errors."""
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, thousands of brackets
        raise InputError(f"{where}: not readable JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


class JsonlAppender:
    """Appends objects to a JSONL file so that a kill at any moment loses and repeats nothing.

    A last line without its newline (a kill in the middle of a write) is cut off on opening, and so is everything from
    a line on that is not what was written (a damaged disk or copy), which is said; `rows` holds the objects that are
    there. Sidecars: `FILE.run.json` records what the file was made with: opening it with another `run` raises
    InputError, because its lines would be a mixture; so does a file that another process is appending to.
    `FILE.crc32` holds a checksum of each line, 4 bytes, little-endian.
    """

    def __init__(self, path, run, overwrite=False):
        self.path = pathlib.Path(path)
        self.sidecar, self.sums = self.sidecars(self.path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if overwrite:
            self.remove()
        if self.path.exists():
            if not self.sidecar.exists():
                raise InputError(f"{self.path}: exists, and was not written by this command. Choose another output")
            differing = changes(read_json(self.sidecar), run)
            if differing:
                raise InputError(
                    f"{self.path}: holds another run ({differing}). Repeat its settings to resume it, "
                    "choose another output, or pass overwrite=true"
                )
        else:
            write_json(self.sidecar, run)
            self.sums.unlink(missing_ok=True)
        self.file = open(self.path, "ab+")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{self.path}: another process is writing to it") from None
        self._keep_what_is_whole()
        self.rows = [row for _, row in read_jsonl(self.path)]

    @staticmethod
    def sidecars(path):
        """Returns the paths of the record and the checksums of a file."""
        return path.with_name(f"{path.name}.run.json"), path.with_name(f"{path.name}.crc32")

    def _keep_what_is_whole(self):
        self.file.seek(0)
        *lines, _ = self.file.read().split(b"\n")
        known = self.sums.read_bytes() if self.sums.exists() else b""
        # A kill may come between a line and its checksum: what has none yet is taken as it is.
        for number, (line, (crc,)) in enumerate(zip(lines, struct.iter_unpack("<I", known[: len(known) // 4 * 4]))):
            if zlib.crc32(line) != crc:
                print(f"{self.path}, line {number + 1}: is not what was written; made again from there on", flush=True)
                lines = lines[:number]
                break
        self.file.truncate(sum(len(line) + 1 for line in lines))
        with open(self.sums, "wb") as file:
            file.write(_crc32(lines))

    def append(self, rows):
        """Writes a list of objects in one piece and waits until they are on disk."""
        lines = [to_json(row).encode() for row in rows]
        with writing(self.path):
            self.file.write(b"".join(line + b"\n" for line in lines))
            self.file.flush()
            os.fsync(self.file.fileno())
            with open(self.sums, "ab") as file:
                file.write(_crc32(lines))
        self.rows.extend(rows)

    def remove(self):
        """Removes the file and its sidecars."""
        for path in (self.path, self.sidecar, self.sums):
            path.unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        with writing(self.path):  # what could not be flushed is tried again
            self.file.close()


def _crc32(lines):
    return b"".join(struct.pack("<I", zlib.crc32(line)) for line in lines)


def changes(old, new, prefix=""):
    """Returns "key: old -> new, ..." for every leaf in which two nested dicts differ; "" when they are equal."""
    found = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            inner = changes(before, after, f"{prefix}{key}.")
            found += [inner] if inner else []
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return ", ".join(found)
