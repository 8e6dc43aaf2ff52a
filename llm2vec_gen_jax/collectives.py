"""How many bytes the collectives of a compiled program move, read from its HLO text."""

import collections
import functools
import math
import re

_WIDTHS = {"pred": 1, "token": 0}  # bytes of a number; else its name says how many bits
_ARRAY = re.compile(r"\b(pred|token|bf16|[fsuc]\d+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)|branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r"condition=%?([\w.-]+)")
_LISTED, _TILED = re.compile(r"replica_groups=\{\{([\d,]*)\}"), re.compile(r"replica_groups=\[\d+,(\d+)\]")
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
# Of a result of n bytes on each of p devices: how many bytes each one receives at least.
_MOVED = {
    "all-gather": lambda n, p: n * (p - 1) / p,
    "all-reduce": lambda n, p: 2 * n * (p - 1) / p,
    "reduce-scatter": lambda n, p: n * (p - 1),
    "all-to-all": lambda n, p: n * (p - 1) / p,
    "collective-permute": None,  # what it receives is its result
}


def moved_bytes(hlo):
    """Returns the bytes that a device receives in all collectives of one run of a program, loops counted.

    hlo: compiled.as_text(). A loop is taken to run from 0 to the constant that its condition holds.
    """
    callers = collections.defaultdict(list)  # computation: [(the one that calls it, the loop's condition or None)]
    constants, found, name, entry = collections.Counter(), [], None, None
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            entry = name if start[1] else entry
        elif name and (operation := _OPERATION.match(line)):
            result, kind, rest = operation.groups()
            if kind == "constant" and result.startswith("s32[]"):
                constants[name] = max(constants[name], int(re.match(r"-?\d+", rest)[0]))
            if moved := _moved(kind, result, rest):
                channel = re.search(r"channel_id=(\d+)", rest)
                found.append((channel[1] if channel else line, name, moved))
            condition = _CONDITION.search(rest)
            for group in _CALLED.findall(rest):
                for called in re.findall(r"[\w.-]+", " ".join(group)):
                    callers[called].append((name, condition[1] if condition else None))

    @functools.cache
    def times(computation):
        if computation == entry:
            return 1
        return sum(times(caller) * max(constants[condition], 1) for caller, condition in callers[computation])

    # One collective may be cut into pieces that are fused with what runs beside it, a loop perhaps: they share its
    # channel, and each is printed like the whole. It runs as often as the piece that runs least.
    whole = {}
    for channel, computation, moved in found:
        whole[channel] = min(whole.get(channel, math.inf), moved * times(computation))
    return sum(whole.values())


def _moved(kind, result, rest):
    started = kind.endswith("-start")
    kind = kind.removesuffix("-start")
    if kind not in _MOVED:
        return 0
    arrays = [_size(*array) for array in _ARRAY.findall(result)]
    if kind == "collective-permute":
        return max(arrays)
    size = _group_size(rest)
    if started and kind == "all-gather":
        number = sum(arrays) * size / (size + 1)  # its inputs stand beside its results
    else:
        number = sum(arrays)
    return _MOVED[kind](number, size)


def _group_size(rest):
    """Returns how many devices take part, in any of the notations of replica groups."""
    if found := _LISTED.search(rest):
        return len(found[1].split(","))
    if found := _TILED.search(rest):
        return int(found[1])
    if found := _NAMED.search(rest):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'(\w+)'", found[2]))
    raise ValueError(f"a collective without readable replica groups: {rest[:200]}")


def _size(dtype, shape):
    width = _WIDTHS.get(dtype)
    width = int(re.search(r"\d+", dtype)[0]) / 8 if width is None else width
    return width * math.prod(int(size) for size in shape.split(",") if size)
