"""The two losses of LLM2Vec (BehnamGhader et al. 2024, sections 2.2 and 2.3) and their batches.

MNTP, masked next token prediction, adapts a causal LLM to bidirectional attention: a masked token is predicted from the
state of the preceding position. Unsupervised SimCSE (Gao et al. 2021) contrasts the mean state of a text, under two
dropout masks, with those of other texts.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import MntpConfig, SimcseConfig
from llm2vec_gen_jax.data import batches, buckets, examples
from llm2vec_gen_jax.model.layers import Dropout, einsum_f32, l2_normalize
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.training.losses import fused_cross_entropy

_CHUNK_TOKENS = 512  # predictions whose logits are in memory at a time


def mntp(
    model: LLM2VecGenModel,
    updates: Any,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    causal: bool = False,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Mean cross-entropy of the masked tokens, each predicted from the preceding position, float32.

    batch: masked text (B, S), text_lengths (B,), positions (B, M) > 0 and label (B, M) of the masked tokens.
    updates: the trained LoRA, including its scale.
    """
    hidden_BSD = model.hidden_states(frozen, batch["text"], batch["text_lengths"], causal, updates, dropout)
    before_BMD = jnp.take_along_axis(hidden_BSD, batch["positions"][..., None] - 1, axis=1)
    label_BM = batch["label"]
    chunks = -(-label_BM.size // _CHUNK_TOKENS)
    ones = jnp.ones(label_BM.shape, jnp.float32)
    return fused_cross_entropy(before_BMD, model.head_VD(frozen), label_BM, ones, chunks) / label_BM.size


def simcse(
    model: LLM2VecGenModel,
    updates: Any,
    frozen: Any,
    batch: Mapping[str, jax.Array],
    scale: float,
    causal: bool = False,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Cross-entropy of matching each text's first vector with its second among those of the batch, float32.

    batch: text (B, T), text_lengths (B,). Logits are scale * cosine of mean-pooled vectors.
    """
    ids, lengths = (jnp.concatenate([batch[name], batch[name]]) for name in ("text", "text_lengths"))
    pooled = model.mean_pool(frozen, ids, lengths, causal, updates, dropout)
    first_BD, second_BD = jnp.split(l2_normalize(pooled), 2)
    logits_BB = scale * einsum_f32("bd,cd->bc", first_BD, second_BD)
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(logits_BB)))


class MaskedBlocks:
    """MNTP batches by step: blocks of S tokens of the concatenated corpus, with a new random mask in every step.

    M = probability * S tokens of each block, but never the first, are masked: all replaced by the mask token, or
    (masking "bert") 80 % by the mask token, 10 % by a random token and 10 % unchanged. A pure function of (seed, step).
    """

    def __init__(
        self,
        ids: Iterable[Sequence[int] | np.ndarray],
        config: MntpConfig,
        mask_id: int,
        vocab_size: int,
        seed: int,
        part: int,
        parts: int,
    ) -> None:
        S = config.max_length
        stream = np.concatenate([np.asarray(row, np.int32) for row in ids])
        self.digest = examples.digest_ids([stream]).hexdigest()[:16]
        self.blocks = stream[: len(stream) // S * S].reshape(-1, S)
        if len(self.blocks) < config.batch_size:
            raise InputError(
                f"the corpus has {len(stream)} tokens, {len(self.blocks)} blocks of mntp.max_length={S}; a batch needs "
                f"mntp.batch_size={config.batch_size}: use more text, or lower one of them"
            )
        self.config, self.mask_id, self.vocab_size, self.seed = config, mask_id, vocab_size, seed
        self.count = min(max(round(config.mask_probability * S), 1), S - 1)  # the first token is never masked
        self.local = batches.rows_of_part(config.batch_size, part, parts)

    def __len__(self) -> int:
        return 2**40  # unlimited epochs

    def rows(self, step: int) -> np.ndarray:
        """Returns the indices of the blocks of a step."""
        per_epoch = len(self.blocks) // self.config.batch_size
        epoch, index = divmod(step, per_epoch)
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.blocks))
        return order[index * self.config.batch_size :][: self.config.batch_size]

    def width(self, step: int) -> int:
        """Returns the tokens per row of a step."""
        return self.blocks.shape[1]

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng([self.seed, 1, step])
        label_BS = self.blocks[self.rows(step)]
        B, S = label_BS.shape
        # The first token has no position before it.
        positions_BM = (
            np.sort(random.random((B, S - 1)).argpartition(self.count - 1, axis=1)[:, : self.count], axis=1) + 1
        )
        label_BM = np.take_along_axis(label_BS, positions_BM, axis=1)
        shown_BM = np.full_like(label_BM, self.mask_id)
        if self.config.masking == "bert":
            draw_BM = random.random(label_BM.shape)
            other_BM = random.integers(0, self.vocab_size, label_BM.shape, np.int32)
            shown_BM = np.where(draw_BM < 0.8, shown_BM, np.where(draw_BM < 0.9, other_BM, label_BM))
        text_BS = label_BS.copy()
        np.put_along_axis(text_BS, positions_BM, shown_BM, axis=1)
        arrays = {"text": text_BS, "text_lengths": np.full(B, S, np.int32)}
        arrays |= {"positions": positions_BM.astype(np.int32), "label": label_BM}
        return {name: array[self.local] for name, array in arrays.items()}


class Sentences:
    """SimCSE batches by step: texts of similar length, padded to a few lengths. A pure function of (seed, step)."""

    def __init__(
        self,
        ids: Iterable[Sequence[int] | np.ndarray],
        config: SimcseConfig,
        seed: int,
        part: int,
        parts: int,
    ) -> None:
        self.ids = [np.asarray(row, np.int32) for row in ids]
        if len(self.ids) < config.batch_size:
            raise InputError(
                f"the corpus has {len(self.ids)} texts; a batch needs simcse.batch_size={config.batch_size}: "
                "use more text, or lower it"
            )
        self.digest = examples.digest_ids(self.ids).hexdigest()[:16]
        lengths = [len(row) for row in self.ids]
        self.schedule = batches.BatchSchedule(lengths, np.ones(len(lengths), int), config.batch_size, 8, True, seed)
        self.local = batches.rows_of_part(config.batch_size, part, parts)

    def __len__(self) -> int:
        return 2**40  # unlimited epochs

    def rows(self, step: int) -> np.ndarray:
        """Returns the indices of the texts of a step."""
        return self.schedule[step].rows

    def width(self, step: int) -> int:
        """Returns the tokens per row of a step, including padding."""
        return self.schedule[step].T

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        ids = [self.ids[row] for row in self.rows(step)[self.local]]
        return {"text": buckets.pad(ids, self.schedule[step].T), "text_lengths": np.array([*map(len, ids)], np.int32)}


def sentences(texts: Iterable[str], shortest: int = 20) -> list[str]:
    """Splits texts into sentences and lines; drops those with fewer than `shortest` characters, and duplicates."""
    pieces = (piece.strip() for text in texts for piece in re.split(r"(?<=[.!?。！？])\s+|\n+", text))
    return list(dict.fromkeys(piece for piece in pieces if len(piece) >= shortest))
