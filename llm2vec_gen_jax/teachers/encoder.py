"""Text encoder that averages the last hidden states of a backbone."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import not_finite, quote
from llm2vec_gen_jax.data.buckets import bucket_length, length_sorted_batches, pad
from llm2vec_gen_jax.inference.encode import finite
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.execution import Execution, platform_jit
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone


def pool_rows(
    architecture: Architecture,
    frozen: Any,
    causal: bool,
    ids: Sequence[Sequence[int] | NDArray[np.int32]],
    shape: tuple[int, int],
    execution: Execution,
) -> NDArray[np.float32]:
    """Returns the mean-pooled last hidden states (n, D) of n id lists, padded to `shape` (rows, tokens)."""
    assert execution.mesh is not None
    batch = [*ids, *[[]] * (shape[0] - len(ids))]
    lengths_B = np.array([len(row) for row in batch], np.int32)
    arrays = sharding.put_rows((pad(batch, shape[1]), lengths_B), execution.mesh)
    model = LLM2VecGenModel(architecture, 1, 0, architecture.hidden_size, execution=execution)
    return sharding.to_numpy(_mean_pool(model, causal, frozen, *arrays))[: len(ids)]


@functools.partial(platform_jit, static_argnums=(1,))
def _mean_pool(model: LLM2VecGenModel, causal: bool, frozen: Any, ids_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    return model.mean_pool(frozen, ids_BT, lengths_B, causal)


@dataclasses.dataclass(frozen=True)
class Teacher:
    """Encoder of texts as mean-pooled last hidden states of a backbone, the form of the alignment targets.

    frozen: parameters of the backbone with the adapters merged.
    """

    backbone: LoadedBackbone
    frozen: Any
    causal: bool
    batch_size: int = 32
    max_length: int = 512
    show_progress: bool = False

    def encode(self, texts: Sequence[str], instruction: str = "") -> NDArray[np.float32]:
        """Returns the mean-pooled last hidden states (n, D) of texts."""
        ids = self.backbone.tokenizer.encode([join_instruction(instruction, text) for text in texts], self.max_length)

        def on_not_finite(row: int) -> None:
            raise not_finite(f"text {row} (from 0), {quote(texts[row])}", self.backbone.dtype)

        with progress.bar(len(ids), "text", "encode", enabled=self.show_progress) as bar:
            return self.encode_ids(ids, bar, on_not_finite)

    def encode_ids(
        self, ids: Sequence[Sequence[int] | NDArray[np.int32]], bar: Any, on_not_finite: Callable[[int], None]
    ) -> NDArray[np.float32]:
        """`encode` for token ids. bar: updated by texts.

        on_not_finite(index): called for a vector with NaN or infinity; if it returns, the vector is not changed.
        """
        architecture, execution = self.backbone.architecture, self.backbone.execution
        shards = sharding.batch_shards(self.backbone.mesh)
        needed = shards << (-(-len(ids) // shards) - 1).bit_length()  # powers of two, so that few shapes compile
        height = min(-(-self.batch_size // shards) * shards, needed)
        embeddings = np.zeros((len(ids), architecture.hidden_size), np.float32)
        for rows in length_sorted_batches([len(row) for row in ids], height):
            shape = (height, bucket_length(len(ids[rows[0]])))
            batch = [ids[row] for row in rows]
            pooled = pool_rows(architecture, self.frozen, self.causal, batch, shape, execution)
            for row in rows[~finite([pooled])]:
                on_not_finite(int(row))
            embeddings[rows] = pooled
            bar.update(len(rows))
        return embeddings


def join_instruction(instruction: str, text: str) -> str:
    """Returns an instruction and a text joined with a space; the text alone if the instruction is empty."""
    return f"{instruction} {text}" if instruction else text
