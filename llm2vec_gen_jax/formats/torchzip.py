"""Reads and writes the files of `torch.save({"state_dict": ..., "config": {...}})` without torch.

Such a file is a zip archive of a pickle (`data.pkl`) and one record of raw bytes per tensor (`data/0`, ...).
A pickle is a program. The reader interprets only the opcodes and names that tensors need and rejects all others.
"""

import dataclasses
import math
import os
import pickle
import pickletools
import struct
import zipfile
from collections.abc import Mapping
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from llm2vec_gen_jax.common.errors import InputError, one_line

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
}
MAX_PICKLE_BYTES = 1 << 20
MAX_AXES = 8
ALIGNMENT = 64
_ZIP_HEADER_BYTES = 30  # of a record, before its name
_VALUE_OPCODES = frozenset("NONE NEWTRUE NEWFALSE BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT".split())
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_ORDERED_DICT, _REBUILD = "collections OrderedDict", "torch._utils _rebuild_tensor_v2"


@dataclasses.dataclass(frozen=True)
class _Name:
    """A known class or function that a pickle refers to. It is never called."""

    name: str


def _reject(reason: str) -> NoReturn:
    raise pickle.UnpicklingError(reason)


def _rebuild(storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
    """torch._utils._rebuild_tensor_v2 with numpy."""
    if not isinstance(storage, np.ndarray) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        _reject("a tensor is malformed")
    if len(size) != len(stride) or len(size) > MAX_AXES:
        _reject(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    if not all(type(n) is int and 0 <= n < 2**63 for n in (offset, *size, *stride)):
        _reject("a tensor has an invalid size, offset or stride")
    count = math.prod(size)
    last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
    # `count`: a stride of 0 would make a tensor of any size from one value.
    if max(offset + last + 1, count) > storage.size:
        _reject(f"a tensor of size {size}, offset {offset} and stride {stride} exceeds its storage of {storage.size}")
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _tuple(items):
    """Returns a tuple. Nested tuples may contain only integers (sizes): deeper ones could take forever to compare."""
    for item in items:
        if type(item) is tuple and not all(type(number) is int for number in item):
            _reject("nested tuples are not supported")
    return tuple(items)


def _set_items(target, items):
    if not isinstance(target, dict) or len(items) % 2 or not all(type(key) is str for key in items[::2]):
        _reject("the keys of a dict are not strings")
    target.update(zip(items[::2], items[1::2], strict=True))


class _Storages:
    """The tensor records in an open zip archive, under the folder `root`."""

    def __init__(self, archive, root):
        self.archive, self.root, self.records = archive, root, {}

    def read(self, pid):
        """Returns the values (n,) of the persistent id ("storage", class, key, device, n)."""
        if type(pid) is not tuple or len(pid) != 5 or pid[0] != "storage" or not isinstance(pid[1], _Name):
            _reject("a persistent id is not a storage")
        _, kind, key, _, count = pid
        if kind.name not in STORAGES or type(key) is not str or type(count) is not int:
            _reject("a storage has an unknown type")
        if key not in self.records:
            self.records[key] = self.archive.read(f"{self.root}data/{key}")
        array = np.frombuffer(self.records[key], STORAGES[kind.name])
        if array.size != count:
            _reject(f"record data/{key} has {array.size} values, expected {count}")
        return array


def _load(data, storages):
    """Returns the value of a pickle: dicts, tuples, plain values and arrays.

    Not `pickle.load`: each opcode is checked before it has an effect. Nothing is called and no attribute is set.
    """
    stack, marks, memo = [], [], {}

    def pop_mark():
        mark = marks.pop()
        items = stack[mark:]
        del stack[mark:]
        return items

    for opcode, argument, _ in pickletools.genops(data):
        match opcode.name:
            case "PROTO":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                marks.append(len(stack))
            case name if name in _VALUE_OPCODES:
                stack.append(_CONSTANTS.get(name, argument))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(_tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3" as name:
                marks.append(len(stack) - int(name[-1]))
                stack.append(_tuple(pop_mark()))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = pop_mark()
                _set_items(stack[-1], items)
            case "GLOBAL":
                known = argument in (_ORDERED_DICT, _REBUILD) or argument.removeprefix("torch ") in STORAGES
                if not known:
                    _reject(f"it refers to {argument.replace(' ', '.')}, which is not allowed")
                stack.append(_Name(argument.removeprefix("torch ")))
            case "BINPERSID":
                stack.append(storages.read(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                called = function.name if isinstance(function, _Name) and type(arguments) is tuple else None
                if called == _REBUILD:
                    stack.append(_rebuild(*arguments))
                elif called == _ORDERED_DICT and not arguments:
                    stack.append({})
                else:
                    _reject("unexpected function call")
            case "BUILD":  # attributes of an OrderedDict: the _metadata of a state_dict
                if not isinstance(stack.pop(), dict) or not isinstance(stack[-1], dict):
                    _reject("attributes are set on an object that is not a dict")
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case name:
                _reject(f"unexpected pickle opcode {name}")


def _unpickle(archive):
    """Returns the object in an open zip archive."""
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in sizes if name.endswith("/data.pkl")]
    if len(roots) != 1 or sizes[f"{roots[0]}data.pkl"] > MAX_PICKLE_BYTES:
        _reject(f"no data.pkl of at most {MAX_PICKLE_BYTES} bytes")
    # torch never compresses: uncompressed records that do not overlap bound the memory by the size of the file.
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        _reject("records are compressed")
    if sum(info.file_size for info in archive.infolist()) > os.fstat(archive.fp.fileno()).st_size:
        _reject("records overlap")
    byteorder = f"{roots[0]}byteorder"
    if byteorder in sizes and archive.read(byteorder) != b"little":
        _reject("big-endian files are not supported")
    return _load(archive.read(f"{roots[0]}data.pkl"), _Storages(archive, roots[0]))


def _plain_dict(value, field, kinds):
    """Returns value[field] after a check that it is a dict with values of `kinds`."""
    if not isinstance(value[field], dict):
        _reject(f"{field} is not a dict")
    for name, item in value[field].items():
        if not isinstance(item, kinds):
            _reject(f"{field} has an unexpected {type(item).__name__} at {name[:100]!r}")
    return value[field]


def read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Reads a file of tensors without executing code from it.

    Returns (tensors, config): {name: read-only array in the stored dtype} and {name: plain value}.
    Raises InputError naming the file if it is damaged or contains anything but tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            value = _unpickle(archive)
        if not isinstance(value, dict) or set(value) != {"state_dict", "config"}:
            _reject("it is not a dict with state_dict and config")
        tensors = _plain_dict(value, "state_dict", np.ndarray)
        return tensors, _plain_dict(value, "config", (str, int, float, type(None)))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        # Damaged files raise nearly any exception in zipfile and pickletools.
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise InputError(f"{path}: not a readable torch file of tensors ({reason}). Download it again") from None


def _program(tensors, config):
    """Returns the `data.pkl` of `write`. Built by hand: pickle can refer only to names that it can import."""
    dtypes = {dtype: name.encode() for name, dtype in STORAGES.items()}
    ordered_dict = b"ccollections\nOrderedDict\n)R"

    def plain(*values):
        # ints, strings, bools and tuples of ints, each pickled separately, without header and STOP.
        return b"".join(pickle.dumps(value, 2)[2:-1] for value in values)

    items = b""
    for number, (name, array) in enumerate(tensors.items()):
        strides = tuple(math.prod(array.shape[axis + 1 :]) for axis in range(array.ndim))
        storage_class = b"ctorch\n" + dtypes[array.dtype] + b"\n"
        storage = b"(" + plain("storage") + storage_class + plain(str(number), "cpu", array.size) + b"tQ"
        arguments = storage + plain(0, array.shape, strides, False) + ordered_dict
        items += plain(name) + b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"tR"
    fields = b"".join(plain(name, value) for name, value in config.items())
    state_dict = plain("state_dict") + ordered_dict + b"(" + items + b"u"
    return b"\x80\x02}(" + state_dict + plain("config") + b"}(" + fields + b"uu."


def write(path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], config: Mapping[str, int | str]) -> None:
    """Writes `tensors` {name: float32, float16, bfloat16 or float64 array} and `config` {name: int or str}.

    The bytes are deterministic. `torch.load(path, weights_only=True)` returns {"state_dict", "config"}.
    """
    records = {"data.pkl": _program(tensors, config), "byteorder": b"little"}
    records |= {f"data/{number}": array.tobytes() for number, array in enumerate(tensors.values())}
    records["version"] = b"3\n"
    with open(path, "wb") as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            info = zipfile.ZipInfo(f"{os.path.basename(path)}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            # Records start at multiples of 64 bytes, as in files of torch; a zip extra field is the padding.
            start = file.tell() + _ZIP_HEADER_BYTES + len(info.filename.encode()) + 4
            padding = -start % ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            archive.writestr(info, data)
