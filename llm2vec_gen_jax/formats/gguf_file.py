"""Reads the metadata and memory-maps the tensors of a GGUF file, with bounds checks on every count.

Replaces gguf.GGUFReader, which trusts every count (a file of 57 bytes can keep it busy forever) and makes an array of
each metadata value. Versions 2 and 3, little-endian:

    "GGUF", version u32, number of tensors u64, number of fields u64
    fields:  key, type u32, value         (a string: length u64, UTF-8; an array: type u32, length u64, values)
    tensors: name, number of dimensions u32, dimensions u64, type u32, offset u64
    tensor data, from the next multiple of general.alignment
"""

import math
import os
import struct
from typing import Any, NamedTuple

import gguf
import numpy as np
from gguf.quants import quant_shape_to_byte_shape

_VERSIONS = (2, 3)
_MAX_AXES = 4
_STRING, _ARRAY = 8, 9
_NUMBERS = dict(enumerate("u1 i1 u2 i2 u4 i4 f4 ?".split())) | {10: "u8", 11: "i8", 12: "f8"}
_ARRAYS = {"F32": "f4", "F16": "f2", "F64": "f8", "I8": "i1", "I16": "i2", "I32": "i4", "I64": "i8"}


class Field(NamedTuple):
    """A metadata value: a string, a number, a list of strings or a numeric array (n,)."""

    value: Any

    def contents(self) -> Any:
        """Returns the value as Python types."""
        return self.value.tolist() if isinstance(self.value, np.ndarray | np.generic) else self.value


class Tensor(NamedTuple):
    """shape: as in the file, last axis first. data: memory-mapped rows; for quantized types, the bytes of each row."""

    name: str
    shape: tuple[int, ...]
    tensor_type: gguf.GGMLQuantizationType
    data: np.ndarray


class GGUFFile:
    """fields: {key: Field}. tensors: in file order. data_offset: start of the tensor data.

    Raises ValueError for an invalid or truncated file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._data = np.memmap(path, np.uint8, "r")
        self._view, self._offset = self._data.data, 0
        if bytes(self._take(4)) != b"GGUF":
            raise ValueError("the file does not start with GGUF")
        if (version := self._number("u4")) not in _VERSIONS:
            raise ValueError(f"version {version} is not supported")
        tensors, fields = self._number("u8"), self._number("u8")
        self.fields: dict[str, Field] = {}
        for _ in range(self._fits(fields, 8 + 4 + 1)):
            key = self._string()
            if key in self.fields:
                raise ValueError(f"duplicate key {key}")
            self.fields[key] = Field(self._value(self._number("u4")))
        infos = [self._tensor_info() for _ in range(self._fits(tensors, 8 + 4 + 4 + 8))]
        alignment = self.fields.get("general.alignment", Field(gguf.GGUF_DEFAULT_ALIGNMENT)).contents()
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise ValueError("general.alignment is not a power of two")
        self.data_offset = -(-self._offset // alignment) * alignment
        self.tensors = [self._tensor(*info) for info in infos]
        if len({tensor.name for tensor in self.tensors}) != len(self.tensors):
            raise ValueError("duplicate tensor name")

    def _fits(self, count, least):
        """Returns `count` if as many items of at least `least` bytes each fit into the rest of the file."""
        if count * least > len(self._view) - self._offset:
            raise ValueError(f"the file is truncated: {count} items of at least {least} bytes do not fit")
        return count

    def _take(self, size):
        start, self._offset = self._offset, self._offset + self._fits(size, 1)
        return self._view[start : self._offset]

    def _numbers(self, kind, count):
        dtype = np.dtype(f"<{kind}")
        return np.frombuffer(self._take(self._fits(count, dtype.itemsize) * dtype.itemsize), dtype)

    def _number(self, kind):
        return self._numbers(kind, 1)[0].item()

    def _string(self):
        return str(self._take(self._number("u8")), "utf-8")

    def _strings(self, count):
        strings, offset, end = [], self._offset, len(self._view)
        for _ in range(self._fits(count, 8)):
            start = offset + 8
            offset = start + struct.unpack_from("<Q", self._view, offset)[0]
            if offset > end:
                raise ValueError("the file is truncated in a string")
            strings.append(str(self._view[start:offset], "utf-8"))
        self._offset = offset
        return strings

    def _value(self, kind):
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            kind, count = self._number("u4"), self._number("u8")
            if kind == _STRING:
                return self._strings(count)
            if kind in _NUMBERS:
                return self._numbers(_NUMBERS[kind], count)
        elif kind in _NUMBERS:
            return self._numbers(_NUMBERS[kind], 1)[0]
        raise ValueError(f"values of type {kind} are not supported")

    def _tensor_info(self):
        """Returns (name, shape, type, offset from data_offset)."""
        name, axes = self._string(), self._number("u4")
        if axes > _MAX_AXES:
            raise ValueError(f"tensor {name} has {axes} dimensions")
        shape = tuple(self._numbers("u8", axes).tolist())
        return name, shape, gguf.GGMLQuantizationType(self._number("u4")), self._number("u8")

    def _tensor(self, name, shape, kind, offset):
        rows, dtype = shape[::-1], _ARRAYS.get(kind.name, "u1")
        if kind.name not in _ARRAYS:
            rows = quant_shape_to_byte_shape(rows, kind)
        start = self.data_offset + offset
        end = start + math.prod(rows) * np.dtype(dtype).itemsize
        if end > len(self._data):
            raise ValueError(f"the file is truncated in tensor {name}")
        return Tensor(name, shape, kind, self._data[start:end].view(f"<{dtype}").reshape(rows))
