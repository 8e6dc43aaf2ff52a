"""Batched generation with a KV cache: prompts of different lengths in one batch, one compiled decode loop."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.config import DecodeConfig, options
from llm2vec_gen_jax.data.buckets import bucket_length, pad
from llm2vec_gen_jax.model.attention import CAUSAL, AttentionMask
from llm2vec_gen_jax.model.backbone import Backbone, unstack_layers
from llm2vec_gen_jax.model.execution import Execution, platform_jit
from llm2vec_gen_jax.parallel import memory, sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling parameters. temperature 0 is greedy; top_p: nucleus sampling (Holtzman et al. 2020)."""

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        options.check_arguments(DecodeConfig, **vars(self))


def generate(
    backbone: LoadedBackbone,
    ids: Sequence[Sequence[int]],
    sampling: Sampling,
    seed: int = 0,
    row_ids: Sequence[int] | np.ndarray | None = None,
) -> list[list[int] | None]:
    """Continues prompts, lists of ids. Returns lists of ids without the stop token; None where logits were not finite.

    row_ids: integers that determine, with the seed, the random numbers of each row, so that a sample does not depend
    on its batch; default 0, 1, ...
    """
    return _continue(backbone, ids, None, sampling, seed, row_ids)


def generate_from_soft_prompts(
    backbone: LoadedBackbone,
    soft_prompts_BKD: np.ndarray,
    sampling: Sampling,
    seed: int = 0,
    row_ids: Sequence[int] | np.ndarray | None = None,
) -> list[list[int] | None]:
    """`generate` from soft prompts (B, K, D) instead of ids."""
    return _continue(backbone, None, np.asarray(soft_prompts_BKD, np.float32), sampling, seed, row_ids)


def compile_from_soft_prompts(backbone: LoadedBackbone, shape: tuple[int, int, int], sampling: Sampling) -> None:
    """Compiles `generate_from_soft_prompts` for soft prompts of a shape (B, K, D), without running it."""
    _generate.compile(*_arguments(backbone, None, np.zeros(shape, np.float32), sampling, 0, None))


def ended(ids: Sequence[int], sampling: Sampling) -> bool:
    """Returns whether a generated row ended with a stop token, before max_new_tokens."""
    return len(ids) < sampling.max_new_tokens


def _continue(backbone, ids, soft_prompts_BKD, sampling, seed, row_ids):
    count = len(ids) if ids is not None else len(soft_prompts_BKD)
    outputs = _generate(*_arguments(backbone, ids, soft_prompts_BKD, sampling, seed, row_ids))
    out_BN, count_B, finite_B = map(np.asarray, outputs)
    return [out_BN[row, : count_B[row]].tolist() if finite_B[row] else None for row in range(count)]


def _arguments(backbone, ids, soft_prompts_BKD, sampling, seed, row_ids):
    """Returns the arguments of `continue_prompts` for ids or soft prompts, padded to a batch of `batch_rows`."""
    count = len(ids) if ids is not None else len(soft_prompts_BKD)
    size = batch_rows(count, backbone.execution)
    row_ids = np.arange(size, dtype=np.int32) if row_ids is None else np.resize(np.asarray(row_ids, np.int32), size)
    if ids is not None:
        lengths_B = np.array([len(row) for row in ids] + [1] * (size - count), np.int32)
        prompt = pad([*ids, *[[0]] * (size - count)], bucket_length(lengths_B.max()))
    else:
        lengths_B = np.full(size, soft_prompts_BKD.shape[1], np.int32)
        prompt = np.concatenate([soft_prompts_BKD, np.zeros((size - count, *soft_prompts_BKD.shape[1:]), np.float32)])
    prompt, lengths_B, row_ids = sharding.put_batch((prompt, lengths_B, row_ids), backbone.mesh)
    stop, model = tuple(backbone.tokenizer.stop_ids), Backbone(backbone.architecture, backbone.execution)
    seed = np.uint32(seed % 2**32)
    unroll = unrolls(model, backbone.frozen, size, prompt.shape[1] + sampling.max_new_tokens)
    return model, sampling, stop, unroll, backbone.frozen, prompt, lengths_B, row_ids, seed


