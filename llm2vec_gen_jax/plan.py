"""What training and encoding cost on devices that need not be here: compiled for them, never run."""

import ctypes
import dataclasses
import functools
import json
import pathlib
import re
import threading
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax import architecture as architecture_lib
from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax import loading, memory, optim, options, quantization, sharding
from llm2vec_gen_jax.backbone import Backbone, abstract_params
from llm2vec_gen_jax.collectives import moved_bytes
from llm2vec_gen_jax.costs import GIB, chip_of, reading_flops, training_flops
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.execution import REMAT, Execution
from llm2vec_gen_jax.files import read_json, shipped
from llm2vec_gen_jax.generate import Sampling, continue_prompts, unrolls
from llm2vec_gen_jax.model import Model, Packed
from llm2vec_gen_jax.topologies import ESTIMATE, compiling_for, described_devices, install_hint, is_described
from llm2vec_gen_jax.train import abstract_cache, jit_prefix, jit_step
from llm2vec_gen_jax.trainer import new_state


@dataclasses.dataclass
class Program:
    """A compiled program. arguments, beside: bytes per device, of what it is given and of all that it makes (what is
    donated counts once); moved: bytes that a device receives from others."""

    compiled: Any
    arguments: int
    beside: int
    moved: float

    @property
    def peak(self):
        """Bytes per device while it runs."""
        return self.arguments + self.beside


def plan(config):
    """Prints, and returns as dicts, a row for each mesh and remat policy of a PlanConfig that was compiled."""
    options.require(config)
    architecture = _architecture(config)
    devices, chip, compiler = _devices(config.topology)
    if config.measure and is_described(devices[0]):
        raise InputError(
            f"topology={config.topology}: measure=true runs programs, on devices that are here; leave it out"
        )
    if config.backbone.dtype == "auto" and is_described(devices[0]):
        backbone = dataclasses.replace(config.backbone, dtype=loading.default_dtype(devices[0]))
        config = dataclasses.replace(config, backbone=backbone)
    with compiling_for(devices):
        return _plan(config, architecture, devices, chip, compiler)


