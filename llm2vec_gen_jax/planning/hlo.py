"""Bytes moved by the collectives of a compiled program, from its HLO text."""

import collections
import functools
import math
import re
from typing import Any

_WIDTHS = {"pred": 1, "token": 0}  # bytes per number; other types have the number of bits in their names
_ARRAY = re.compile(r"\b(pred|token|bf16|[fsuc]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ASYNC_ENDS = ("-done", "-update")  # the start of the operation is counted
_LISTED, _TILED = re.compile(r"replica_groups=\{\{([\d,]*)\}"), re.compile(r"replica_groups=\[\d+,(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
# Least number of bytes received by each of p devices for a result of n bytes.
_MOVED = {
    "all-gather": lambda n, p: n * (p - 1) / p,
    "all-reduce": lambda n, p: 2 * n * (p - 1) / p,
    "reduce-scatter": lambda n, p: n * (p - 1),
    "all-to-all": lambda n, p: n * (p - 1) / p,
    "collective-permute": None,  # receives its result
}


def moved_bytes(hlo: str) -> float:
    """Returns the bytes that a device receives in all collectives of one run of a program, including loops.

    hlo: compiled.as_text(). Loops without a known trip count are assumed to run from 0 to the constant in their
    condition.
    """
    callers = collections.defaultdict(list)  # computation -> [(its caller, the loop that it belongs to)]
    constants: collections.Counter = collections.Counter()
    collectives: list[tuple[str, str, float]] = []  # (channel, computation, bytes)
    name: Any = None
    entry: Any = None
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            entry = name if start[1] else entry
        elif name and (operation := _OPERATION.match(line)):
            result, kind, rest = operation.groups()
            if kind == "constant" and re.match(r"[su]\d+\[\]", result):
                constants[name] = max(constants[name], int(re.findall(r"^-?\d+", rest)[0]))
            if moved := _moved(kind, result, rest):
                numbers = re.findall(r"channel_id=(\d+)", rest)
                collectives.append((numbers[0] if numbers else line, name, moved))
            condition = _CONDITION.search(rest)
            loop = condition and (condition[1], _TRIPS.search(rest))
            for group in _CALLED.findall(rest if not kind.endswith(_ASYNC_ENDS) else ""):
                for called in re.findall(r"[\w.-]+", " ".join(group)):
                    callers[called].append((name, loop))

    for computation in list(constants):  # the constant of a condition may be in a fused computation
        for caller, _ in callers[computation]:
            constants[caller] = max(constants[caller], constants[computation])

    def trips(loop):
        condition, known = loop
        return int(known[1]) if known else max(constants[condition], 1)

    @functools.cache
    def times(computation):
        if computation == entry:
            return 1
        return sum(times(caller) * (trips(loop) if loop else 1) for caller, loop in callers[computation])

    # A collective may be split into parts that are fused with other operations, some of them in loops. The parts share
    # its channel, and each is printed with the complete shape; the collective runs as often as the least frequent part.
    totals: dict[str, float] = {}
    for channel, computation, moved in collectives:
        totals[channel] = min(totals.get(channel, math.inf), moved * times(computation))
    return sum(totals.values())


def _moved(kind: str, result: str, rest: str) -> float:
    started = kind.endswith("-start")
    kind = kind.removesuffix("-start")
    if kind not in _MOVED:
        return 0
    arrays = [_size(*array) for array in _ARRAY.findall(result) if array != ("u32", "")]  # without the context
    if started and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # inputs precede results
    moved = _MOVED[kind]
    return max(arrays) if moved is None else moved(sum(arrays), _group_size(rest))


def _group_size(rest: str) -> int:
    """Returns the number of devices in a replica group, which has one of three notations."""
    if match := _LISTED.search(rest):
        return len(match[1].split(","))
    if match := _TILED.search(rest):
        return int(match[1])
    if match := _NAMED.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", match[2]))
    raise ValueError(f"unknown notation of replica groups: {rest[:200]}")


def _size(dtype: str, shape: str) -> float:
    bits = re.search(r"\d+", dtype)
    width = int(bits[0]) / 8 if bits else _WIDTHS[dtype]
    return width * math.prod(int(size) for size in shape.split(",") if size)