def batch_rows(count: int, execution: Execution) -> int:
    """Returns the padded batch size for `count` prompts: a multiple of the shards, on GPUs at least two per shard.

    XLA's GPU compiler multiplies a single row with a float32 copy of the weight.
    """
    shards = sharding.batch_shards(execution.mesh) if execution.mesh else 1
    return max(-(-count // shards), 2 if execution.target == "gpu" else 1) * shards


def unrolls(model: Backbone, frozen: Any, batch_size: int, slots: int) -> bool:
    """Returns whether to decode with a Python loop over layers (`Backbone.decode_step`).

    True on GPUs if the copy of the layers that it needs fits in memory.
    frozen: arrays or ShapeDtypeStructs with shardings. slots: prompt and new tokens per row.
    """
    a, execution = model.architecture, model.execution
    if execution.target != "gpu":
        return False
    limit = memory.limit(execution.mesh)
    if limit is None:
        return True
    mesh, itemsize = execution.mesh, frozen["embedding"].dtype.itemsize
    shards = sharding.batch_shards(mesh) * mesh.shape["tensor"] if mesh else 1
    cache = 2 * a.num_layers * batch_size * a.num_kv_heads * slots * a.head_dim * itemsize / shards
    # XLA gathers fsdp-sharded weights before the loop, not in each iteration. Three copies of the cache: after the
    # prefill, padded, and unstacked by layer.
    copies = 1 + mesh.shape["fsdp"] if mesh and mesh.shape["fsdp"] > 1 else 1
    needed = memory.bytes_per_device(frozen) + copies * memory.bytes_per_device(frozen["layers"]) + 3 * cache
    return bool(needed < limit)


def continue_prompts(
    model: Backbone,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    unroll: bool,
    frozen: Any,
    prompt: jax.Array,
    lengths_B: jax.Array,
    row_ids_B: jax.Array,
    seed: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Generates from a batch of prompts: ids (B, P) or soft prompts (B, P, D). unroll: see `unrolls`.

    Returns (ids (B, max_new_tokens), number of ids before a stop token (B,), whether all logits were finite (B,)).

    The cache has P slots for the right-padded prompts, then one per new token; the gap between a short prompt and its
    first new token is masked, and positions count real tokens only.
    """
    variables, N = {"params": frozen}, sampling.max_new_tokens
    x_BPD: Any = prompt if prompt.ndim == 3 else model.apply(variables, prompt, method="embed")
    x_BPD = x_BPD.astype(frozen["embedding"].dtype)
    B, P, _ = x_BPD.shape
    # An overflow in the padding would reach real tokens: 0 * NaN is NaN.
    x_BPD = jnp.where((jnp.arange(P) < lengths_B[:, None])[..., None], x_BPD, 0)
    keys_B = jax.vmap(lambda row: jax.random.fold_in(jax.random.key(seed), row))(row_ids_B)
    stop = jnp.array(stop_ids, jnp.int32)

    def choose(hidden_BD, step):
        logits_BV = model.apply(variables, hidden_BD, method="logits")
        finite_B = jnp.isfinite(logits_BV.max(axis=-1))
        if sampling.temperature == 0:
            return logits_BV.argmax(axis=-1).astype(jnp.int32), finite_B
        logits_BV = _nucleus(logits_BV / sampling.temperature, sampling.top_p)
        token_B = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(
            keys_B, logits_BV
        )
        return token_B.astype(jnp.int32), finite_B

    hidden_BPD, prefix = model.apply(variables, x_BPD, jnp.broadcast_to(jnp.arange(P), (B, P)), CAUSAL)
    cache = jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, N), (0, 0))), prefix)
    if unroll:
        cache, layer_params = unstack_layers(cache), unstack_layers(frozen["layers"])
    last_BD = jnp.take_along_axis(hidden_BPD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    slot = jnp.arange(P + N)

    def unfinished(state):
        step, _, done_B, *_ = state
        return (step < N) & ~done_B.all()

    def advance(state):
        step, token_B, done_B, finite_B, count_B, out_BN, cache = state
        done_B = done_B | jnp.isin(token_B, stop)
        out_BN = jax.lax.dynamic_update_slice_in_dim(out_BN, jnp.where(done_B, 0, token_B)[:, None], step, axis=1)
        count_B = count_B + ~done_B
        visible_BS = (slot < lengths_B[:, None]) | ((slot >= P) & (slot < P + step))
        x_B1D = model.apply(variables, token_B[:, None], method="embed")
        arguments = x_B1D, (lengths_B + step)[:, None], AttentionMask(causal=True, cache_BS=visible_BS)
        if unroll:
            hidden_B1D, new = model.apply(variables, *arguments, layer_params, cache, method="decode_step")
        else:
            hidden_B1D, new = model.apply(variables, *arguments, cache)
        cache = jax.tree.map(
            lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, P + step, axis=-2), cache, new
        )
        token_B, chosen_B = choose(hidden_B1D[:, 0], step + 1)
        finite_B = finite_B & (chosen_B | done_B | (step + 1 == N))
        return step + 1, token_B, done_B, finite_B, count_B, out_BN, cache

    zeros_B = jnp.zeros(B, jnp.int32)
    token_B, finite_B = choose(last_BD, 0)
    state = (jnp.int32(0), token_B, zeros_B.astype(bool), finite_B, zeros_B, jnp.zeros((B, N), jnp.int32), cache)
    _, _, _, finite_B, count_B, out_BN, _ = jax.lax.while_loop(unfinished, advance, state)
    return out_BN, count_B, finite_B


_generate = platform_jit(continue_prompts, static_argnums=(1, 2, 3))


def _nucleus(logits_BV, top_p):
    """Masks all but the most likely tokens whose total probability reaches top_p."""
    if top_p >= 1:
        return logits_BV
    # Bisection for the smallest probability to keep: much cheaper than sorting the vocabulary.
    probability_BV = jax.nn.softmax(logits_BV, axis=-1)

    def halve(_, bounds):
        low_B, high_B = bounds
        middle_B = (low_B + high_B) / 2
        enough_B = jnp.where(probability_BV >= middle_B[:, None], probability_BV, 0).sum(axis=-1) >= top_p
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    top_B = probability_BV.max(axis=-1)
    low_B, _ = jax.lax.fori_loop(0, 30, halve, (jnp.zeros_like(top_B), top_B))
    return jnp.where(probability_BV >= low_B[:, None], logits_BV, -jnp.inf)