def _plan(config, architecture, devices, chip, compiler):
    policies = REMAT[1:] if config.train.remat == "auto" else (config.train.remat,)
    limit = memory.limit(sharding.make_mesh(config_lib.MeshConfig(), devices), chip)
    if config.search:
        meshes = _candidates(config, architecture, len(devices), limit)
    else:  # where there is no limit, the policy that training takes
        meshes = [(config.mesh, remat) for remat in (policies if chip else policies[:1])]
    where = config.topology or f"{len(devices)} x {devices[0].device_kind}"
    B, T, S = config.train.batch_size, config.query_length, config.answer_length
    print(
        f"{architecture.num_parameters / 1e9:.2f} B parameters, {_dtype(config).name}; {where}; "
        f"batch {B}, queries of {T} and answers of {S} tokens\n{_about(compiler, limit, devices[0].platform)}\n\n"
        f"per device, GiB:\n{'mesh (data, fsdp, tensor), remat':<34}"
        f"{'weights':>8}{'state':>7}{'train':>8}{'encode':>8}{'generate':>10}"
        "   a training step: FLOPs, bytes moved, at least; compiler",
        flush=True,
    )
    rows = []
    for mesh_config, remat in meshes:
        mesh = sharding.make_mesh(mesh_config, devices)
        execution = Execution(mesh, config.kernels.attention, remat)
        execution.check(architecture.head_dim, quantization.product_dtype(_dtype(config)))
        row = _row(config, architecture, execution, chip, {"devices": where, "compiler": compiler})
        if compiler == ESTIMATE and row["fits"] is not None:
            # cuDNN's attention cannot be asked for where there is none.
            _lower_for_cuda(config, architecture, Execution(mesh, "xla", remat, platform="gpu"))
        rows.append(row)
        print(_line(row), flush=True)
        if config.measure:
            _measure(config, architecture, execution)
        if config.output:
            with open(config.output, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        if row["fits"] and len(meshes) > 1:
            size = mesh.shape
            print(
                f"\nuse: mesh.data={size['data']} mesh.fsdp={size['fsdp']} mesh.tensor={size['tensor']} "
                f"train.remat={remat}"
            )
            break
    else:
        if len(meshes) > 1:
            print("\nnothing that was tried fits: more devices, a smaller batch, or shorter texts are needed")
    return rows


def _about(compiler, limit, platform):
    """Returns lines that say which compiler the figures come from, and what "fits" means."""
    text = f"compiled by {compiler}"
    if compiler == ESTIMATE:
        text += f", whose programs need more memory than a GPU's; for the GPU's own compiler: {install_hint()}"
    if limit:
        text += f"\nfits: below {limit / GIB:.2f} GiB a device, 92 % of what JAX may take"
        if platform == "gpu" or compiler == ESTIMATE:
            text += f", {memory.pool_share():.0%} of its memory by XLA_PYTHON_CLIENT_MEM_FRACTION"
    return text


def _architecture(config):
    if config.architecture:
        return architecture_lib.from_hf_config(read_json(shipped(config.architecture)), config.architecture)
    return loading.open_backbone(config.backbone.path, Execution())[0].architecture


def _dtype(config):
    """The dtype of most weights."""
    name = config.backbone.dtype
    return jnp.dtype("bfloat16" if name == "auto" and config.topology else loading.resolve_dtype(name))


def _devices(topology):
    """Returns (devices, their Chip or None, name of the compiler) of a topology setting."""
    if topology:
        return described_devices(topology)
    devices = jax.devices()
    return devices, chip_of(devices[0].device_kind), f"XLA:{devices[0].platform.upper()}"


def _candidates(config, architecture, count, limit):
    """Returns [(MeshConfig, remat)] to try: as few pieces of the weights as can fit, the rest of the devices to data.

    The backbone is frozen, so data parallel costs no more than a sum of small gradients.
    """
    weights = architecture.num_parameters * _dtype(config).itemsize
    found = []
    for pieces in (pieces for pieces in range(1, count + 1) if count % pieces == 0):
        for tensor in (tensor for tensor in (1, 2, 4, 8) if pieces % tensor == 0):
            fsdp, data = pieces // tensor, count // pieces
            divides = config.train.batch_size % (data * fsdp) == 0 and architecture.num_kv_heads % tensor == 0
            if divides and (limit is None or weights / pieces < limit):
                found += [(config_lib.MeshConfig(data, fsdp, tensor), remat) for remat in REMAT[1:]]
    if not found:
        raise InputError(f"train.batch_size={config.train.batch_size}: no mesh of {count} devices divides it and fits")
    return found


def _inputs(config, architecture, execution):
    """Returns (Model, abstract arguments by name) of everything that runs."""
    mesh = execution.mesh
    a, B, T, S = architecture, config.train.batch_size, config.query_length, config.answer_length
    scale = config.lora.alpha / config.lora.rank if config.lora.rank else 0.0
    compression = config.compression
    model = Model(
        a, compression.num_tokens, compression.num_thought_tokens, a.hidden_size, config.lora.rank, scale, execution
    )
    if B % sharding.batch_shards(mesh):
        raise InputError(f"train.batch_size={B} does not divide over {sharding.batch_shards(mesh)} data shards")

    def rows(dtype, *shape):
        return jax.ShapeDtypeStruct((B, *shape), dtype, sharding=sharding.batch_sharding(mesh))

    def whole(tree):
        put = sharding.replicated(mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put), tree)

    boxed, quantized = abstract_params(a), _dtype(config) == jnp.int8
    frozen = jax.tree.map(
        lambda x, put: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16 if quantized else _dtype(config), sharding=put),
        nn.unbox(boxed),
        sharding.param_shardings(boxed, mesh),
    )
    frozen = quantization.describe(frozen) if quantized else frozen
    trainable = jax.eval_shape(model.init, jax.random.key(0), frozen)
    optimizer = optim.make_optimizer(config.optimizer)
    batch = {
        "query_lengths": rows(jnp.int32),
        "answer": rows(jnp.int32, S),
        "answer_lengths": rows(jnp.int32),
        "target": rows(jnp.float32, a.hidden_size),
    }
    ids = rows(jnp.int32, T)
    return model, {
        "frozen": frozen,
        "trainable": whole(trainable),
        "state": whole(jax.eval_shape(functools.partial(new_state, optimizer=optimizer), trainable)),
        "ids": ids,
        "batch": batch | ({"query": ids} if config.lora.rank else {}),
        "packed": Packed(ids, ids, ids, rows(jnp.int32, max(T // model.num_appended, 1))),
    }


def _jitted(config, model, frozen):
    """Returns the jitted functions by name, new ones: what was traced for one platform is not taken for another."""
    backbone = Backbone(model.architecture, model.execution)
    unroll = unrolls(backbone, frozen, config.train.batch_size, config.query_length + config.answer_length)
    sampling, options = Sampling(config.answer_length), model.execution.compiler_options
    return {
        "prefix": jit_prefix(model, config.query_length),
        "step": jit_step(config, model),
        "encode": jax.jit(functools.partial(model.encode_packed, soft_prompts=False), compiler_options=options),
        "generate": jax.jit(
            functools.partial(continue_prompts, backbone, sampling, (0,), unroll), compiler_options=options
        ),
    }


def _compile(config, model, inputs):
    """Returns the Programs by name: the prefix (none with a LoRA), the step, the encoding pass, a generated batch."""
    functions, programs = _jitted(config, model, inputs["frozen"]), {}

    def compile_one(name, *arguments):
        compiled = functions[name].lower(*arguments).compile()
        programs[name] = Program(compiled, *memory.taken(compiled), moved_bytes(compiled.as_text()))

    for name, arguments in _arguments(config, functions, inputs, model.execution.mesh).items():
        compile_one(name, *arguments)
    return programs


def _arguments(config, functions, inputs, mesh):
    """Returns the abstract arguments of each function that runs, by name."""
    frozen, arguments, cache = inputs["frozen"], {}, None
    if not config.lora.rank:
        arguments["prefix"] = frozen, inputs["ids"]
        cache = abstract_cache(functions["prefix"], mesh, *arguments["prefix"])
    arguments["step"] = inputs["state"], frozen, cache, inputs["batch"]
    arguments["encode"] = inputs["trainable"], frozen, inputs["packed"]
    lengths, seed = inputs["batch"]["query_lengths"], jax.ShapeDtypeStruct((), jnp.uint32)
    arguments["generate"] = frozen, inputs["ids"], lengths, lengths, seed
    return arguments


def _lower_for_cuda(config, architecture, execution):
    """Raises where something cannot be lowered for NVIDIA's GPUs."""
    model, inputs = _inputs(config, architecture, execution)
    functions = _jitted(config, model, inputs["frozen"])
    for name, arguments in _arguments(config, functions, inputs, execution.mesh).items():
        jax.export.export(functions[name], platforms=["cuda"])(*arguments)


def flops(config, architecture):
    """Returns the FLOPs of (a training step, an encoding pass), on full rows of the longest texts."""
    B, compression = config.train.batch_size, config.compression
    queries, answers = [config.query_length] * B, [config.answer_length] * B
    return (
        training_flops(
            architecture,
            queries,
            answers,
            compression.num_tokens,
            compression.num_thought_tokens,
            bool(config.lora.rank),
        ),
        reading_flops(architecture, queries),
    )


def _row(config, architecture, execution, chip, head):
    """Returns what a mesh and a remat policy cost, as a JSON-like dict; bytes are per device.

    head: what the rows of a plan have in common. limit: what training may take; compiled_flops: null where the compiler
    does not count.
    """
    started, mesh = time.perf_counter(), execution.mesh
    model, inputs = _inputs(config, architecture, execution)
    limit = memory.limit(mesh, chip)
    row = head | {"mesh": dict(mesh.shape), "remat": execution.remat, "fits": None, "limit": limit}
    row |= {"weights": memory.bytes_per_device(inputs["frozen"]), "state": memory.bytes_per_device(inputs["state"])}
    try:
        programs = _compile(config, model, inputs)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"fits": False, "reason": str(error).strip().splitlines()[0][:200]}
    training = [programs[name] for name in ("prefix", "step") if name in programs]
    row["train"] = programs["step"].peak
    if "prefix" in programs:  # which runs beside the state
        row["train"] = max(row["train"], programs["prefix"].peak + row["state"])
    row["encode"], row["generate"] = programs["encode"].peak, programs["generate"].peak
    row["moved"], row["encode_moved"] = sum(program.moved for program in training), programs["encode"].moved
    row["flops"], row["encode_flops"] = flops(config, architecture)
    analyses = [program.compiled.cost_analysis() for program in training]  # the GPU compiler has none
    row["compiled_flops"] = sum(found["flops"] for found in analyses) if all(analyses) else None
    row["seconds_to_compile"] = round(time.perf_counter() - started, 1)
    if limit:
        row["fits"] = max(row["train"], row["encode"]) < limit
    if chip:
        count = mesh.devices.size
        # A device reads all of its tensor shard's weights in each of five passes, whoever keeps them.
        read = 5 * architecture.num_parameters * _dtype(config).itemsize / mesh.shape["tensor"]
        row["bounds"] = {
            "compute": row["flops"] / count / chip.flops,
            "memory": read / chip.bandwidth,
            "links": row["moved"] / chip.link,
        }
    return row


def _line(row):
    size = row["mesh"]
    text = f"{size['data']:>4} x{size['fsdp']:>4} x{size['tensor']:>3}  {row['remat']:<16}"
    text += f"{row['weights'] / GIB:>11.2f}{row['state'] / GIB:>7.2f}"
    if "train" not in row:
        return f"{text}   does not fit: {row['reason']}"
    text += f"{row['train'] / GIB:>8.2f}{row['encode'] / GIB:>8.2f}{row['generate'] / GIB:>10.2f}   "
    text += f"{row['flops'] / 1e12:,.1f} T, "
    text += f"{row['moved'] / GIB:.2f} GiB"
    if "bounds" in row:
        bounds = row["bounds"]
        text += f", {max(bounds.values()):.3f} s (" + ", ".join(f"{k} {v:.3f}" for k, v in bounds.items()) + ")"
    return f"{text}; {row['compiler']}" + ("" if row["fits"] is not False else "   does not fit")


def _measure(config, architecture, execution):
    """Runs everything once on random weights; prints the peak of memory beside the arguments, and the estimate."""
    model, inputs = _inputs(config, architecture, execution)
    programs = _compile(config, model, inputs)

    def fill(x):
        value = 1 if x.dtype == jnp.int32 else 0.01
        return jax.jit(lambda: jnp.full(x.shape, value, x.dtype), out_shardings=x.sharding)()

    given = jax.block_until_ready(jax.tree.map(fill, inputs))
    state, cache = given["state"], None
    for name, program in programs.items():
        with _Peak(execution.mesh) as peak:
            if name == "prefix":
                cache = jax.block_until_ready(program.compiled(given["frozen"], given["ids"]))
            elif name == "step":
                state, _ = jax.block_until_ready(program.compiled(state, given["frozen"], cache, given["batch"]))
            elif name == "encode":
                jax.block_until_ready(program.compiled(given["trainable"], given["frozen"], given["packed"]))
            else:
                lengths = given["batch"]["query_lengths"]
                jax.block_until_ready(program.compiled(given["frozen"], given["ids"], lengths, lengths, np.uint32(0)))
        print(f"    {name:<8} measured {peak.bytes / GIB:.3f} GiB, estimated {program.beside / GIB:.3f}", flush=True)


class _Peak:
    """The most memory that a device has in use inside the block, over what it had before: `bytes`.

    On a CPU it is the process's, sampled, by number of devices.
    """

    def __init__(self, mesh):
        self.devices = list(mesh.devices.flat)

    def __enter__(self):
        if self.devices[0].platform == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back would count as before
        self.before, self.most, self.done = self._now("bytes_in_use"), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        if self.devices[0].platform != "cpu":
            self.most = self._now("peak_bytes_in_use")
        self.bytes = self.most - self.before

    def _watch(self):
        while not self.done.wait(0.002):
            self.most = max(self.most, self._now("bytes_in_use"))

    def _now(self, key):
        if self.devices[0].platform == "cpu":
            status = pathlib.Path("/proc/self/status").read_text()
            return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 / len(self.devices)
        return max(device.memory_stats()[key] for device in self.devices)
