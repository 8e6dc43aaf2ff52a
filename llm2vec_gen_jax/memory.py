"""What fits into a device: how much memory it has, how much a program takes, and what follows for training."""

import jax

from llm2vec_gen_jax import distributed
from llm2vec_gen_jax.costs import chip_of
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


def choose_remat(compile_with, policies, mesh):
    """Returns the first, and so fastest, remat policy with which a training step fits; all processes the same.

    compile_with(policy) gives the compiled step of the largest batch, and was last called with what is returned. On a
    CPU, where there is no limit, it is the second: most that the first keeps are attention weights.
    """
    most = limit(mesh)
    if most is None:
        compile_with(policies[1])
        return policies[1]
    for policy in policies:
        try:
            fits = sum(taken(compile_with(policy))) < most
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or policy == policies[-1]:
                raise
            fits = False
        if distributed.on_first(lambda fits=fits: fits) or policy == policies[-1]:
            return policy
