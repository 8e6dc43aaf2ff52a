"""What the backbone makes of the compression tokens, layer by layer."""

import functools

import numpy as np

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError, not_finite, quote
from llm2vec_gen_jax.inference.encode import arrange, check_texts, pack_batches, repair, unpack
from llm2vec_gen_jax.model.execution import platform_jit
from llm2vec_gen_jax.parallel import sharding


@functools.partial(platform_jit, static_argnums=(1,))
def _states(model, layers, trainable, frozen, packed):
    return model.states_packed(trainable, frozen, packed, layers)


def compression_states(embedder, texts, layers, batch_size=16, max_length=None, show_progress_bar=False):
    """Returns states (n, len(layers), K, D), float32, of the compression tokens of texts.

    embedder: an LLM2VecGen. layers: 0 for the trained embeddings, l for the result of layer l, num_layers for the last
    hidden states (after the final norm) that the heads read. Raises InputError that names a text of which they are
    not finite.
    """
    model, backbone = embedder.model, embedder.backbone
    K, D = model.num_tokens, model.architecture.hidden_size
    texts = check_texts(texts)
    ids = embedder.tokenize(texts, limit=embedder.text_length(max_length))
    states = np.zeros((len(ids), len(layers), K, D), np.float32)
    shards = sharding.batch_shards(backbone.mesh)
    batches = pack_batches([len(row) + model.num_appended for row in ids], batch_size, shards)

    def read(batch, ids):
        packed, numbers, rows, slots = arrange(batch, ids, model.num_thought_tokens, model.num_appended)
        packed = sharding.put_batch(packed, backbone.mesh)
        found = np.asarray(_states(model, tuple(layers), embedder.trainable, backbone.frozen, packed))
        return unpack([np.moveaxis(found, 0, 2)], rows, slots), numbers, rows

    def alone(text):
        [batch] = pack_batches([len(ids[text]) + model.num_appended], batch_size, shards)
        return read(batch, [ids[text]])[0]

    with progress.bar(len(ids), "text", "read", enabled=show_progress_bar) as bar:
        for batch in batches:
            found, numbers, rows = read(batch, ids)
            for text in repair(found, numbers, rows, alone):
                raise not_finite(f"text {text} (from 0), {quote(texts[text])}", backbone.dtype)
            states[numbers] = found[0]
            bar.update(len(numbers))
    return states


def check_layers(layers, num_layers, key="layers"):
    """Returns layer numbers (integers, or text of a setting) sorted. Raises InputError for one that there is not."""
    try:
        numbers = sorted({int(layer) for layer in layers})
    except ValueError:
        raise InputError(f"{key}={','.join(map(str, layers))}: expected whole numbers, 0 to {num_layers}") from None
    if bad := [layer for layer in numbers if not 0 <= layer <= num_layers]:
        raise InputError(f"{key}: {bad[0]} is not within 0 (embeddings) and {num_layers}, the last layer")
    return numbers
