"""Texts to vectors in jitted batches: sorted by length, padded to a few shapes, order restored."""

import functools

import jax
import numpy as np

from llm2vec_gen_jax import progress, sharding
from llm2vec_gen_jax.data import pad


@functools.partial(jax.jit, static_argnums=0)
def _encode(model, trainable, frozen, ids_BT, lengths_B):
    return model.encode(trainable, frozen, ids_BT, lengths_B)


def ladder(length):
    """The least of 8, 12, 16, 24, 32, 48, 64, ... that is not below `length`: the padded lengths that compile."""
    step = 8
    while step < length:
        if step + step // 2 >= length:
            return step + step // 2
        step *= 2
    return step


def encode_ids(model, trainable, backbone, ids, batch_size, soft_prompts, show_progress):
    """Returns (embeddings (n, E), soft prompts (n, K, D) or None), float32, of a list of id lists."""
    K, D = model.num_tokens, model.architecture.hidden_size
    embeddings = np.zeros((len(ids), model.embedding_size), np.float32)
    prompts = np.zeros((len(ids), K, D), np.float32) if soft_prompts else None
    for rows, arrays in batches(ids, batch_size, backbone.mesh, show_progress):
        embedding_BE, soft_prompts_BKD = _encode(model, trainable, backbone.frozen, *arrays)
        embeddings[rows] = np.asarray(embedding_BE)[: len(rows)]
        if soft_prompts:
            prompts[rows] = np.asarray(soft_prompts_BKD)[: len(rows)]
    return embeddings, prompts


def batches(ids, batch_size, mesh, show_progress):
    """Yields (rows, (ids_BT, lengths_B) on the mesh) of a list of id lists, the longest first.

    rows: which of them the first len(rows) rows of the batch are; the others are empty.
    """
    shards = sharding.batch_shards(mesh)
    rows_per_batch = -(-min(batch_size, 1 << (len(ids) - 1).bit_length()) // shards) * shards
    order = np.argsort([-len(row) for row in ids], kind="stable")
    with progress.bar(len(ids), "text", "encode", enabled=show_progress) as bar:
        for start in range(0, len(ids), rows_per_batch):
            rows = order[start : start + rows_per_batch]
            batch = [ids[row] for row in rows] + [[]] * (rows_per_batch - len(rows))
            lengths_B = np.array([len(row) for row in batch], np.int32)
            yield rows, sharding.put_batch((pad(batch, ladder(lengths_B.max())), lengths_B), mesh)
            bar.update(len(rows))
