"""Files that appear complete or not at all, and JSONL that survives a kill."""

import collections
import contextlib
import errno
import hashlib
import json
import os
import pathlib
import re
import shutil
import stat

import numpy as np
import yaml

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError

_LARGEST_JSON, LARGEST_YAML = 1 << 28, 1 << 20  # bytes of a file that is read whole
_OF_SYSTEMS = re.compile(
    r"\.(DS_Store|localized|Spotlight-V100|Trashes|fseventsd|directory)|\.(_|nfs|fuse_hidden).*"
    r"|[Tt]humbs\.db|[Dd]esktop\.ini|lost\+found"
)
_MOST_YAML_NODES = 100_000
UNFINISHED = ".unfinished"  # a file in a folder that is no use without another one that is still to be written
_HERE = pathlib.Path(__file__).parent.parent  # the package
SHIPPED = _HERE if (_HERE / "configs").is_dir() else _HERE.parent  # of an installed package, of a checkout


@contextlib.contextmanager
def name_os_errors(path):
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
    with name_os_errors(path), locks.temporary(path) as name:
        yield name
        with open(name, "rb") as file:
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)


@contextlib.contextmanager
def atomic_directory(path):
    """Yields a temporary directory beside `path`; on success it becomes `path`, on any error it is removed."""
    with name_os_errors(path), locks.temporary(path, folder=True) as name:
        yield name
        for file in name.rglob("*"):
            if file.is_file():
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        os.chmod(name, 0o755)
        os.rename(name, path)


def remove_unfinished(*paths):
    """Removes those folders that a killed command marked with the file UNFINISHED: it had others still to write."""
    for path in paths:
        if pathlib.Path(path, UNFINISHED).is_file():
            shutil.rmtree(path)


def require_written(*paths):
    """Raises OSError for the first of the paths at which nothing is: what a command wrote was removed meanwhile."""
    for path in paths:
        if not os.path.exists(path):
            raise removed(path)


def removed(path):
    """Returns the OSError about an output that was removed or replaced while it was written."""
    return OSError(errno.ENOENT, "was removed or replaced while it was written. Repeat the command", str(path))


def write_text(path, text):
    """Writes UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path, value):
    """Writes indented JSON atomically."""
    write_text(path, to_json(value, indent=2) + "\n")


def to_json(value, indent=None):
    """Returns JSON with all letters as they are, but for half of a surrogate pair, of which no file can be written."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return json.dumps(value, indent=indent) if has_lone_surrogate(text) else text


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


