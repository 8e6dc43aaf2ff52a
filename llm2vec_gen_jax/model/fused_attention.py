"""Third-party fused attention kernels behind one interface: cuDNN on NVIDIA GPUs, splash attention on TPUs.

Both compute softmax(q k^T / sqrt(H)) v for queries q_BTNH, keys k_BSGH and values v_BSGH (N a multiple of G), with
float32 scores that are not stored. Three arguments define the attention mask:

causal: query t attends to keys up to t + S - T, so that the last query attends to the last key.
lengths_B: number of valid keys of each row. None: all.
segments: int32 ids (of queries (B, T), of keys (B, S)); a query attends to keys with the same id, and with cuDNN to
those of the segment SHARED. None: all.

The result of a query that attends to no key is unspecified.
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm2vec_gen_jax.parallel import sharding

SHARED = -1  # segment id
_LANES = 128  # of a TPU vector register: splash attention needs lengths that are multiples of it
_PADDING = -2  # segment id


def cudnn(
    q_BTNH: jax.Array,
    k_BSGH: jax.Array,
    v_BSGH: jax.Array,
    causal: bool,
    lengths_B: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
) -> jax.Array:
    """cuDNN's flash attention (Dao et al. 2022), float16 or bfloat16, on Ampere or later. Returns (B, T, N, H)."""
    T, S = q_BTNH.shape[1], k_BSGH.shape[1]
    mask = None
    if segments is not None:
        keys = segments[1][:, None, None, :]
        mask = (segments[0][:, None, :, None] == keys) | (keys == SHARED)
    if causal and S != T:  # cuDNN's causal mask aligns the first query with the first key
        causal, ahead = False, (jnp.arange(T)[:, None] + S - T >= jnp.arange(S))[None, None]
        mask = ahead if mask is None else mask & ahead
    even_T, even_S = T + T % 2, S + S % 2  # JAX does not support the backward pass of odd lengths
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


def splash(
    q_BTNH: jax.Array,
    k_BSGH: jax.Array,
    v_BSGH: jax.Array,
    causal: bool,
    lengths_B: jax.Array | None,
    segments: tuple[jax.Array, jax.Array] | None,
    mesh: Mesh | None,
    interpret: bool,
) -> jax.Array:
    """Splash attention, JAX's flash attention for TPUs. Returns (B, T, N, H).

    mesh: each device processes its rows and heads. interpret: run in the Pallas interpreter, slowly, on any platform.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash_kernel
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as splash_mask

    B, T, N, H = q_BTNH.shape
    S = k_BSGH.shape[1]
    width_T, width_S = _round_up(T), _round_up(S)
    # Padding is a separate segment. A causal pass does not attend to padding at the end anyway.
    if segments is None and (lengths_B is not None or (not causal and width_S > S)):
        segments = jnp.ones((B, T), jnp.int32), jnp.ones((B, S), jnp.int32)
    if segments is not None and lengths_B is not None:
        segments = segments[0], jnp.where(jnp.arange(S) < lengths_B[:, None], segments[1], _PADDING)
    if segments is not None:
        segments = _pad(segments[0], width_T, _PADDING), _pad(segments[1], width_S, _PADDING)
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
    # By default a TPU rounds float32 operands to bfloat16.
    with jax.default_matmul_precision("highest" if q_BTNH.dtype == jnp.float32 else "default"):
        return sharding.on_shards(run, mesh, *arrays)[:, :T]


def _round_up(length):
    return -(-length // _LANES) * _LANES


def _block(width):
    """Returns the tile size: the largest divisor of the width up to 512, or a larger one if that is below 256."""
    divisors = [size for size in range(_LANES, min(width, 1024) + 1, _LANES) if width % size == 0]
    most = max(size for size in divisors if size <= 512)
    return most if most >= 256 else divisors[-1]


def _pad(x, width, value=0):
    return jnp.pad(x, [(0, 0), (0, width - x.shape[1])] + [(0, 0)] * (x.ndim - 2), constant_values=value)
