"""Reads and writes the files of `torch.save({"state_dict": ..., "config": {...}})` without torch.

Such a file is a zip of a pickle (`data.pkl`) and of one record of raw bytes per tensor (`data/0`, ...).
A pickle is a program; the reader runs only the few instructions and names that tensors need, and refuses all
else.
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
    "PROTO STOP MARK GLOBAL REDUCE BUILD BINPERSID EMPTY_DICT SETITEM SETITEMS EMPTY_LIST APPEND APPENDS"
    " EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 BINUNICODE BININT BININT1 BININT2 LONG1 BINFLOAT NONE NEWTRUE"
    " NEWFALSE BINPUT LONG_BINPUT BINGET LONG_BINGET".split()
)
MAX_PICKLE_BYTES = 1 << 20
ALIGNMENT = 64


class _Rebuild:
    """Stands in for torch._utils._rebuild_tensor_v2. Has no __dict__, so that a pickle cannot alter it."""

    __slots__ = ()

    def __call__(self, storage, offset, size, stride, requires_grad=False, hooks=None, metadata=None):
        where = f"a tensor of size {size}, offset {offset} and stride {stride}"
        if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise pickle.UnpicklingError(f"{where} is malformed")
        count = math.prod(size)
        last = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) if count else -1
        # `count`: a stride of 0 makes a tensor of any size out of one number; no state_dict holds one.
        if max(offset + last + 1, count) > storage.size:
            raise pickle.UnpicklingError(f"{where} leaves its storage of {storage.size}")
        steps = [step * storage.itemsize for step in stride]
        return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


class _Unpickler(pickle.Unpickler):
    """Unpickles `data`, taking the bytes of tensors from `archive`, an open zip, under the folder `root`."""

    def __init__(self, data, archive, root):
        super().__init__(io.BytesIO(data))
        self.archive, self.root, self.records = archive, root, {}

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
        if key not in self.records:
            self.records[key] = self.archive.read(f"{self.root}data/{key}")
        array = np.frombuffer(self.records[key], STORAGES[name])
        if array.size != count:
            raise pickle.UnpicklingError(f"record data/{key} holds {array.size} numbers, expected {count}")
        return array


def _unpickle(archive):
    """Returns the object that an open zip holds."""
    sizes = {info.filename: info.file_size for info in archive.infolist()}
    roots = [name.removesuffix("data.pkl") for name in sizes if name.endswith("/data.pkl")]
    if len(roots) != 1 or sizes[f"{roots[0]}data.pkl"] > MAX_PICKLE_BYTES:
        raise pickle.UnpicklingError(f"it holds no data.pkl of at most {MAX_PICKLE_BYTES} bytes")
    # torch never compresses: with records stored apart, the size of the file bounds the memory needed.
    if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
        raise pickle.UnpicklingError("it holds compressed records")
    if sum(sizes.values()) > os.fstat(archive.fp.fileno()).st_size:
        raise pickle.UnpicklingError("its records overlap")
    byteorder = f"{roots[0]}byteorder"
    if byteorder in sizes and archive.read(byteorder) != b"little":
        raise pickle.UnpicklingError("it was written on a big-endian machine")

    data = archive.read(f"{roots[0]}data.pkl")
    for opcode, argument, _ in pickletools.genops(data):
        if opcode.name not in OPCODES:
            raise pickle.UnpicklingError(f"unexpected pickle instruction {opcode.name}")
        # Unpickling allocates as many slots as the largest number that it is told to store at.
        if opcode.name == "LONG_BINPUT" and argument > len(data):
            raise pickle.UnpicklingError(f"unexpected pickle memo number {argument}")
    return _Unpickler(data, archive, roots[0]).load()


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

    Returns (tensors, config): {name: read-only array in the stored dtype}, and the plain values beside it.
    Raises InputError naming the file when it is damaged, or holds anything but tensors and plain values.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            value = _unpickle(archive)
        if not isinstance(value, dict) or set(value) != {"state_dict", "config"}:
            raise pickle.UnpicklingError("it is not a dict of state_dict and config")
        tensors = _plain_dict(value, "state_dict", np.ndarray)
        return tensors, _plain_dict(value, "config", (str, int, float, type(None)))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except Exception as error:
        # Damaged bytes raise nearly anything inside zipfile and pickle; the answer is the same to all of it.
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: not a readable torch file of tensors ({reason}). Fetch it again") from None


def _program(tensors, config):
    """Returns the `data.pkl` of `write`, made by hand because pickle can name only what it can import."""
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
