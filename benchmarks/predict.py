"""Predicted times on accelerators that are not attached, from FLOPs, memory traffic and communication.

    python -m benchmarks.predict --topology h100:1 --model qwen3-8b [key=value of launch.plan ...]

Compiles training (query pass and step), encoding and decoding with the devices' own compiler, without running
anything. For each program it prints the time that its FLOPs, its memory traffic and its collectives need at the rates
of the data sheet. The prediction is the maximum of the three. It is a lower bound: kernels do not reach these rates,
and launches take time.

FLOPs are computed from lengths (llm2vec_gen_jax/planning/flops.py). Memory traffic on GPUs is derived from the
compiled program: each fusion, library call and copy reads its operands and writes its results once; a slice reads only
its result. TPU programs do not show what stays in on-chip memory, so their traffic is one read of the weights per
pass. If the memory is too small for the unrolled decode loop (for example with XLA_PYTHON_CLIENT_MEM_FRACTION=0.1),
the row for decoding uses a scan over the layers.
"""

import argparse
import collections
import re

import numpy as np

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.parallel.chips import GIB
from llm2vec_gen_jax.parallel.sharding import make_mesh
from llm2vec_gen_jax.planning import plan
from llm2vec_gen_jax.planning import programs as programs_module
from llm2vec_gen_jax.planning.flops import decoding_bytes, layer_weights
from llm2vec_gen_jax.planning.topologies import compiling_for, described_devices

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) \(.*\) -> .* \{$")
_OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|f8\w*|[fsuc]\d+)\[([\d,]*)\]")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "iota"),
    *("after-all", "partition-id", "replica-id", "optimization-barrier"),
}
_SLICES = ("slice", "dynamic-slice", "gather")


def memory_traffic(hlo, decoding=False):
    """Returns the bytes that a compiled GPU program reads and writes in device memory, including all loop iterations.

    decoding: count one iteration of the decode loop, whose trip count is unknown, instead.
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

    if decoding:
        loops = [part for part in computations[entry] if part.kind == "while" and not _TRIPS.search(part.rest)]
        entry = re.search(r"body=%?([\w.-]+)", loops[0].rest)[1]
    return total(entry)


Operation = collections.namedtuple("Operation", "name result kind rest root operands size")


def _parse(hlo):
    """Returns ({computation: [Operation]}, name of the entry computation)."""
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
    """Returns the text before the parenthesis that closes the operands."""
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
    """Returns the bytes read of a parameter of a fusion: only the slices, if it has no other use."""
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


def predict(topology, model, words):
    """Yields rows {program, ms, bound, ...} of one model on one topology. words: settings of launch.plan."""
    shape = f"architecture=configs/architectures/{model}.json"
    settings = options.load(config_lib.PlanConfig, None, [shape, f"topology={topology}", *words])
    devices, chip, _ = described_devices(topology)
    architecture = plan._architecture(settings)
    with compiling_for(devices):
        mesh = make_mesh(settings.mesh, devices)
        remat = "block" if settings.train.remat == "auto" else settings.train.remat
        inputs = programs_module.abstract_inputs(
            settings, architecture, Execution(mesh, settings.kernels.attention, remat)
        )
        programs = programs_module.compile_programs(settings, *inputs)
    B, T, S, count = settings.train.batch_size, settings.query_length, settings.answer_length, len(devices)
    itemsize, shards = programs_module.weight_dtype(settings).itemsize, mesh.shape["tensor"]
    step_flops, encode_flops = programs_module.flops(settings, architecture)
    weights = layer_weights(architecture) * itemsize / shards
    on_gpu = devices[0].platform == "gpu"

    def traffic(*names, passes):
        if on_gpu:
            return sum(memory_traffic(programs[name].compiled.as_text()) for name in names)
        return passes * weights

    training = [name for name in ("prefix", "step") if name in programs]
    rows = {
        "training step": (step_flops, traffic(*training, passes=5), sum(programs[name].moved for name in training)),
        "encoding": (encode_flops, traffic("encode", passes=1), programs["encode"].moved),
    }
    # One token per row, after a prompt of T tokens and half of the answer. Each data-parallel device reads all weights.
    cached = decoding_bytes(architecture, [T + S // 2] * B, 1, itemsize) - decoding_bytes(architecture, [], 1, itemsize)
    read = decoding_bytes(architecture, [], 1, itemsize) / shards + cached / count
    decoded = memory_traffic(programs["generate"].compiled.as_text(), decoding=True) if on_gpu else read
    multiplied = layer_weights(architecture) + architecture.vocab_size * architecture.hidden_size
    rows["decoding, a token"] = (2.0 * multiplied * B, decoded, 0.0)
    for name, (flops, bytes_, moved) in rows.items():
        times = {"compute": flops / count / chip.flops, "memory": bytes_ / chip.bandwidth, "links": moved / chip.link}
        bound = max(times, key=times.get)
        yield {
            "model": model,
            "devices": topology,
            "batch": B,
            "program": name,
            "TFLOP": flops / 1e12,
            "GiB": bytes_ / GIB,
            "links GiB": moved / GIB,
            "ms": 1000 * times[bound],
            "bound": bound,
            "per second": B / times[bound],
        }


def main(argv=None):
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", nargs="+", default=["smollm2-135m", "qwen3-8b"], help="names of files in configs/architectures/"
    )
    parser.add_argument("--topology", nargs="+", default=["h100:1"], help="topologies, as for launch.plan")
    parser.add_argument("settings", nargs="*", help="settings of launch.plan, for example train.batch_size=64")
    arguments = parser.parse_intermixed_args(argv)
    keys = ["model", "devices", "batch", "program", "TFLOP", "GiB", "links GiB", "ms", "bound", "per second"]
    print("| " + " | ".join(keys) + " |\n" + "|---" * len(keys) + "|", flush=True)
    for model in arguments.model:
        for topology in arguments.topology:
            for row in predict(topology, model, arguments.settings):
                print("| " + " | ".join(_cell(row[key]) for key in keys) + " |", flush=True)


def _cell(value):
    return f"{value:,.{max(2 - int(np.log10(max(value, 0.01))), 0)}f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
