"""Device memory: the available bytes, and the bytes that programs and arrays need."""

import math
import os
from typing import Any

import jax

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.parallel.chips import Chip, chip_of

_USABLE = 0.92  # fraction of the available memory; the rest is for batches, fragmentation and other programs


def limit(mesh: jax.sharding.Mesh | None, chip: Chip | None = None) -> float | None:
    """Returns the usable bytes on each device of a mesh (None: this process's devices).

    That is 92 % of the memory available to JAX, as reported by the device, else from its data sheet; None if neither is
    known, as on CPUs. chip: the GPU that CPU devices stand for in an estimate.
    """
    devices = mesh.devices.flat if mesh else jax.local_devices()
    # Only local devices report their memory.
    device = next((device for device in devices if device.process_index == jax.process_index()), devices[0])
    available = _available(device, chip)
    return available and _USABLE * available


def _available(device, chip):
    """Returns the bytes available to JAX on a device, or None if unknown."""
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # a device of a topology description
        stats = {}
    chip = chip if device.platform == "cpu" else chip_of(device.device_kind)
    if device.platform != "cpu" and stats.get("bytes_limit"):
        return stats["bytes_limit"]
    return chip and chip.memory * (1.0 if device.platform == "tpu" else pool_share())


def pool_share() -> float:
    """Returns the fraction of GPU memory that JAX may allocate, from the environment variables that JAX reads.

    XLA_PYTHON_CLIENT_PREALLOCATE=false changes when memory is allocated, not how much. Raises InputError for an
    invalid value.
    """
    if os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "").lower() == "platform":
        return 1.0
    for key in ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"):
        if value := os.environ.get(key):
            try:
                share = float(value)
            except ValueError:
                share = 0.0
            if not 0 < share <= 1:
                raise InputError(f"{key}={value}: expected a fraction of the GPU's memory, such as 0.9")
            return share
    return 0.75


def program_bytes(compiled: jax.stages.Compiled) -> tuple[int, int]:
    """Returns (bytes of arguments, bytes of temporaries and outputs) of a compiled program, per device.

    Outputs that reuse donated arguments are counted once, as arguments.
    """
    memory: Any = compiled.memory_analysis()
    allocated = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes, allocated


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes per device of a tree of sharded arrays or ShapeDtypeStructs."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
