"""Reconstruction and alignment (arXiv 2603.10913, section 3), and their weighted sum."""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from llm2vec_gen_jax.model.layers import Dropout, einsum_f32, l2_normalize
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.training import supervised

CHUNK_TOKENS = 512  # the logits of so many tokens fit in the cache of a CPU


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_cross_entropy(
    hidden_BSD: jax.Array, head_VD: jax.Array, labels_BS: jax.Array, weights_BS: jax.Array, chunks: int
) -> jax.Array:
    """Sum over tokens of weight * cross-entropy of `hidden @ head.T`, without materializing all logits.

    The head is frozen, so the forward pass also computes the gradient with respect to the hidden states (B, S, D),
    chunk by chunk, and the backward pass only scales it. Exact, without recomputation; the head gets no gradient.
    chunks: number of pieces of S. Returns a float32 scalar.
    """
    return _scan_chunks(hidden_BSD, head_VD, labels_BS, weights_BS, chunks, with_gradient=False)[0]


def _forward(
    hidden_BSD: jax.Array, head_VD: jax.Array, labels_BS: jax.Array, weights_BS: jax.Array, chunks: int
) -> tuple[jax.Array, jax.Array | None]:
    return _scan_chunks(hidden_BSD, head_VD, labels_BS, weights_BS, chunks, with_gradient=True)


def _backward(chunks: int, gradient_BSD: jax.Array, scale: jax.Array) -> tuple[jax.Array, None, None, None]:
    return (gradient_BSD * scale.astype(gradient_BSD.dtype), None, None, None)


fused_cross_entropy.defvjp(_forward, _backward)


def _scan_chunks(
    hidden_BSD: jax.Array,
    head_VD: jax.Array,
    labels_BS: jax.Array,
    weights_BS: jax.Array,
    chunks: int,
    with_gradient: bool,
) -> tuple[jax.Array, jax.Array | None]:
    B, S, D = hidden_BSD.shape
    C = -(-S // chunks)

    def split(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, 0), (0, chunks * C - S)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, chunks, C, *x.shape[2:]), 1, 0)

    def one(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array | None]:
        hidden_BCD, labels_BC, weights_BC, label_BCD = chunk
        logits_BCV = einsum_f32("bcd,vd->bcv", hidden_BCD, head_VD)
        top_BC = logits_BCV.max(axis=-1, keepdims=True)
        exp_BCV = jnp.exp(logits_BCV - top_BC)
        norm_BC = exp_BCV.sum(axis=-1, keepdims=True)
        label_BC = jnp.take_along_axis(logits_BCV, labels_BC[..., None], axis=-1)
        total += jnp.sum(weights_BC * (jnp.log(norm_BC) + top_BC - label_BC)[..., 0])
        if not with_gradient:
            return total, None
        # d/dhidden = softmax @ head - head[label]; normalized after the product, on D instead of V values.
        mean_BCD = einsum_f32("bcv,vd->bcd", exp_BCV.astype(head_VD.dtype), head_VD) / norm_BC
        gradient_BCD = (mean_BCD - label_BCD) * weights_BC[..., None]
        return total, gradient_BCD.astype(hidden_BCD.dtype)

    # Read before the scan: in it, XLA's CPU compiler would make a float32 copy of the whole head.
    label_BSD = jnp.take(head_VD, labels_BS, axis=0) if with_gradient else None
    pieces = jax.tree.map(split, (hidden_BSD, labels_BS, weights_BS, label_BSD))
    total, gradient = jax.lax.scan(one, jnp.float32(0), pieces)
    if gradient is None:
        return total, None
    return total, jnp.moveaxis(gradient, 0, 1).reshape(B, chunks * C, D)[:, :S]


def reconstruction(
    model: LLM2VecGenModel,
    frozen: Any,
    soft_prompts_BKD: jax.Array,
    answer_BS: jax.Array,
    lengths_B: jax.Array,
    chunk_tokens: int,
    tokens: jax.Array | None = None,
) -> jax.Array:
    """Mean next-token cross-entropy over all answer tokens of the batch, float32; 0 without answer tokens.

    chunk_tokens: number of tokens whose logits are in memory at a time. tokens: divisor of the sum, default the number
    of answer tokens.
    """
    B, S = answer_BS.shape
    hidden_BSD = model.predict_answer(frozen, soft_prompts_BKD, answer_BS, lengths_B)
    weights_BS = (jnp.arange(S) < lengths_B[:, None]).astype(jnp.float32)
    total = fused_cross_entropy(hidden_BSD, model.head_VD(frozen), answer_BS, weights_BS, -(-B * S // chunk_tokens))
    return total / (jnp.maximum(lengths_B.sum(), 1) if tokens is None else tokens)


def alignment(embedding_BE: jax.Array, target_BE: jax.Array) -> jax.Array:
    """Mean squared error over (B, E) between embeddings and teacher targets, float32."""
    return jnp.mean(jnp.square(embedding_BE - target_BE.astype(jnp.float32)))


def cosine_alignment(embedding_BE: jax.Array, target_BE: jax.Array) -> jax.Array:
    """Mean over B of 1 - cosine of embedding and teacher target, float32; 1 for a zero vector.

    The norms of the embeddings are not constrained.
    """
    embedding_BE, target_BE = l2_normalize(embedding_BE), l2_normalize(target_BE.astype(jnp.float32))
    return 1 - jnp.mean(jnp.sum(embedding_BE * target_BE, axis=-1))


ALIGNMENTS = {"mse": alignment, "cosine": cosine_alignment}  # by loss.alignment_function


def loss_fn(
    trainable: Any,
    model: LLM2VecGenModel,
    frozen: Any,
    batch: Mapping[str, Any],
    loss_config: Any,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted sum of reconstruction and alignment, and of the losses of supervised teachers where they are set.

    batch: query, a KVCache (`LLM2VecGenModel.prefill`), or with a LoRA ids (B, T); query_lengths (B,), answer (B, S),
    answer_lengths (B,), target (B, E); in a part of a batch answer_tokens, the divisor of the reconstruction loss.
    loss_config: a LossConfig; a loss with weight 0 is not computed.
    Returns (loss, {"reconstruction_loss", "alignment_loss", ...}), float32.
    """
    embedding_BE, soft_prompts_BKD = model.embed(trainable, frozen, batch["query"], batch["query_lengths"], dropout)
    parts = {"reconstruction_loss": jnp.float32(0), "alignment_loss": jnp.float32(0)}
    align = ALIGNMENTS[loss_config.alignment_function]
    if loss_config.reconstruction:
        parts["reconstruction_loss"] = reconstruction(
            model,
            frozen,
            soft_prompts_BKD,
            batch["answer"],
            batch["answer_lengths"],
            loss_config.chunk_tokens or CHUNK_TOKENS,
            batch.get("answer_tokens"),
        )
    if loss_config.alignment:
        parts["alignment_loss"] = align(embedding_BE, batch["target"])
    loss = loss_config.reconstruction * parts["reconstruction_loss"] + loss_config.alignment * parts["alignment_loss"]
    if supervised.texts(loss_config):
        more, more_parts = supervised.contrastive_losses(
            embedding_BE, trainable, model, frozen, batch, loss_config, align, dropout
        )
        loss, parts = loss + more, parts | more_parts
    return loss, parts
