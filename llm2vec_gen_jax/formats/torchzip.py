"""Reads and writes the files of `torch.save({"state_dict": ..., "config": {...}})` without torch.

Such a file is a zip of a pickle (`data.pkl`) and one record of raw bytes per storage (`data/0`, `data/1`, ...).
A pickle is a program; the reader here runs only the handful of instructions and names that a dict of tensors
needs, and refuses the file otherwise.
"""

import collections
import io
import math
import os
import pickle
import pickletools
import struct
import zipfile

import ml_dtypes
import numpy as np

from llm2vec_gen_jax.errors import InputError

STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "DoubleStorage": np.dtype(np.float64),
}
OPCODES = frozenset(
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS EMPTY_TUPLE"
    " TUPLE TUPLE1 TUPLE2 TUPLE3 BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT NONE NEWTRUE NEWFALSE BINPUT"
    " LONG_BINPUT BINGET LONG_BINGET".split()
)
MAX_PICKLE_BYTES = 1 << 20
ALIGNMENT = 64


class _Rebuild:
    """Stands in for torch._utils._rebuild_tensor_v2. Without a __dict__, so that a pickle cannot alter it."""

    __slots__ = ()

    def __call__(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
        if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError(f"a tensor of size {size} has offset {offset} and stride {stride}")
        count = math.prod(size)
        end = offset + (1 + sum((n - 1) * step for n, step in zip(size, stride)) if count else 0)
        # `count`: a stride of 0 could ask for any amount of memory, and state_dict() never holds such a tensor.
        if max(end, count) > storage.size:
            raise pickle.UnpicklingError(
                f"a tensor of size {size}, offset {offset} and stride {stride} leaves its storage of {storage.size}"
            )
        steps = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, steps).copy()


class _Unpickler(pickle.Unpickler):
    """Unpickles `data.pkl`; `storage(key, dtype)` returns the flat array of one record."""

    def __init__(self, data, storage):
        super().__init__(io.BytesIO(data))
        self.storage = storage

    def find_class(self, module, name):
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _Rebuild()
        if (module, name) == ("collections", "OrderedDict"):
            return collections.OrderedDict
        if module == "torch" and name in STORAGES:
            # The name, not the dtype: BUILD could call the __setstate__ of a dtype that all of numpy shares.
            return name
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no dict of tensors needs")

    def persistent_load(self, pid):
        kind, name, key, _, count = pid
        if kind != "storage" or name not in STORAGES:
            raise pickle.UnpicklingError(f"unexpected record {kind!r} of {name!r}")
        array = self.storage(key, STORAGES[name])
        if array.size != count:
            raise pickle.UnpicklingError(f"record data/{key} holds {array.size} numbers, expected {count}")
        return array


def _unpickle(archive):
    """Returns the object that an open zip holds."""
    infos = {info.filename: info for info in archive.infolist()}
    roots = [
        name.removesuffix("data.pkl") for name in infos if name.count("/") == 1 and name.endswith("/data.pkl")
    ]
    if len(roots) != 1:
        raise pickle.UnpicklingError("it has no data.pkl")
    root = roots[0]
    # torch never compresses: with stored records that do not overlap, the file's size bounds the memory needed.
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos.values()):
        raise pickle.UnpicklingError("it holds compressed records")
    if sum(info.file_size for info in infos.values()) > os.fstat(archive.fp.fileno()).st_size:
        raise pickle.UnpicklingError("its records overlap")
    if f"{root}byteorder" in infos and archive.read(f"{root}byteorder") != b"little":
        raise pickle.UnpicklingError("it was written on a big-endian machine")
    if infos[f"{root}data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError(f"data.pkl is larger than {MAX_PICKLE_BYTES} bytes")

    data = archive.read(f"{root}data.pkl")
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"unexpected pickle instruction {opcode.name}")
        # Unpickling allocates as many slots as the largest number that it is told to store at.
        if opcode.name == "LONG_BINPUT" and argument > len(data):
            raise pickle.UnpicklingError(f"unexpected pickle memo number {argument}")

    records = {}

    def storage(key, dtype):
        name = f"{root}data/{key}"
        if name not in infos:
            raise pickle.UnpicklingError(f"record data/{key} is missing")
        if name not in records:
            records[name] = archive.read(name)
        return np.frombuffer(records[name], dtype)

    return _Unpickler(data, storage).load()


def _plain_dict(value, field, kinds):
    """Returns a copy of value[field], a dict from str to `kinds`."""
    # dict.items: the pickle may have given an OrderedDict attributes, "items" among them.
    items = list(dict.items(value[field]))
    for name, item in items:
        if not isinstance(name, str) or not isinstance(item, kinds):
            raise pickle.UnpicklingError(f"{field} holds an unexpected {type(item).__name__} at {name!r}")
    return dict(items)


def read(path):
    """Reads a file of tensors, executing nothing.

    Returns (tensors, config): {name: array in the stored dtype}, and the dict of plain values beside it.
    Raises InputError naming the file when it is damaged, or holds anything but tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            value = _unpickle(archive)
        if not isinstance(value, dict) or set(value) != {"state_dict", "config"}:
            found = sorted(map(str, value)) if isinstance(value, dict) else type(value).__name__
            raise pickle.UnpicklingError(f"expected a dict of state_dict and config, found {found}")
        tensors = _plain_dict(value, "state_dict", np.ndarray)
        return tensors, _plain_dict(value, "config", (str, int, float, type(None)))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        # Damaged bytes can raise nearly anything inside zipfile and pickle; the answer is the same to all of it.
        reason = str(error) or type(error).__name__
        raise InputError(
            f"{path}: not a readable torch file of tensors: {reason}. Fetch or export it again"
        ) from None


def _program(tensors, config):
    """Returns the `data.pkl` of `write`, assembled by hand because pickle can name only what it can import."""
    dtypes = {dtype: name.encode() for name, dtype in STORAGES.items()}
    ordered_dict = b"ccollections\nOrderedDict\n)R"

    def plain(*values):
        # ints, strings, bools and tuples of ints: each pickled alone, without the header and the end mark.
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


def write(path, tensors, config):
    """Writes `tensors` {name: float32, float16, bfloat16 or float64 array} and `config` {name: int or str}.

    Equal input gives equal bytes. `torch.load(path, weights_only=True)` returns {"state_dict", "config"}.
    """
    records = {"data.pkl": _program(tensors, config), "byteorder": b"little"}
    records |= {f"data/{number}": array.tobytes() for number, array in enumerate(tensors.values())}
    records["version"] = b"3\n"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, data in records.items():
            info = zipfile.ZipInfo(f"{os.path.basename(path)}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            # Payloads start at multiples of 64 bytes, as in torch's own files: padded by a zip extra field.
            start = archive.fp.tell() + zipfile.sizeFileHeader + len(info.filename.encode()) + 4
            padding = -start % ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            archive.writestr(info, data)
