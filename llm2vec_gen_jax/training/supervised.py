"""Losses with supervised teachers (arXiv 2603.10913, study of hard negatives): extra texts, margin and contrastive.

In addition to the query, three texts can be embedded: a request to repeat the answer, a hard negative question, and a
request to repeat its answer. The losses compare all rows of the global batch; under jit with a sharded batch, XLA
inserts the gather across devices. A text that no loss uses is not embedded.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from llm2vec_gen_jax.data.instructions import REPEAT, instructed
from llm2vec_gen_jax.model.layers import Dropout, l2_normalize
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel

Record = Mapping[str, Any]
ExtraText = Callable[[int, Record], str]  # of (number of the record, record)


def texts(loss_config: Any, instructions: Sequence[str] = (REPEAT,)) -> dict[str, ExtraText]:
    """Returns {name: ExtraText} of the extra texts that the losses of a LossConfig use, in order.

    instructions: requests to repeat an answer, used in turn.
    """
    every: dict[str, ExtraText] = {
        "repeat": lambda number, record: instructed(instructions, number, record["answer"].strip()),
        "negative": lambda _, record: record["negative_question"].strip(),
        "negative_repeat": lambda number, record: instructed(instructions, number, record["negative_answer"].strip()),
    }
    aligned = _aligned(loss_config)
    compared = {
        "repeat": loss_config.contrastive,
        "negative": loss_config.margin,
        "negative_repeat": loss_config.contrastive,
    }
    return {name: text for name, text in every.items() if aligned[name] or compared[name]}


def targets(loss_config: Any) -> dict[str, str]:
    """Returns {name in a batch: column of the answers} of the targets that the losses of a LossConfig use."""
    negative = {"negative_target": "negative_answer"} if _aligned(loss_config)["negative"] else {}
    return {"target": "answer"} | negative


def columns(loss_config: Any) -> tuple[str, ...]:
    """Returns the columns of the responses that the losses of a LossConfig use."""
    names = ["question", *targets(loss_config).values()]
    names += ["negative_question"] if "negative" in texts(loss_config) else []
    names += ["negative_answer"] if "negative_repeat" in texts(loss_config) else []
    return tuple(dict.fromkeys(names))


def embed(
    trainable: Any, model: LLM2VecGenModel, frozen: Any, batch: Mapping[str, Any], dropout: Dropout | None = None
) -> jax.Array:
    """Returns the embeddings (B, X, E) of a batch's extra texts, float32.

    batch: extra_lengths (B, X); extra, a KVCache of B X rows (`LLM2VecGenModel.prefill`), or with a LoRA ids (B, X, T).
    """
    lengths_BX, extra = batch["extra_lengths"], batch["extra"]
    if model.lora_rank:
        extra = extra.reshape(-1, extra.shape[-1])
        if dropout:  # masks independent of those of the queries
            dropout = dataclasses.replace(dropout, keys_L=jax.vmap(jax.random.fold_in, (0, None))(dropout.keys_L, 1))
    embedding, _ = model.embed(trainable, frozen, extra, lengths_BX.ravel(), dropout)
    return embedding.reshape(*lengths_BX.shape, -1)


def margin(question_BE: jax.Array, negative_BE: jax.Array, threshold: float) -> jax.Array:
    """Margin loss between each question and the other questions and all negatives of the batch, float32.

    Mean over B (2B - 1) pairs of relu(threshold^2 - squared Euclidean distance).
    """
    B = len(question_BE)
    candidate_CE = jnp.concatenate([question_BE, negative_BE])
    squared_BC = _square(question_BE)[:, None] + _square(candidate_CE) - 2 * _product(question_BE, candidate_CE)
    short_BC = jax.nn.relu(threshold**2 - jnp.maximum(squared_BC, 0))
    return jnp.sum(short_BC, where=~jnp.eye(B, 2 * B, dtype=bool)) / (B * (2 * B - 1))


def contrastive(
    question_BE: jax.Array,
    positive_BE: jax.Array,
    negative_BE: jax.Array,
    function: str,
    scale: float,
    hardness: float,
) -> jax.Array:
    """InfoNCE: cross-entropy of each question's positive among all positives and negatives of the batch, float32.

    Logits are scale * similarity; function: cosine | dot_product. The probability of the question's negative is
    multiplied by exp(hardness * similarity), without gradient.
    """
    B = len(question_BE)
    candidate_CE = jnp.concatenate([positive_BE, negative_BE])
    if function == "cosine":
        question_BE, candidate_CE = l2_normalize(question_BE), l2_normalize(candidate_CE)
    similarity_BC = _product(question_BE, candidate_CE)
    logits_BC = scale * similarity_BC
    if hardness:
        negative_BC = jnp.eye(B, 2 * B, B, dtype=bool)
        logits_BC += hardness * jnp.where(negative_BC, jax.lax.stop_gradient(similarity_BC), 0)
    return -jnp.trace(jax.nn.log_softmax(logits_BC)) / B


def contrastive_losses(
    question_BE: jax.Array,
    trainable: Any,
    model: LLM2VecGenModel,
    frozen: Any,
    batch: Mapping[str, Any],
    loss_config: Any,
    align: Callable[[jax.Array, jax.Array], jax.Array],
    dropout: Dropout | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the weighted sum of the losses of this module, and the losses by metric name.

    batch: as for `embed`, with target and negative_target (B, E). loss_config: a LossConfig. align: alignment loss of
    two arrays (B, E).
    """
    embedding_BXE = embed(trainable, model, frozen, batch, dropout)
    of = dict(zip(texts(loss_config), jnp.unstack(embedding_BXE, axis=1), strict=True))
    w, aligned = loss_config, _aligned(loss_config)

    def alignment(name, target):
        return aligned[name], lambda: align(of[name], batch[target])

    terms: dict[str, tuple[float, Callable[[], jax.Array]]] = {
        "repeat_alignment_loss": alignment("repeat", "target"),
        "negative_alignment_loss": alignment("negative", "negative_target"),
        "negative_repeat_alignment_loss": alignment("negative_repeat", "negative_target"),
        "margin_loss": (w.margin, lambda: margin(question_BE, of["negative"], w.margin_threshold)),
        "contrastive_loss": (
            w.contrastive,
            lambda: contrastive(
                question_BE,
                of["repeat"],
                of["negative_repeat"],
                w.contrastive_function,
                w.contrastive_scale,
                w.contrastive_hardness,
            ),
        ),
    }
    parts = {name: value() for name, (weight, value) in terms.items() if weight}
    total: Any = sum(terms[name][0] * value for name, value in parts.items())
    return total, parts


def _aligned(loss_config):
    """Returns the alignment weight of each text with its answer's target; weights multiply, as published."""
    negative = loss_config.alignment * loss_config.negative
    return {
        "repeat": loss_config.alignment * loss_config.repeat,
        "negative": negative,
        "negative_repeat": negative * loss_config.repeat,
    }


def _square(x_BE):
    return jnp.sum(jnp.square(x_BE), axis=-1)


def _product(x_BE, y_CE):
    # Differences of distances are small relative to the distances: no bfloat16 products.
    return jnp.einsum("be,ce->bc", x_BE, y_CE, precision=jax.lax.Precision.HIGHEST)
