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
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_ENDS = ("-done", "-update")  # of what was started, and is counted, elsewhere
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

    hlo: compiled.as_text(). Where the compiler does not say how often a loop runs, it is taken to run from 0 to the
    constant that its condition holds.
    """
    callers = collections.defaultdict(list)  # computation: [(the one that calls it, the loop that it is part of)]
    constants, found, name, entry = collections.Counter(), [], None, None
    for line in hlo.splitlines():
        if start := _COMPUTATION.match(line):
            name = start[2]
            entry = name if start[1] else entry
        elif name and (operation := _OPERATION.match(line)):
            result, kind, rest = operation.groups()
            if kind == "constant" and re.match(r"[su]\d+\[\]", result):
                constants[name] = max(constants[name], int(re.match(r"-?\d+", rest)[0]))
            if moved := _moved(kind, result, rest):
                channel = re.search(r"channel_id=(\d+)", rest)
                found.append((channel[1] if channel else line, name, moved))
            loop = _CONDITION.search(rest) and (_CONDITION.search(rest)[1], _TRIPS.search(rest))
            for group in _CALLED.findall(rest if not kind.endswith(_ENDS) else ""):
                for called in re.findall(r"[\w.-]+", " ".join(group)):
                    callers[called].append((name, loop))

    for computation in list(constants):  # a condition may hold its constant in a fused computation
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
    arrays = [_size(*array) for array in _ARRAY.findall(result) if array != ("u32", "")]  # those are its context
    if started and kind != "all-reduce":
        arrays = arrays[len(arrays) // 2 :]  # its inputs stand before its results
    if kind == "collective-permute":
        return max(arrays)
    return _MOVED[kind](sum(arrays), _group_size(rest))


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
