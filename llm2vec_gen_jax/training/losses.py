"""Reconstruction and alignment (arXiv 2603.10913, section 3), and their weighted sum."""

import functools

import jax
import jax.numpy as jnp

from llm2vec_gen_jax.model.layers import einsum_f32
from llm2vec_gen_jax.training import supervised

CHUNK_TOKENS = 512  # whose logits stay in a processor's cache


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def fused_cross_entropy(hidden_BSD, head_VD, labels_BS, weights_BS, chunks):
    """Sum over tokens of weight * cross-entropy of `hidden @ head.T`, without ever holding all logits.

    The head is frozen, so while a chunk's logits are there its gradient with respect to the hidden states is
    computed too and kept (B S D); the backward pass multiplies it by a number. Exact, nothing is recomputed, and the
    head gets no gradient. chunks: pieces that S is cut into. Returns a float32 scalar.
    """
    return _scan_chunks(hidden_BSD, head_VD, labels_BS, weights_BS, chunks, with_gradient=False)[0]


def _forward(hidden_BSD, head_VD, labels_BS, weights_BS, chunks):
    return _scan_chunks(hidden_BSD, head_VD, labels_BS, weights_BS, chunks, with_gradient=True)


def _backward(chunks, gradient_BSD, scale):
    return (gradient_BSD * scale.astype(gradient_BSD.dtype), None, None, None)


fused_cross_entropy.defvjp(_forward, _backward)


def _scan_chunks(hidden_BSD, head_VD, labels_BS, weights_BS, chunks, with_gradient):
    B, S, D = hidden_BSD.shape
    C = -(-S // chunks)

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, chunks * C - S)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, chunks, C, *x.shape[2:]), 1, 0)

    def one(total, chunk):
        hidden_BCD, labels_BC, weights_BC, label_BCD = chunk
        logits_BCV = einsum_f32("bcd,vd->bcv", hidden_BCD, head_VD)
        top_BC = logits_BCV.max(axis=-1, keepdims=True)
        exp_BCV = jnp.exp(logits_BCV - top_BC)
        norm_BC = exp_BCV.sum(axis=-1, keepdims=True)
        label_BC = jnp.take_along_axis(logits_BCV, labels_BC[..., None], axis=-1)
        total += jnp.sum(weights_BC * (jnp.log(norm_BC) + top_BC - label_BC)[..., 0])
        if not with_gradient:
            return total, None
        # d/dhidden = softmax @ head - head[label]; normalised after the product, on D instead of V numbers.
        mean_BCD = einsum_f32("bcv,vd->bcd", exp_BCV.astype(head_VD.dtype), head_VD) / norm_BC
        gradient_BCD = (mean_BCD - label_BCD) * weights_BC[..., None]
        return total, gradient_BCD.astype(hidden_BCD.dtype)

    # Read before the scan: in it, XLA's CPU compiler would make a float32 copy of the whole head.
    label_BSD = jnp.take(head_VD, labels_BS, axis=0) if with_gradient else None
    pieces = jax.tree.map(split, (hidden_BSD, labels_BS, weights_BS, label_BSD))
    total, gradient = jax.lax.scan(one, jnp.float32(0), pieces)
    if not with_gradient:
        return total, None
    return total, jnp.moveaxis(gradient, 0, 1).reshape(B, chunks * C, D)[:, :S]


def reconstruction(model, frozen, soft_prompts_BKD, answer_BS, lengths_B, chunk_tokens):
    """Mean next-token cross-entropy over all answer tokens of the batch, float32.

    A batch without any answer token has loss 0. chunk_tokens: tokens whose logits are in memory at a time.
    """
    B, S = answer_BS.shape
    hidden_BSD = model.predict_answer(frozen, soft_prompts_BKD, answer_BS, lengths_B)
    weights_BS = (jnp.arange(S) < lengths_B[:, None]).astype(jnp.float32)
    total = fused_cross_entropy(hidden_BSD, model.head_VD(frozen), answer_BS, weights_BS, -(-B * S // chunk_tokens))
    return total / jnp.maximum(lengths_B.sum(), 1)


def alignment(embedding_BE, target_BE):
    """Mean squared error over (B, E) between embeddings and teacher targets, float32."""
    return jnp.mean(jnp.square(embedding_BE - target_BE.astype(jnp.float32)))


def cosine_alignment(embedding_BE, target_BE):
    """Mean over B of 1 - cosine of embedding and teacher target, float32; 1 for a vector of zeros.

    Only directions are compared: what the lengths of the embeddings are is left open.
    """
    embedding_BE, target_BE = (
        supervised.l2_normalize(embedding_BE),
        supervised.l2_normalize(target_BE.astype(jnp.float32)),
    )
    return 1 - jnp.mean(jnp.sum(embedding_BE * target_BE, axis=-1))


ALIGNMENTS = {"mse": alignment, "cosine": cosine_alignment}  # by loss.alignment_function


def loss_fn(trainable, model, frozen, batch, loss_config, dropout=None):
    """Weighted sum of reconstruction and alignment, and of the losses of supervised teachers where they are set.

    batch: query, a KVCache (`LLM2VecGenModel.prefill`), or with a LoRA ids (B, T); query_lengths (B,), answer (B, S),
    answer_lengths (B,), target (B, E). A loss of weight 0 is not computed.
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