def check_file(path, what="file", largest=None):
    """Raises InputError where there is no regular file (or a link to one) that may be read: a device or a pipe may
    have no end.

    largest: the bytes that it may have.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such {what}") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise InputError(f"{path}: not a readable {what} ({getattr(error, 'strerror', error)})") from None
    if not stat.S_ISREG(status.st_mode):
        reason = os.strerror(errno.EISDIR) if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise InputError(f"{path}: not a readable {what} ({reason})")
    if not os.access(path, os.R_OK):
        raise InputError(f"{path}: not a readable {what} ({os.strerror(errno.EACCES)})")
    if largest is not None and status.st_size > largest:
        raise InputError(f"{path}: not a readable {what} ({status.st_size} bytes, at most {largest} are read)")


def whole_number(text):
    """Returns the number that at most 18 ASCII digits are, else None. (str.isdigit is true of \u00b2 as well.)"""
    return int(text) if re.fullmatch(r"[0-9]{1,18}", text) else None


def read_json(path):
    """Reads a JSON object. Raises InputError that names the file (and line) when it is missing or malformed."""
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


class _BoundedLoader(yaml.SafeLoader):
    """YAML whose aliases cannot stand for more than any memory holds, which takes a few lines."""

    def __init__(self, stream):
        super().__init__(stream)
        self.sizes = {}  # id of a node -> nodes in it, those of aliases included

    def compose_node(self, parent, index):
        is_alias, mark = self.check_event(yaml.AliasEvent), self.peek_event().start_mark
        node = super().compose_node(parent, index)
        if is_alias and id(node) not in self.sizes:
            raise yaml.composer.ComposerError(None, None, "an alias of what it is in", mark)
        if not is_alias:
            parts = node.value if isinstance(node, yaml.CollectionNode) else []
            parts = [part for pair in parts for part in pair] if isinstance(node, yaml.MappingNode) else parts
            self.sizes[id(node)] = 1 + sum(self.sizes[id(part)] for part in parts)
        if self.sizes[id(node)] > _MOST_YAML_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {_MOST_YAML_NODES} values", mark)
        return node


class _StrictLoader(_BoundedLoader):
    """YAML of which no key is repeated: PyYAML would take the last and say nothing."""

    def construct_mapping(self, node, deep=False):
        keys = collections.Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in keys.most_common(1):
            if count > 1:
                raise yaml.constructor.ConstructorError(None, None, f"{key} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


class _TextLoader(_StrictLoader):
    """YAML of which plain words are text as it is written: 2026_11_28 and 1:30 are no numbers. Only null, true and
    false, and their other spellings, are what they are in YAML."""


_TextLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag.rpartition(":")[2] in ("null", "bool", "merge")]
    for first, pairs in _StrictLoader.yaml_implicit_resolvers.items()
}


class _QuotingDumper(yaml.SafeDumper):
    """Quotes text that is a number to any version of YAML: 1e5 is one to 1.2, but not to PyYAML."""


_QuotingDumper.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+|0o[0-7]+"),
    list("-+.0123456789"),
)


def to_yaml(value):
    """Returns YAML whose text is text to every reader, and whose keys keep their order."""
    return yaml.dump(value, Dumper=_QuotingDumper, sort_keys=False, allow_unicode=True)


def parse_yaml(stream, where, loader=_BoundedLoader):
    """Returns the value of YAML in a string or an open file; `where` is for errors."""
    try:
        return yaml.load(stream, Loader=loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: not UTF-8, or a date that there is not
        raise InputError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None


def read_yaml(path, what="file", text=False):
    """Reads a YAML file; text: numbers and dates stay the text that they are written as.

    Raises InputError that names the file (as `what`) when it is missing or malformed.
    """
    if not (str(path).startswith("/dev/") and pathlib.Path(path).is_fifo()):  # a shell's <(...)
        check_file(path, what, LARGEST_YAML)
    with open(path, encoding="utf-8") as file:
        return parse_yaml(file, path, _TextLoader if text else _StrictLoader)


def read_array(path, key):
    """Returns the array of a .npy file, mapped, not read. Raises InputError that names `key`, the setting it is of."""
    try:
        check_file(path)
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy reads the header as Python: damage of it raises nearly anything
        raise InputError(f"{key}={path}: not a .npy array ({error})") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{key}={path}: holds many arrays (.npz), expected one (.npy)")
    return array


def new_array(path, shape, dtype=np.float32):
    """Returns a new mapped array that has its place on the disk. Raises OSError where there is none for it."""
    try:
        with name_os_errors(path):
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


def entries(folder):
    """Returns the names in a folder, but for those that operating systems and file systems put there themselves."""
    return [name for name in os.listdir(folder) if not _OF_SYSTEMS.fullmatch(name)]


def visible(folder, pattern="*"):
    """Returns the files below a folder that match a pattern, sorted; what begins with a dot is skipped, folders too.

    Editors and notebooks put copies of what they open into such places (.ipynb_checkpoints). Raises InputError for a
    folder that may not be read.
    """

    def refuse(error):
        if not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise InputError(f"{error.filename}: cannot be read ({error.strerror})")

    found = []
    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [pathlib.Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.match(pattern) and path.is_file())


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


def has_lone_surrogate(text):
    """Whether a string holds half of a surrogate pair: JSON can write it, but it is no valid text."""
    return not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text)


def require_same_run(place, old, new, remedy):
    """Raises InputError where `place` was written by a run with another record. remedy: what else can be done."""
    if differing := diff(old, new):
        raise InputError(f"{place}: holds another run ({differing}). Repeat its settings to resume it, {remedy}")


def diff(old, new, prefix=""):
    """Returns "key: old -> new, ..." for every leaf in which two nested dicts differ; "" when they are equal."""
    found = []
    for key in sorted(set(old) | set(new)):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            inner = diff(before, after, f"{prefix}{key}.")
            found += [inner] if inner else []
        elif before != after:
            found.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return ", ".join(found)
