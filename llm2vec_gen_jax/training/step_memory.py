"""Settings of a training step that depend on device memory: remat policy, chunk size of the logits."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax

from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.execution import DEFAULT_REMAT, REMAT, Execution
from llm2vec_gen_jax.parallel import memory, processes
from llm2vec_gen_jax.parallel.sharding import batch_shards
from llm2vec_gen_jax.training.losses import CHUNK_TOKENS
from llm2vec_gen_jax.training.programs import CompiledCache

logger = logging.getLogger(__name__)


def chunk_tokens(architecture: Architecture, execution: Execution) -> int:
    """Returns the number of answer tokens of the global batch whose logits are in memory at a time.

    On accelerators the largest power of two, 256 to 4096 per device, whose logits and exponentials (10 bytes per
    vocabulary entry) fit in a sixteenth of the memory: each chunk reads the complete output matrix.
    """
    mesh, bytes_ = execution.mesh, memory.limit(execution.mesh)
    if bytes_ is None:
        return CHUNK_TOKENS
    shards, tensor = (batch_shards(mesh), mesh.shape["tensor"]) if mesh else (1, 1)
    largest = bytes_ / 16 / (10 * architecture.vocab_size / tensor)
    return shards * max(size for size in (256, 512, 1024, 2048, 4096) if size <= max(largest, 256))


def choose_remat(
    step_with: Callable[[str], CompiledCache], mesh: jax.sharding.Mesh | None, arguments: tuple[Any, ...]
) -> CompiledCache:
    """Returns the step with the remat policy that fits in memory, `dots` or else `block`; equal on all processes.

    step_with(policy) returns the step; arguments: those of the largest batch.
    `none` is not tried: storing its activations costs more than recomputing them (SmolLM2-135M on an H100: 20.2 GiB
    instead of 6.7). On CPUs, where the memory limit is unknown, the policy is `dots`.
    """
    limit, last = memory.limit(mesh), REMAT[-1]
    for policy in REMAT[REMAT.index(DEFAULT_REMAT) :]:
        step = step_with(policy)
        try:
            fits = sum(memory.program_bytes(step.compile(*arguments))) < limit if limit else True
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or policy == last:
                raise
            fits = False
        if policy == last or processes.run_on_process_0(functools.partial(bool, fits)):
            break
    if policy != DEFAULT_REMAT:
        logger.info(f"train.remat={policy}, chosen by the memory of the largest batch")
    return step
