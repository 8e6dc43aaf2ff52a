"""Atomic writes, checked reads, and fingerprints of files."""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError

_LARGEST_JSON = 1 << 28  # bytes
Path = str | os.PathLike[str]

_SYSTEM_FILES = re.compile(
    r"\.(DS_Store|localized|Spotlight-V100|Trashes|fseventsd|directory)|\.(_|nfs|fuse_hidden).*"
    r"|[Tt]humbs\.db|[Dd]esktop\.ini|lost\+found"
)
UNFINISHED = ".unfinished"  # marks a folder that is incomplete until another output is written
_PACKAGE = pathlib.Path(__file__).parent.parent
SHIPPED = _PACKAGE if (_PACKAGE / "configs").is_dir() else _PACKAGE.parent  # installed package, or checkout


@contextlib.contextmanager
def name_os_errors(path: Path) -> Iterator[None]:
    """Names `path` in an OSError raised while writing it, instead of a temporary file or no file."""
    path = pathlib.Path(path)
    try:
        yield
    except OSError as error:
        parts = pathlib.Path(error.filename or f".{path.name}.").parts
        if not any(part.startswith(f".{path.name}.") for part in parts):
            raise
        reason = error.strerror or f"cannot be written completely ({error})"  # numpy sets no strerror
        raise OSError(error.errno or errno.EIO, reason, str(path)) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[pathlib.Path]:
    """Yields a temporary path next to `path`, which is renamed to `path` on success and removed on any error."""
    with name_os_errors(path), locks.temporary(path) as name:
        yield name
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[pathlib.Path]:
    """Yields a temporary directory next to `path`, which is renamed to `path` on success and removed on any error."""
    with name_os_errors(path), locks.temporary(path, folder=True) as name:
        yield name
        for file in name.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.chmod(name, 0o755)
        os.rename(name, path)


def remove_unfinished(*paths: Path) -> None:
    """Removes the folders that contain the file UNFINISHED, left by a killed command."""
    for path in paths:
        if pathlib.Path(path, UNFINISHED).is_file():
            shutil.rmtree(path)


def require_written(*paths: Path) -> None:
    """Raises OSError for the first path that does not exist: an output was removed before the command finished."""
    for path in paths:
        if not os.path.exists(path):
            raise removed(path)


def removed(path: Path) -> OSError:
    """Returns the OSError for an output that was removed or replaced while it was written."""
    return OSError(errno.ENOENT, "was removed or replaced while it was written. Repeat the command", str(path))


def write_text(path: Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value: Any, indent: int | None = None) -> str:
    """Returns JSON without escapes of non-ASCII characters, unless it has unpaired surrogates (not valid in UTF-8)."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return json.dumps(value, indent=indent) if has_lone_surrogate(text) else text


def install_command(extra: str) -> str:
    """Returns the command that installs an extra, from the requirements file in a checkout, else by its name."""
    return (
        f"pip install -r requirements-{extra}.txt" if SHIPPED != _PACKAGE else f'pip install "llm2vec-gen-jax[{extra}]"'
    )


def shipped(path: Path) -> Path:
    """Returns `path`, or the shipped file if `path` is configs/NAME and does not exist."""
    parts = pathlib.Path(path).parts
    if parts[:1] == ("configs",) and ".." not in parts and not os.path.exists(path):
        if (file := SHIPPED.joinpath(*parts)).exists():
            return str(file)
    return path


def check_file(path: Path, what: str = "file", largest: int | None = None) -> None:
    """Raises InputError unless `path` is a readable regular file of at most `largest` bytes.

    Devices and pipes are rejected, because they may be endless. what: its name in the error.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such {what}") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise InputError(f"{path}: not a readable {what} ({getattr(error, 'strerror', error)})") from None
    if not stat.S_ISREG(status.st_mode):
        reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise InputError(f"{path}: not a readable {what} ({reason})")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: not a readable {what} ({os.strerror(errno.EACCES)})")
    if largest is not None and status.st_size > largest:
        raise InputError(f"{path}: not a readable {what} ({status.st_size} bytes, at most {largest} are read)")


def whole_number(text: str) -> int | None:
    """Returns the integer of 1 to 18 ASCII digits, else None. (str.isdigit also accepts \u00b2.)"""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises InputError that names the file (and line) if it is missing or malformed."""
    check_file(path, largest=_LARGEST_JSON)
    try:
        value = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def read_array(path: Path, key: str) -> np.ndarray:
    """Returns the memory-mapped array of a .npy file. Raises InputError that names `key`, the setting of `path`."""
    try:
        check_file(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy evaluates the header: a damaged one can raise almost anything
        raise InputError(f"{key}={path}: not a .npy array ({error})") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{key}={path}: expected a single array (.npy), found an archive (.npz)")
    return array


def new_array(path: pathlib.Path, shape: tuple[int, ...], dtype: Any = np.float32) -> np.memmap:
    """Creates a memory-mapped .npy file with allocated disk space. Raises OSError if the disk is full."""
    try:
        with name_os_errors(path):
            array = np.lib.format.open_memmap(path, "w+", dtype, shape)
            if hasattr(os, "posix_fallocate"):  # otherwise a full disk raises SIGBUS later
                with open(path, "r+b") as file:
                    os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        return array
    except OSError:
        path.unlink(missing_ok=True)
        raise


def require_new(path: Path, key: str | None = None) -> None:
    """Raises InputError if `path` exists. key: the setting of `path`."""
    if os.path.lexists(path):
        place = path if key is None else f"{key}={path}"
        raise InputError(f"{place}: already exists. Choose another output, or remove it")


def entries(folder: Path) -> list[str]:
    """Returns the names in a folder, except files created by operating systems and file systems."""
    return [name for name in os.listdir(folder) if not _SYSTEM_FILES.fullmatch(name)]


def visible(folder: Path, pattern: str = "*") -> list[pathlib.Path]:
    """Returns the sorted files below a folder that match a pattern, without hidden files and folders.

    Hidden folders may contain copies, such as .ipynb_checkpoints. Links to folders are followed, each folder is read
    once. Raises InputError for an unreadable folder and for a link to a path that does not exist.
    """

    def refuse(error):
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

    files = []
    read: set[str] = set()
    for parent, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        if (path := os.path.realpath(parent)) in read:  # a link to a folder that contains it would not end
            folders.clear()
            continue
        read.add(path)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [pathlib.Path(parent, name) for name in names if not name.startswith(".")]
    for file in files:
        if file.is_symlink() and not file.exists():
            raise InputError(
                f"{file}: link to {os.readlink(file)}, which does not exist. Restore it or remove the link"
            )
    return sorted(path for path in files if path.match(pattern) and path.is_file())


def sha256_file(path: Path) -> str:
    """Returns the hex SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """Returns 16 hex digits that identify a JSON-serializable value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def has_lone_surrogate(text: str) -> bool:
    """Whether a string contains an unpaired surrogate (not valid Unicode), which JSON escapes can encode."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def require_same_run(place: object, old: Mapping[str, Any], new: Mapping[str, Any], remedy: str) -> None:
    """Raises InputError if the records of the run that wrote `place` and of this run differ. remedy: another fix."""
    if differing := diff(old, new):
        raise InputError(f"{place}: holds another run ({differing}). Repeat its settings to resume it, {remedy}")


def diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> str:
    """Returns "key: old -> new, ..." for every leaf that differs between two nested dicts; "" if they are equal."""
    changes = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            inner = diff(before, after, f"{prefix}{key}.")
            changes += [inner] if inner else []
        elif before != after:
            changes.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return ", ".join(changes)
