"""Predicted times on accelerators that need not be here, from the FLOPs, bytes and links of compiled programs.

    python -m benchmarks.predict [--model qwen3-8b ...] [--topology h100:1 v5e:4x4 ...] [--scan]

Compiles training (queries' pass and step), encoding and decoding by the device's own compiler, and prints for each the
time that its FLOPs, its memory traffic and its collectives need at the data sheet's rates. The prediction is the
largest of the three: a lower bound, because kernels reach neither rate and launches take time. Nothing is run.

FLOPs are counted by lengths (`costs.py`). Memory traffic on GPUs is read from the compiled program: each fusion, custom
call and copy reads its operands and writes its results once; a slice reads what it takes. On TPUs, whose programs do
not say what stays in on-chip memory, it is the weights that are read. --scan: decode by a scan over layers, as a GPU
that has no room for the unrolled loop does.
"""

import argparse
import collections
import re

from llm2vec_gen_jax import config, plan
from llm2vec_gen_jax.collectives import moved_bytes
from llm2vec_gen_jax.costs import GIB, decoding_bytes
from llm2vec_gen_jax.execution import Execution
from llm2vec_gen_jax.sharding import make_mesh
from llm2vec_gen_jax.topologies import compiling_for, described_devices

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota"),
    *("after-all", "partition-id", "replica-id", "optimization-barrier"),
}
_SLICES = ("slice", "dynamic-slice", "gather")


def memory_traffic(hlo):
    """Returns the bytes that a compiled GPU program reads and writes in device memory, loops counted.

    A loop without a known trip count (decoding ends with its texts) counts once.
    """
    computations, entry = _parse(hlo)

    def total(name):
        operations, sum_ = computations[name], 0
        shapes = {operation.name: operation for operation in operations}
        for operation in operations:
            called = {key: re.search(rf"{key}=%?([\w.-]+)", operation.rest) for key in ("body", "calls", "to_apply")}
            if operation.kind == "while":
                trips = _TRIPS.search(operation.rest)
                sum_ += total(called["body"][1]) * (int(trips[1]) if trips else 1)
            elif operation.kind == "call":
                sum_ += total(called["to_apply"][1])
            elif operation.kind not in _FREE and not operation.kind.endswith("-done"):
                inner = computations[called["calls"][1]] if called["calls"] else None
                sum_ += _bytes_of(operation, shapes, inner)
        return sum_

    return total(entry)


Operation = collections.namedtuple("Operation", "name result kind rest root operands size")


def _parse(hlo):
    """Returns ({computation: [Operation]}, name of the entry)."""
    computations, name, entry = {}, None, None
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            computations[name], entry = [], name if start[1] else entry
        elif name and (found := _OPERATION.match(line)):
            root, label, result, kind, rest = found.groups()
            operands = re.findall(r"%([\w.-]+)", _arguments(rest))
            computations[name].append(Operation(label, result, kind, rest, bool(root), operands, _size(result)))
    return computations, entry


def _arguments(rest):
    """What stands before the parenthesis that closes the operands."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:place]
    return rest


def _bytes_of(operation, shapes, inner):
    if operation.kind in _SLICES:
        return 2 * operation.size
    if operation.kind == "dynamic-update-slice":
        return 2 * shapes[operation.operands[1]].size
    read, written = sum(shapes[name].size for name in operation.operands if name in shapes), operation.size
    if inner is None:
        return read + written
    defined = {part.name: part for part in inner}
    users = collections.defaultdict(list)
    for part in inner:
        for name in part.operands:
            users[name].append(part)
    read = 0
    for part in inner:
        if part.kind == "parameter":
            read += _read(part, users)
    root = next(part for part in inner if part.root)
    for part in [root] if root.kind != "tuple" else [defined[name] for name in root.operands]:
        while part.kind == "bitcast":
            part = defined[part.operands[0]]
        if part.kind == "dynamic-update-slice":  # in place
            written -= part.size - defined[part.operands[1]].size
    return read + written


def _read(parameter, users):
    """The bytes of a fusion's parameter that it reads: only the slices where nothing else uses it."""
    uses = users[parameter.name]
    if uses and all(part.kind in _SLICES and part.operands[0] == parameter.name for part in uses):
        return sum(part.size for part in uses)
    if uses and all(part.kind == "dynamic-update-slice" and part.operands[0] == parameter.name for part in uses):
        return 0
    if len(uses) == 1 and uses[0].kind == "bitcast":
        return _read(uses[0], users)
    return parameter.size


def _size(result):
    total = 0
    for dtype, shape in _ARRAY.findall(result):
        width = 1 if dtype == "pred" or dtype.startswith("f8") else int(re.search(r"\d+", dtype)[0]) / 8
        count = 1
        for size in filter(None, shape.split(",")):
            count *= int(size)
        total += width * count
    return total
