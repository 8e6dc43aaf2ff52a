"""What fits into a device: how much memory it has, how much a program takes, and what follows for training."""

import math
import os

import jax

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.parallel.chips import chip_of

_USABLE = 0.92  # of what a program may have; the rest is for batches, fragments and what runs beside


def limit(mesh, chip=None):
    """Returns the bytes that training may take on each device of a mesh (None: of this process's devices).

    92 % of what JAX lets programs have: by the device itself, else by its data sheet. None where neither is known, as
    on a CPU. chip: the Chip of the GPU that CPUs stand for in an estimate.
    """
    devices = mesh.devices.flat if mesh else jax.local_devices()
    # Of another process's device nothing is known.
    device = next((device for device in devices if device.process_index == jax.process_index()), devices[0])
    found = _available(device, chip)
    return found and _USABLE * found


def _available(device, chip):
    """Returns the bytes that JAX lets programs have on a device, or None where that is not known."""
    try:
        stats = device.memory_stats() or {}
    except jax.errors.JaxRuntimeError:  # the device is described, not attached
        stats = {}
    chip = chip if device.platform == "cpu" else chip_of(device.device_kind)
    if device.platform != "cpu" and stats.get("bytes_limit"):
        return stats["bytes_limit"]
    return chip and chip.memory * (1.0 if device.platform == "tpu" else pool_share())


def pool_share():
    """Returns the share of a GPU's memory that JAX may take, by the environment variables that JAX reads.

    XLA_PYTHON_CLIENT_PREALLOCATE=false changes when memory is taken, not how much. Raises InputError for a bad value.
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
                raise InputError(f"{key}={value}: expected a share of the GPU's memory, as 0.9")
            return share
    return 0.75


def taken(compiled):
    """Returns (bytes of what a compiled program is given, bytes of all that it makes), per device.

    What is donated counts once, with what is given.
    """
    memory = compiled.memory_analysis()
    beside = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.argument_size_in_bytes, beside


def bytes_per_device(tree):
    """Returns the bytes of a tree of arrays or ShapeDtypeStructs that each device holds."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
