"""Fused attention of other people's making, each behind one call: cuDNN's on NVIDIA GPUs, splash on TPUs.

Both compute softmax(q k^T / sqrt(H)) v, of queries q_BTNH and of keys and values k_BSGH, v_BSGH (N a multiple of G),
with scores in float32 and none of them in memory. Who sees whom is said by three arguments:

causal: query t sees the keys up to t + S - T, so that the last query sees the last key.
lengths_B: only so many keys of each row are real. None: all.
segments: (of queries (B, T), of keys (B, S)), int32: a query sees the keys of its own segment only. None: all.

A query that would see no key has a defined result that nobody may read.
"""

import jax
import jax.numpy as jnp

from llm2vec_gen_jax.parallel import sharding

_LANES = 128  # what a TPU computes at a time: splash takes multiples of it
_UNREAL = -1  # the segment of padding


def cudnn(q_BTNH, k_BSGH, v_BSGH, causal, lengths_B, segments):
    """Flash attention (Dao et al. 2022) of cuDNN. float16 or bfloat16, on Ampere or later. Returns (B, T, N, H)."""
    T, S = q_BTNH.shape[1], k_BSGH.shape[1]
    mask = None
    if segments is not None:
        mask = segments[0][:, None, :, None] == segments[1][:, None, None, :]
    if causal and S != T:  # its own causal mask would have the first query see the first key alone
        causal, ahead = False, (jnp.arange(T)[:, None] + S - T >= jnp.arange(S))[None, None]
        mask = ahead if mask is None else mask & ahead
    even_T, even_S = T + T % 2, S + S % 2  # JAX refuses the backward pass of odd lengths
    if (even_T, even_S) != (T, S):
        q_BTNH, k_BSGH, v_BSGH = _pad(q_BTNH, even_T), _pad(k_BSGH, even_S), _pad(v_BSGH, even_S)
        if mask is not None:
            mask = jnp.broadcast_to(mask, (*mask.shape[:2], T, S))
            mask = jnp.pad(mask, ((0, 0), (0, 0), (0, even_T - T), (0, even_S - S)))
        elif not causal and lengths_B is None:
            lengths_B = jnp.full(len(q_BTNH), S, jnp.int32)
    mixed_BTNH = jax.nn.dot_product_attention(
        q_BTNH, k_BSGH, v_BSGH, mask=mask, is_causal=causal, key_value_seq_lengths=lengths_B, implementation="cudnn"
    )
    return mixed_BTNH[:, :T]


def splash(q_BTNH, k_BSGH, v_BSGH, causal, lengths_B, segments, mesh, interpret):
    """Splash attention, the flash attention for TPUs that comes with JAX. Returns (B, T, N, H).

    mesh: every device runs it on its own rows and heads. interpret: on any platform, slowly.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    B, T, N, H = q_BTNH.shape
    S = k_BSGH.shape[1]
    width_T, width_S = _round_up(T), _round_up(S)
    # What is not real is a segment of its own. Behind all that is real, a causal pass does not see it anyway.
    if segments is None and (lengths_B is not None or (not causal and width_S > S)):
        segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    if lengths_B is not None:
        segments = segments[0], jnp.where(jnp.arange(S) < lengths_B[:, None], segments[1], _UNREAL)
    if segments is not None:
        segments = _pad(segments[0], width_T, _UNREAL), _pad(segments[1], width_S, _UNREAL)
    shape = (width_T, width_S)
    mask = splash_mask.CausalMask(shape, offset=S - T) if causal else splash_mask.FullMask(shape)
    block_T, block_S = _block(width_T), _block(width_S)
    blocks = splash_kernel.BlockSizes(
        block_q=block_T,
        block_kv=block_S,
        block_q_dkv=block_T,
        block_kv_dkv=block_S,
        block_q_dq=block_T,
        block_kv_dq=block_S,
    )

    def run(q_BTNH, k_BSGH, v_BSGH, segments_BT, segments_BS):
        kernel = splash_kernel.make_splash_mha(
            mask=splash_mask.MultiHeadMask([mask] * q_BTNH.shape[2]),
            block_sizes=blocks,
            head_shards=1,
            q_seq_shards=1,
            interpret=interpret,
        )
        ids = None if segments_BT is None else splash_kernel.SegmentIds(segments_BT, segments_BS)
        heads_first = [jnp.moveaxis(x, 2, 1) for x in (q_BTNH, k_BSGH, v_BSGH)]
        return jnp.moveaxis(jax.vmap(kernel)(*heads_first, ids), 1, 2)

    q_BTNH = (q_BTNH.astype(jnp.float32) * H**-0.5).astype(q_BTNH.dtype)  # splash does not scale
    arrays = _pad(q_BTNH, width_T), _pad(k_BSGH, width_S), _pad(v_BSGH, width_S), *(segments or (None, None))
    # A TPU multiplies float32 in one bfloat16 pass unless it is told otherwise.
    with jax.default_matmul_precision("highest" if q_BTNH.dtype == jnp.float32 else "default"):
        return sharding.on_shards(run, mesh, *arrays)[:, :T]


def _round_up(length):
    return -(-length // _LANES) * _LANES


def _block(width):
    """The tokens of a tile: a divisor of the width, at most 512 where that leaves no very small ones."""
    divisors = [size for size in range(_LANES, min(width, 1024) + 1, _LANES) if width % size == 0]
    most = max(size for size in divisors if size <= 512)
    return most if most >= 256 else divisors[-1]


def _pad(x, width, value=0):
    return jnp.pad(x, [(0, 0), (0, width - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=value)
