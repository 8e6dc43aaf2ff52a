"""Costs of training and encoding on devices that need not be attached, from compiled programs."""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import read_json, shipped
from llm2vec_gen_jax.common.terminal import terminal_width, wrap
from llm2vec_gen_jax.config import PlanConfig, hub_options, options
from llm2vec_gen_jax.model import architecture as architecture_lib
from llm2vec_gen_jax.model import quantization
from llm2vec_gen_jax.model.execution import REMAT, Execution
from llm2vec_gen_jax.parallel import memory, sharding
from llm2vec_gen_jax.parallel.chips import GIB, Chip, chip_of
from llm2vec_gen_jax.planning.measure import measure
from llm2vec_gen_jax.planning.programs import abstract_inputs, compile_programs, flops, lower_for_cuda, weight_dtype
from llm2vec_gen_jax.planning.topologies import ESTIMATE, compiling_for, described_devices, install_hint, is_described
from llm2vec_gen_jax.pretrained.backbone import default_dtype, open_checkpoint


def estimate(config: PlanConfig) -> list[dict[str, Any]]:
    """Compiles each mesh and remat policy of a PlanConfig. Prints one row for each and returns the rows as dicts."""
    options.require(config)
    architecture = _architecture(config)
    devices, chip, compiler = _devices(config.topology)
    if config.measure and is_described(devices[0]):
        raise InputError(
            f"topology={config.topology}: measure=true runs programs on attached devices. Remove measure or topology"
        )
    if config.measure and devices[0].platform == "cpu" and sys.platform != "linux":
        raise InputError("measure=true: the memory of a CPU can only be measured on Linux. Remove measure")
    if config.backbone.dtype == "auto" and is_described(devices[0]):
        backbone = dataclasses.replace(config.backbone, dtype=default_dtype(devices[0]))
        config = dataclasses.replace(config, backbone=backbone)
    elif config.backbone.dtype == "auto" and compiler == ESTIMATE and str(config.topology).startswith("t4"):
        config = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, dtype="float32"))
    with compiling_for(devices):
        return _plan(config, architecture, devices, chip, compiler)


def _plan(
    config: PlanConfig,
    architecture: architecture_lib.Architecture,
    devices: Sequence[Any],
    chip: Chip | None,
    compiler: str,
) -> list[dict[str, Any]]:
    policies = REMAT[1:] if config.train.remat == "auto" else (config.train.remat,)
    limit = memory.limit(sharding.make_mesh(config_lib.MeshConfig(), devices), chip)
    if config.search:
        meshes = _candidates(config, architecture, len(devices), limit)
    else:  # without a memory limit, the policy that training would choose
        meshes = [(config.mesh, remat) for remat in (policies if limit else policies[:1])]
    devices_name = config.topology or f"{len(devices)} x {devices[0].device_kind}"
    B, T, S = config.train.batch_size, config.query_length, config.answer_length
    about = (
        f"{architecture.num_parameters / 1e9:.2f} B parameters, {weight_dtype(config).name}; {devices_name}; "
        f"batch {B}, queries of {T} and answers of {S} tokens"
    )
    lines = [about, *_describe_compiler(compiler, limit, devices[0].platform).splitlines()]
    print("\n".join(part for line in lines for part in wrap(line, terminal_width())))
    print(
        f"\nper device, GiB:\n{'mesh (data, fsdp, tensor), remat':<34}"
        f"{'weights':>8}{'state':>7}{'train':>8}{'encode':>8}{'generate':>10}",
        flush=True,
    )
    rows = []
    for mesh_config, remat in meshes:
        mesh = sharding.make_mesh(mesh_config, devices)
        execution = Execution(mesh, config.kernels.attention, remat)
        execution.check(architecture.head_dim, quantization.product_dtype(weight_dtype(config)))
        row = _row(config, architecture, execution, chip, {"devices": devices_name, "compiler": compiler})
        if compiler == ESTIMATE and row["fits"] is not None:
            # cuDNN's attention cannot be lowered without cuDNN.
            lower_for_cuda(config, architecture, Execution(mesh, "xla", remat, platform="gpu"))
        rows.append(row)
        print(_line(row), flush=True)
        if config.measure:
            measure(config, architecture, execution)
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
        if len(meshes) > 1 and limit:
            print("\nno configuration fits: use more devices, a smaller batch or shorter texts")
    return rows


def _describe_compiler(compiler: str, limit: float | None, platform: str) -> str:
    """Returns lines that name the compiler and define "fits"."""
    text = f"compiled by {compiler}"
    if compiler == ESTIMATE:
        text += f", which overestimates the memory on a GPU; to install the GPU compiler: {install_hint()}"
    if limit:
        text += f"\nfits: below {limit / GIB:.2f} GiB per device, 92 % of the memory available to JAX"
        if platform == "gpu" or compiler == ESTIMATE:
            text += f", which is {memory.pool_share():.0%} of the device's (XLA_PYTHON_CLIENT_MEM_FRACTION)"
    return text


def _architecture(config: PlanConfig) -> architecture_lib.Architecture:
    if config.architecture:
        return architecture_lib.from_hf_config(read_json(shipped(config.architecture)), config.architecture)
    hub = hub_options(config, config.backbone.revision)
    return open_checkpoint(config.backbone.path, Execution(), hub)[0].architecture


