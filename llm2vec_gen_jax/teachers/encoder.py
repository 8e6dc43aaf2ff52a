"""A backbone as a text encoder: mean of the last hidden states."""

import dataclasses
import functools
from typing import Any

import numpy as np

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import not_finite, quote
from llm2vec_gen_jax.data.batches import pad
from llm2vec_gen_jax.data.buckets import bucket_length
from llm2vec_gen_jax.inference.encode import finite
from llm2vec_gen_jax.model.execution import platform_jit
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import (
    LoadedBackbone,
)


def pool_rows(architecture, frozen, causal, ids, shape, execution):
    """Returns the llm2vec teacher's vectors (n, D), float32, of n id lists, padded to `shape` rows and tokens."""
    batch = [*ids, *[[]] * (shape[0] - len(ids))]
    lengths_B = np.array([len(row) for row in batch], np.int32)
    arrays = sharding.put_rows((pad(batch, shape[1]), lengths_B), execution.mesh)
    model = LLM2VecGenModel(architecture, 1, 0, architecture.hidden_size, execution=execution)
    return sharding.to_numpy(_mean_pool(model, causal, frozen, *arrays))[: len(ids)]


@functools.partial(platform_jit, static_argnums=(1,))
def _mean_pool(model, causal, frozen, ids_BT, lengths_B):
    return model.mean_pool(frozen, ids_BT, lengths_B, causal)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A backbone whose last hidden states are averaged, as the alignment targets are computed.

    frozen: its parameters, with the adapters merged.
    """

    backbone: LoadedBackbone
    frozen: Any
    causal: bool
    batch_size: int = 32
    max_length: int = 512
    show_progress: bool = False

    def encode(self, texts, instruction=""):
        """Returns the mean-pooled last hidden states (n, D) of texts."""
        ids = self.backbone.tokenizer.encode([join_instruction(instruction, text) for text in texts], self.max_length)
        architecture, execution = self.backbone.architecture, self.backbone.execution
        shards = sharding.batch_shards(execution.mesh)
        few = shards << (-(-len(ids) // shards) - 1).bit_length()  # rows: powers of two, so that few shapes compile
        height = min(-(-self.batch_size // shards) * shards, few)
        order = np.argsort([-len(row) for row in ids], kind="stable")
        embeddings = np.zeros((len(ids), architecture.hidden_size), np.float32)
        with progress.bar(len(ids), "text", "encode", enabled=self.show_progress) as bar:
            for start in range(0, len(ids), height):
                rows = order[start : start + height]
                shape = (height, bucket_length(len(ids[rows[0]])))
                batch = [ids[row] for row in rows]
                found = pool_rows(architecture, self.frozen, self.causal, batch, shape, execution)
                for row in rows[~finite([found])]:
                    raise not_finite(f"text {row} (from 0), {quote(texts[row])}", self.backbone.dtype)
                embeddings[rows] = found
                bar.update(len(rows))
        return embeddings


def join_instruction(instruction, text):
    """Returns an instruction and a text, joined with a space; the text alone where the instruction is empty."""
    return f"{instruction} {text}" if instruction else text
