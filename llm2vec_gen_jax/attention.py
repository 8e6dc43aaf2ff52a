"""Attention, and the one place that knows who sees whom.

Rows are right-padded. In a causal pass no real token sees the padding, so no mask is needed; a bidirectional pass
needs the lengths; a pass that continues a cached prefix needs to know which slots of the cache are real.
"""

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KVCache:
    """Keys and values of tokens already read, rotated. Inside a layer without the leading L."""

    k_LBSGH: jax.Array
    v_LBSGH: jax.Array


@struct.dataclass
class Visibility:
    """Who sees whom in one pass.

    causal: a token sees itself and those before it in the pass; otherwise all real tokens of its row.
    lengths_B: real tokens of each row of the pass; needed when not causal.
    cache_BS: which slots of the KVCache every token of the row sees as well; None without a cache.
    """

    causal: bool = struct.field(pytree_node=False)
    lengths_B: jax.Array | None = None
    cache_BS: jax.Array | None = None


CAUSAL = Visibility(causal=True)


def attend(q_BTNH, k_BTGH, v_BTGH, visibility, cache):
    """Softmax attention of a pass over its own tokens and, if there is one, over a layer's cache.

    Scores and softmax are float32. Returns (B, T, N, H) in q's dtype. Queries of padding are defined and unread.
    """
    if cache is None:
        return jax.nn.dot_product_attention(
            q_BTNH,
            k_BTGH,
            v_BTGH,
            is_causal=visibility.causal,
            key_value_seq_lengths=None if visibility.causal else jnp.maximum(visibility.lengths_B, 1),
        )
    # Own tokens and cache are scored apart and normalised together: the cache is read once and never copied.
    B, T, N, H = q_BTNH.shape
    q_BTGRH = q_BTNH.reshape(B, T, k_BTGH.shape[2], -1, H) * H**-0.5
    own = _scores(q_BTGRH, k_BTGH)
    if visibility.causal:
        own = jnp.where(jnp.tril(jnp.ones((T, T), bool)), own, -jnp.inf)
    else:
        own = jnp.where((jnp.arange(T) < visibility.lengths_B[:, None])[:, None, None, None], own, -jnp.inf)
    cached = _scores(q_BTGRH, cache.k_LBSGH)
    cached = jnp.where(visibility.cache_BS[:, None, None, None, :], cached, -jnp.inf)
    weights = jax.nn.softmax(jnp.concatenate([cached, own], axis=-1), axis=-1).astype(q_BTNH.dtype)
    cached, own = jnp.split(weights, [cached.shape[-1]], axis=-1)
    out_BTGRH = _mix(cached, cache.v_LBSGH) + _mix(own, v_BTGH)
    return out_BTGRH.reshape(B, T, N, H).astype(q_BTNH.dtype)


def _scores(q_BTGRH, k_BSGH):
    return jnp.einsum("btgrh,bsgh->bgrts", q_BTGRH, k_BSGH, preferred_element_type=jnp.float32)


def _mix(weights_BGRTS, v_BSGH):
    return jnp.einsum("bgrts,bsgh->btgrh", weights_BGRTS, v_BSGH, preferred_element_type=jnp.float32)
