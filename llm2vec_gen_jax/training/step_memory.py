"""Settings of a training step that depend on the memory of the device: remat policy, chunk of logits."""

import jax

from llm2vec_gen_jax.model.execution import DEFAULT_REMAT, REMAT
from llm2vec_gen_jax.parallel import memory, processes
from llm2vec_gen_jax.parallel.sharding import batch_shards
from llm2vec_gen_jax.training.losses import CHUNK_TOKENS


def chunk_tokens(architecture, execution):
    """Returns how many answer tokens' logits, of the whole batch, are to be in memory at a time.

    On an accelerator as many as keep logits and exponents (10 bytes for each word of the vocabulary) below a sixteenth
    of its memory, a power of two of 256 to 4096 on each device: the output matrix is read once for every chunk.
    """
    mesh, bytes_ = execution.mesh, memory.limit(execution.mesh)
    if bytes_ is None:
        return CHUNK_TOKENS
    shards, tensor = (batch_shards(mesh), mesh.shape["tensor"]) if mesh else (1, 1)
    most = bytes_ / 16 / (10 * architecture.vocab_size / tensor)
    return shards * max(size for size in (256, 512, 1024, 2048, 4096) if size <= max(most, 256))


def choose_remat(step_with, mesh, arguments):
    """Chooses the remat policy with which a training step fits, `dots` or else `block`; all processes the same.

    step_with(policy) returns the step as a CompiledCache; arguments: those of the largest batch. Returns the step that
    is chosen.
    `none` is not tried: to write and read what it keeps costs more than to compute it again (SmolLM2-135M on an H100:
    20.2 GiB instead of 6.7). On a CPU, whose memory is not known, it is `dots`.
    """
    most, last = memory.limit(mesh), REMAT[-1]
    for policy in REMAT[REMAT.index(DEFAULT_REMAT) :]:
        step = step_with(policy)
        try:
            fits = sum(memory.program_bytes(step.compile(*arguments))) < most if most else True
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or policy == last:
                raise
            fits = False
        if policy == last or processes.run_on_process_0(lambda fits=fits: fits):
            break
    if policy != DEFAULT_REMAT:
        print(f"train.remat={policy}, chosen by the memory of the largest batch", flush=True)
    return step
