"""What fits into a device: how much memory it has, how much a program takes, and what follows for training."""

import math
import os

import jax

from llm2vec_gen_jax import distributed
from llm2vec_gen_jax.costs import chip_of
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.execution import DEFAULT_REMAT, REMAT
from llm2vec_gen_jax.sharding import batch_shards

_USABLE = 0.92  # of what a program may have; the rest is for batches, fragments and what runs beside
_CPU_CHUNK = 512  # answer tokens whose logits stay in a processor's cache


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


def chunk_tokens(architecture, execution):
    """Returns how many answer tokens' logits, of the whole batch, are to be in memory at a time.

    On an accelerator as many as keep logits and exponents (10 bytes for each word of the vocabulary) below a sixteenth
    of its memory, a power of two of 256 to 4096 on each device: the output matrix is read once for every chunk.
    """
    mesh, bytes_ = execution.mesh, limit(execution.mesh)
    if bytes_ is None:
        return _CPU_CHUNK
    shards, tensor = (batch_shards(mesh), mesh.shape["tensor"]) if mesh else (1, 1)
    most = bytes_ / 16 / (10 * architecture.vocab_size / tensor)
    return shards * max(size for size in (256, 512, 1024, 2048, 4096) if size <= max(most, 256))


def choose_remat(compile_with, mesh):
    """Chooses the remat policy with which a training step fits, `dots` or else `block`; all processes the same.

    compile_with(policy) gives the compiled step of the largest batch; its last call is with the chosen policy.
    `none` is not tried: to write and read what it keeps costs more than to compute it again (SmolLM2-135M on an H100:
    20.2 GiB instead of 6.7). On a CPU, whose memory is not known, it is `dots`.
    """
    most, last = limit(mesh), REMAT[-1]
    for policy in REMAT[REMAT.index(DEFAULT_REMAT) :]:
        try:
            fits = sum(taken(compile_with(policy))) < most if most else True
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or policy == last:
                raise
            fits = False
        if policy == last or distributed.on_first(lambda fits=fits: fits):
            break
    if policy != DEFAULT_REMAT:
        print(f"train.remat={policy}, chosen by the memory of the largest batch", flush=True)
