"""Hidden states of the compression tokens, by layer."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError, not_finite, quote
from llm2vec_gen_jax.inference.encode import arrange, check_texts, pack_batches, repair, unpack
from llm2vec_gen_jax.model.execution import platform_jit
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel, Packed
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone


class Embedder(Protocol):
    """The part of an LLM2VecGen that the lenses use."""

    model: LLM2VecGenModel
    trainable: Any
    backbone: LoadedBackbone

    def tokenize(
        self, texts: Sequence[str], prefix: str = "", limit: int | None = None, first: int = 0
    ) -> list[NDArray[np.int32]]:
        """See LLM2VecGen.tokenize."""

    def text_length(self, max_length: int | None = None) -> int:
        """See LLM2VecGen.text_length."""


@functools.partial(platform_jit, static_argnums=(1,))
def _states(model: LLM2VecGenModel, layers: tuple[int, ...], trainable: Any, frozen: Any, packed: Packed) -> jax.Array:
    return model.states_packed(trainable, frozen, packed, layers)


def compression_states(
    embedder: Embedder,
    texts: str | Iterable[str],
    layers: Sequence[int],
    batch_size: int = 16,
    max_length: int | None = None,
    show_progress_bar: bool = False,
) -> NDArray[np.float32]:
    """Returns hidden states (n, len(layers), K, D) of the compression tokens of texts.

    layers: 0 for the trained embeddings, l for the output of layer l, num_layers for the last hidden states (after the
    final norm), the input of the heads. Raises InputError naming a text whose states are not finite.
    """
    model, backbone = embedder.model, embedder.backbone
    K, D = model.num_tokens, model.architecture.hidden_size
    texts = check_texts(texts)
    ids = embedder.tokenize(texts, limit=embedder.text_length(max_length))
    states = np.zeros((len(ids), len(layers), K, D), np.float32)
    shards = sharding.batch_shards(backbone.mesh)
    batches = pack_batches([len(row) + model.num_appended for row in ids], batch_size, shards)

    def read(batch, ids):
        packed, indices, rows, slots = arrange(batch, ids, model.num_thought_tokens, model.num_appended)
        packed = sharding.put_batch(packed, backbone.mesh)
        packed_states = np.asarray(_states(model, tuple(layers), embedder.trainable, backbone.frozen, packed))
        return unpack([np.moveaxis(packed_states, 0, 2)], rows, slots), indices, rows

    def alone(text):
        [batch] = pack_batches([len(ids[text]) + model.num_appended], batch_size, shards)
        return read(batch, [ids[text]])[0]

    with progress.bar(len(ids), "text", "read", enabled=show_progress_bar) as bar:
        for batch in batches:
            results, indices, rows = read(batch, ids)
            for text in repair(results, indices, rows, alone):
                raise not_finite(f"text {text} (from 0), {quote(texts[text])}", backbone.dtype)
            states[indices] = results[0]
            bar.update(len(indices))
    return states


def check_layers(layers: Iterable[int | str], num_layers: int, key: str = "layers") -> list[int]:
    """Returns layer numbers sorted, without duplicates. Raises InputError for an invalid one."""
    try:
        numbers = sorted({int(layer) for layer in layers})
    except ValueError:
        raise InputError(f"{key}={','.join(map(str, layers))}: expected whole numbers, 0 to {num_layers}") from None
    if bad := [layer for layer in numbers if not 0 <= layer <= num_layers]:
        raise InputError(f"{key}: {bad[0]} is not within 0 (embeddings) and {num_layers} (last layer)")
    return numbers
