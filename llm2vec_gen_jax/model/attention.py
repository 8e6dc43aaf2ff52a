"""Attention and attention masks.

Rows are right-padded. A causal pass needs no padding mask, because no token attends to the padding after it. A
bidirectional pass needs the lengths, a row with several texts the segments, and a pass that continues a cached prefix
the valid slots of the cache. Texts of a row with a common prefix share its tokens, as a segment that all attend to.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llm2vec_gen_jax.model import fused_attention
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.model.fused_attention import SHARED
from llm2vec_gen_jax.model.layers import apply_dropout, product, store


@struct.dataclass
class KVCache:
    """Rotated keys, and values, of previous tokens, in execution.storage_dtype. Inside a layer without the L.

    Heads precede slots, so that the products of a token with a cache need no transposed copy.
    """

    k_LBGSH: jax.Array
    v_LBGSH: jax.Array


@struct.dataclass
class AttentionMask:
    """Attention mask of one pass.

    causal: a token attends to itself and previous tokens of the pass; otherwise to all tokens of its row.
    lengths_B: tokens of each row without padding; needed if not causal.
    segments_BT: index of the text of each token; a token attends only to its text and to tokens of the segment SHARED
    (if Execution.shares_prefix). None: one text per row.
    cache_BS: slots of the KVCache that all tokens of the row attend to; None without a cache.
    """

    causal: bool = struct.field(pytree_node=False)
    lengths_B: jax.Array | None = None
    segments_BT: jax.Array | None = None
    cache_BS: jax.Array | None = None


CAUSAL = AttentionMask(causal=True)
_LEAST_BLOCK, _MOST_BLOCKS = 64, 8  # minimum queries per block, maximum blocks per pass


def attend(
    q_BTNH: jax.Array,
    k_BTGH: jax.Array,
    v_BTGH: jax.Array,
    mask: AttentionMask,
    cache: KVCache | None,
    execution: Execution,
    key: Any = None,
    dropout: float = 0.0,
) -> jax.Array:
    """Softmax attention of a pass to its tokens and, if given, to a layer's cache.

    Scores and softmax are float32. dropout: rate for the attention weights, with the random `key`.
    Returns (B, T, N, H) in q's dtype; unspecified values for padding.
    """
    T, H = q_BTNH.shape[1], q_BTNH.shape[3]
    key = key if dropout else None
    kernel = execution.attention_kernel(T, H, q_BTNH.dtype, cache is not None, key is not None)
    if kernel == "xla":
        return _attend(q_BTNH, k_BTGH, v_BTGH, mask, cache, execution, key, dropout)
    causal, lengths_B, segments = mask.causal, None, None
    if mask.segments_BT is not None:
        segments = (mask.segments_BT, mask.segments_BT)
    if cache is not None:  # the valid slots are not static, so they are expressed as segments
        own_BT = jnp.ones(q_BTNH.shape[:2], jnp.int32)
        segments = own_BT, jnp.concatenate([mask.cache_BS.astype(jnp.int32), own_BT], axis=1)  # type: ignore[union-attr]
        k_BTGH, v_BTGH = (
            jnp.concatenate([jnp.swapaxes(slots, 1, 2).astype(own.dtype), own], axis=1)
            for slots, own in ((cache.k_LBGSH, k_BTGH), (cache.v_LBGSH, v_BTGH))
        )
    if not causal:
        lengths_B = jnp.maximum(mask.lengths_B, 1)  # type: ignore[arg-type]
    if kernel == "cudnn":
        return fused_attention.cudnn(q_BTNH, k_BTGH, v_BTGH, causal, lengths_B, segments)
    interpret = execution.target != "tpu"
    return fused_attention.splash(q_BTNH, k_BTGH, v_BTGH, causal, lengths_B, segments, execution.mesh, interpret)


def _attend(q_BTNH, k_BTGH, v_BTGH, mask, cache, execution, key, dropout):
    """Reference implementation for every platform."""
    T = q_BTNH.shape[1]
    # The scores of a block of queries fit in the cache of a CPU. In a causal pass it needs no keys after it, which
    # avoids nearly half of the scores.
    blocked = cache is None and key is None
    size = max(_LEAST_BLOCK, -(-T // _MOST_BLOCKS)) if blocked else T
    sizes = [min(size, T - first) for first in range(0, T, size)]
    # Heads first: otherwise XLA's CPU compiler transposes the weights, the largest arrays of all.
    # The gradient of `split` is a concatenation; that of slices would be a sum of padded arrays, which costs more than
    # the products.
    keys, values = (jax.lax.split(jnp.swapaxes(x, 1, 2), sizes, axis=2) for x in (k_BTGH, v_BTGH))
    mixed, last = [], 0
    for number, queries in enumerate(jax.lax.split(q_BTNH, sizes, axis=1), start=1):
        first, last = last, last + queries.shape[1]
        seen = _seen(mask, first, last, last if mask.causal else T)
        own = (jnp.concatenate(blocks[: number if mask.causal else None], axis=2) for blocks in (keys, values))
        mixed.append(_mix(queries, *own, seen, mask.cache_BS, cache, execution, key, dropout))
    return jnp.concatenate(mixed, axis=1) if len(mixed) > 1 else mixed[0]


def _mix(q_BTNH, k_BGSH, v_BGSH, seen, cache_BS, cache, execution, key, dropout):
    """`attend` for a block of queries and the keys allowed by `seen`, broadcastable to (B, G, R, T, S)."""
    B, T, N, H = q_BTNH.shape
    G = k_BGSH.shape[1]
    # M = R * T: R query heads per key/value head, T tokens.
    q_BGMH = jnp.moveaxis(q_BTNH.reshape(B, T, G, -1, H), 1, 3).reshape(B, G, -1, H)

    seen_BGMS = _of_rows(seen, N // G)
    if cache is None and key is None:
        mixed_BGMH = _softmax_mix(q_BGMH, k_BGSH, v_BGSH, seen_BGMS, execution)
    elif cache is None:
        weights_BGMS = apply_dropout(jax.nn.softmax(_scores(q_BGMH, k_BGSH, seen_BGMS), axis=-1), key, dropout)
        mixed_BGMH = product("bgms,bgsh->bgmh", weights_BGMS.astype(q_BTNH.dtype), v_BGSH)
    else:
        # Separate scores for the pass and the cache, one softmax: the cache is read once and never copied.
        scores_BGMS = _scores(q_BGMH, k_BGSH, seen_BGMS)
        cached_BGMS = _scores(q_BGMH.astype(cache.k_LBGSH.dtype), cache.k_LBGSH, cache_BS[:, None, None, :])
        weights_BGMS = jax.nn.softmax(jnp.concatenate([cached_BGMS, scores_BGMS], axis=-1), axis=-1)
        weights_BGMS = apply_dropout(weights_BGMS, key, dropout).astype(q_BTNH.dtype)
        cached_BGMS, own_BGMS = jnp.split(weights_BGMS, [cached_BGMS.shape[-1]], axis=-1)
        mixed_BGMH = _weigh(cached_BGMS.astype(cache.v_LBGSH.dtype), cache.v_LBGSH, T, execution)
        mixed_BGMH += product("bgms,bgsh->bgmh", own_BGMS, v_BGSH)
    mixed_BTGRH = jnp.moveaxis(mixed_BGMH.astype(q_BTNH.dtype).reshape(B, G, -1, T, H), 3, 1)
    return mixed_BTGRH.reshape(B, T, N, H)


def _of_rows(seen, heads):
    """Returns a mask broadcastable to (B, G, R, T, S) as one broadcastable to (B, G, M, S). heads: R."""
    seen = seen.reshape((1,) * (5 - seen.ndim) + seen.shape)
    B, G, _, T, S = seen.shape
    heads = heads if T > 1 else 1
    return jnp.broadcast_to(seen, (B, G, heads, T, S)).reshape(B, G, heads * T, S)


def _scores(q_BGMH, k_BGSH, seen_BGMS):
    return jnp.where(seen_BGMS, product("bgmh,bgsh->bgms", q_BGMH, k_BGSH) * q_BGMH.shape[-1] ** -0.5, -jnp.inf)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _softmax_mix(q_BGMH, k_BGSH, v_BGSH, seen_BGMS, execution):
    """Softmax attention. Returns (B, G, M, H) in q's dtype.

    As in FlashAttention (Dao et al. 2022), weights are normalized after the product with the values, and the backward
    pass recomputes them from the stored log-sum-exp: fewer passes over the scores, the largest arrays of all.
    """
    return _softmax_mix_forward(q_BGMH, k_BGSH, v_BGSH, seen_BGMS, execution)[0]


def _softmax_mix_forward(q_BGMH, k_BGSH, v_BGSH, seen_BGMS, execution):
    scores_BGMS = _scores(q_BGMH, k_BGSH, seen_BGMS)
    top_BGM1 = scores_BGMS.max(axis=-1, keepdims=True)
    weights_BGMS = jnp.exp(scores_BGMS - top_BGM1).astype(q_BGMH.dtype)
    norm_BGM1 = weights_BGMS.astype(jnp.float32).sum(axis=-1, keepdims=True)
    mixed_BGMH = product("bgms,bgsh->bgmh", weights_BGMS, v_BGSH) / norm_BGM1
    mixed_BGMH = store(mixed_BGMH.astype(q_BGMH.dtype), execution)
    logsumexp_BGM1 = store(top_BGM1 + jnp.log(norm_BGM1), execution)
    return mixed_BGMH, (q_BGMH, k_BGSH, v_BGSH, seen_BGMS, mixed_BGMH, logsumexp_BGM1)


def _softmax_mix_backward(execution, stored, gradient_BGMH):
    q_BGMH, k_BGSH, v_BGSH, seen_BGMS, mixed_BGMH, logsumexp_BGM1 = stored
    dtype, scale = q_BGMH.dtype, q_BGMH.shape[-1] ** -0.5
    mean_BGM1 = jnp.sum(gradient_BGMH.astype(jnp.float32) * mixed_BGMH.astype(jnp.float32), axis=-1, keepdims=True)
    # Keys first: in this order, XLA's CPU compiler has fast kernels for all products but the last.
    seen_BGSM, logsumexp_BG1M, mean_BG1M = (jnp.swapaxes(x, 2, 3) for x in (seen_BGMS, logsumexp_BGM1, mean_BGM1))
    weights_BGSM = jnp.exp(_scores(k_BGSH, q_BGMH, seen_BGSM) - logsumexp_BG1M).astype(dtype)
    v_gradient_BGSH = product("bgsm,bgmh->bgsh", weights_BGSM, gradient_BGMH)
    weight_gradient_BGSM = product("bgsh,bgmh->bgsm", v_BGSH, gradient_BGMH)
    score_gradient_BGSM = weights_BGSM.astype(jnp.float32) * (weight_gradient_BGSM - mean_BG1M) * scale
    score_gradient_BGSM = score_gradient_BGSM.astype(dtype)
    k_gradient_BGSH = product("bgsm,bgmh->bgsh", score_gradient_BGSM, q_BGMH)
    q_gradient_BGMH = product("bgsm,bgsh->bgmh", score_gradient_BGSM, k_BGSH)
    return *(x.astype(dtype) for x in (q_gradient_BGMH, k_gradient_BGSH, v_gradient_BGSH)), None


_softmax_mix.defvjp(_softmax_mix_forward, _softmax_mix_backward)


def _weigh(weights_BGMS, v_BGSH, tokens, execution):
    """Returns the weighted sums of a cache's values, (B, G, M, H) float32. tokens: number of tokens in the pass."""
    if tokens > 1 or execution.target != "cpu":
        return product("bgms,bgsh->bgmh", weights_BGMS, v_BGSH)
    # With so few rows, a matrix product is three times slower than a sum on a CPU.
    return jnp.sum(weights_BGMS[..., None] * v_BGSH[:, :, None], axis=3)


def _seen(mask, first, last, end):
    """Returns the mask of queries first ... last - 1 and keys before `end`, broadcastable to (B, G, R, T, S)."""
    if mask.causal:
        seen = jnp.arange(first, last)[:, None] >= jnp.arange(end)
    else:
        seen = (jnp.arange(end) < jnp.maximum(mask.lengths_B, 1)[:, None])[:, None, None, None, :]
    if mask.segments_BT is None:
        return seen
    segments_BT = mask.segments_BT[:, None, None, :]
    keys = segments_BT[..., None, :end]
    return seen & ((segments_BT[..., first:last, None] == keys) | (keys == SHARED))