def _devices(topology: str | None) -> tuple[Sequence[Any], Chip | None, str]:
    """Returns (devices, their Chip or None, name of the compiler) of a topology setting."""
    if topology:
        return described_devices(topology)
    devices = jax.devices()
    return devices, chip_of(devices[0].device_kind), f"XLA:{devices[0].platform.upper()}"


def _candidates(
    config: PlanConfig, architecture: architecture_lib.Architecture, count: int, limit: float | None
) -> list[tuple[config_lib.MeshConfig, str]]:
    """Returns the meshes and remat policies to try, those with the fewest shards of the weights first.

    The backbone is frozen, so data parallelism only adds an all-reduce of small gradients.
    """
    weights = architecture.num_parameters * weight_dtype(config).itemsize
    candidates = []
    for pieces in (pieces for pieces in range(1, count + 1) if count % pieces == 0):
        for tensor in (tensor for tensor in (1, 2, 4, 8) if pieces % tensor == 0):
            fsdp, data = pieces // tensor, count // pieces
            shards = data * fsdp * config.train.microbatches
            over_tensor = (architecture.num_kv_heads, architecture.vocab_size, architecture.intermediate_size)
            divides = config.train.batch_size % shards == 0 and architecture.hidden_size % fsdp == 0
            divides = divides and all(size % tensor == 0 for size in over_tensor)
            if divides and (limit is None or weights / pieces < limit):
                candidates += [(config_lib.MeshConfig(data, fsdp, tensor), remat) for remat in REMAT[1:]]
    if not candidates:
        raise InputError(f"train.batch_size={config.train.batch_size}: no mesh of {count} devices divides it and fits")
    return candidates


def _row(
    config: PlanConfig,
    architecture: architecture_lib.Architecture,
    execution: Execution,
    chip: Chip | None,
    common: dict[str, Any],
) -> dict[str, Any]:
    """Returns the costs of a mesh and a remat policy as JSON values; bytes are per device.

    common: the values that all rows share. limit: memory available to training; compiled_flops: null if the compiler
    does not report it.
    """
    started = time.perf_counter()
    mesh: Any = execution.mesh
    model, inputs = abstract_inputs(config, architecture, execution)
    limit = memory.limit(mesh, chip)
    row: dict[str, Any] = common | {"mesh": dict(mesh.shape), "remat": execution.remat, "fits": None, "limit": limit}
    row |= {"weights": memory.bytes_per_device(inputs["frozen"]), "state": memory.bytes_per_device(inputs["state"])}
    try:
        programs = compile_programs(config, model, inputs)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return row | {"fits": False, "reason": first_line(error)[:200]}
    training = [programs[name] for name in ("prefix", "step") if name in programs]
    row["train"] = programs["step"].peak
    if "prefix" in programs:  # the state is in memory, too
        row["train"] = max(row["train"], programs["prefix"].peak + row["state"])
    row["encode"], row["generate"] = programs["encode"].peak, programs["generate"].peak
    row["moved"], row["encode_moved"] = sum(program.moved for program in training), programs["encode"].moved
    row["flops"], row["encode_flops"] = flops(config, architecture)
    analyses = [program.compiled.cost_analysis() for program in training]  # empty for the GPU compiler
    row["compiled_flops"] = sum(analysis["flops"] for analysis in analyses) if all(analyses) else None
    row["seconds_to_compile"] = round(time.perf_counter() - started, 1)
    if limit:
        row["fits"] = max(row["train"], row["encode"]) < limit
    if chip:
        count = mesh.devices.size
        # Each of five passes reads all weights of the tensor shard, including those gathered from other devices.
        read = 5 * architecture.num_parameters * weight_dtype(config).itemsize / mesh.shape["tensor"]
        row["bounds"] = {
            "compute": row["flops"] / count / chip.flops,
            "memory": read / chip.bandwidth,
            "links": row["moved"] / chip.link,
        }
    return row


def _line(row: dict[str, Any]) -> str:
    """Returns the memory of a row on one line of 75 columns, and its training step on the next."""
    size = row["mesh"]
    text = f"{size['data']:>4} x{size['fsdp']:>4} x{size['tensor']:>3}  {row['remat']:<16}"
    text += f"{row['weights'] / GIB:>11.2f}{row['state'] / GIB:>7.2f}"
    if "train" in row:
        text += f"{row['train'] / GIB:>8.2f}{row['encode'] / GIB:>8.2f}{row['generate'] / GIB:>10.2f}"
        step = f"training step: {row['flops'] / 1e12:,.1f} TFLOP, {row['moved'] / GIB:.2f} GiB moved"
        if "bounds" in row:
            bounds = row["bounds"]
            parts = ", ".join(f"{name} {seconds:.3f}" for name, seconds in bounds.items())
            step += f", at least {max(bounds.values()):.3f} s ({parts})"
        step += f"; {row['compiler']}"
        if row["fits"] is False:
            step = f"does not fit; {step}"
    else:
        step = row["reason"]
    return "\n".join([text, *wrap(step, terminal_width(), " " * 6)])
