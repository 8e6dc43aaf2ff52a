"""What fits into a device: how much memory it has, how much a program takes, and what follows for training."""

import math

import jax

from llm2vec_gen_jax import distributed
from llm2vec_gen_jax.costs import chip_of
from llm2vec_gen_jax.execution import DEFAULT_REMAT, REMAT
from llm2vec_gen_jax.sharding import batch_shards

_USABLE = 0.92  # of a device's memory; the rest is for batches, fragments and what runs beside
_CPU_CHUNK = 512  # answer tokens whose logits stay in a processor's cache


def limit(mesh):
    """Returns the bytes that a program may take on each device of a mesh; None on a CPU, where nobody knows."""
    device = mesh.devices.flat[0] if mesh else jax.devices()[0]
    if device.platform == "cpu":
        return None
    stats = device.memory_stats() if device in jax.devices() else None  # a described device has none
    found = stats["bytes_limit"] if stats else getattr(chip_of(device.device_kind), "memory", None)
    return found and _USABLE * found


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
