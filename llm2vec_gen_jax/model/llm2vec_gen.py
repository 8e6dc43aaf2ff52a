"""LLM2Vec-Gen (arXiv 2603.10913) as pure functions: encode queries, reconstruct answers, pool teacher states."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from llm2vec_gen_jax.model import layers, lora
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.attention import CAUSAL, AttentionMask, KVCache
from llm2vec_gen_jax.model.backbone import Backbone
from llm2vec_gen_jax.model.compressor import Compressor, init_trainable
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.parallel import sharding


@struct.dataclass
class Packed:
    """Texts packed into rows, each followed by its appended tokens. S is the maximum number of texts per row.

    ids_BT: token ids, -1 - m for the appended token m, 0 in padding. segments_BT: index of a token's text in its row,
    from 1; SHARED for the tokens at the start of a row that all its texts start with; 0 in padding. positions_BT:
    position of a token in its text. first_BS: index of the first compression token of each text; 0 if there is no text.
    """

    ids_BT: jax.Array
    segments_BT: jax.Array
    positions_BT: jax.Array
    first_BS: jax.Array


@dataclasses.dataclass(frozen=True)
class LLM2VecGenModel:
    """LLM2Vec-Gen as pure functions of two trees: `trainable` (tokens and heads, float32) and `frozen` (the LLM).

    With `lora_rank` > 0, `trainable` includes a LoRA of the encoder; the decoder is always the frozen LLM.

    Texts are right-padded: ids_BT int32, lengths_B tokens of each row without padding (0 for an empty text).
    """

    architecture: Architecture
    num_tokens: int
    num_thought_tokens: int
    embedding_size: int
    lora_rank: int = 0
    lora_scale: float = 0.0  # alpha / rank
    execution: Execution = Execution()

    @property
    def compressor(self) -> Compressor:
        """The Linen module of the trainable tree."""
        a = self.architecture
        return Compressor(self.num_thought_tokens, self.num_tokens, a.hidden_size, self.embedding_size)

    @property
    def shapes(self) -> dict[str, Any]:
        """The settings that determine the shapes and the meaning of the trees."""
        return {key: value for key, value in vars(self).items() if key not in ("architecture", "execution")} | {
            "architecture": self.architecture.to_dict()
        }

    @property
    def num_appended(self) -> int:
        """Number of tokens appended to a query: thought tokens, then compression tokens."""
        return self.num_thought_tokens + self.num_tokens

    def init(self, key: jax.Array, frozen: Any) -> dict[str, Any]:
        """Returns an initialized trainable tree, float32."""
        trainable = init_trainable(self.compressor, key, frozen["embedding"])
        if self.lora_rank:
            trainable["lora"] = lora.init(self.architecture, self.lora_rank, jax.random.fold_in(key, 1))
        return trainable

    def encode(
        self,
        trainable: Any,
        frozen: Any,
        ids_BT: jax.Array,
        lengths_B: jax.Array,
        dropout: layers.Dropout | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Encodes queries in one causal pass (section 3, "encode").

        The appended tokens directly follow the last token of each row, so causal attention masks the padding.
        dropout: for training of a LoRA.
        Returns (embedding_BE, soft_prompts_BKD), float32.
        """
        B, T = ids_BT.shape
        width = T + self.num_appended
        token_BT = self._embed(frozen, jnp.pad(ids_BT, ((0, 0), (0, self.num_appended))))
        offset_BT = jnp.arange(width) - lengths_B[:, None]
        appended_BTD = trainable["tokens"].astype(token_BT.dtype)[jnp.clip(offset_BT, 0, self.num_appended - 1)]
        x_BTD = jnp.where((offset_BT >= 0)[..., None], appended_BTD, token_BT)
        x_BTD = jnp.where((offset_BT < self.num_appended)[..., None], x_BTD, 0)  # as in `_embed_real`
        updates = self._updates(trainable)
        hidden_BTD, _ = self._run(frozen, x_BTD, _positions(B, width), CAUSAL, None, updates, dropout)
        index_BK = lengths_B[:, None] + jnp.arange(self.num_thought_tokens, self.num_appended)
        return self.heads(trainable, jnp.take_along_axis(hidden_BTD, index_BK[..., None], axis=1))

    def encode_packed(
        self, trainable: Any, frozen: Any, packed: Packed, soft_prompts: bool
    ) -> tuple[jax.Array, jax.Array | None]:
        """`encode` for several texts per row, which do not attend to each other.

        soft_prompts: whether to return them. Without them the mean is taken before the heads, which is equivalent
        because the heads are affine, and K times cheaper.
        Returns (embedding_BSE, soft_prompts_BSKD or None), float32; unspecified values where there is no text.
        """
        x_BTD, mask, index_BP = self._unpacked(trainable, frozen, packed)
        hidden_BTD, _ = self._run(frozen, x_BTD, packed.positions_BT, mask, None, self._updates(trainable))
        (B, S), D = packed.first_BS.shape, hidden_BTD.shape[-1]
        h_BSKD = jnp.take_along_axis(hidden_BTD, index_BP[..., None], axis=1).reshape(B, S, -1, D)
        if not soft_prompts:
            h_BSKD = h_BSKD.astype(jnp.float32).mean(axis=2, keepdims=True)
        embedding_E, soft_prompts_KD = self.heads(trainable, h_BSKD.reshape(B * S, -1, D))
        embedding_BSE = embedding_E.reshape(B, S, -1)
        return embedding_BSE, soft_prompts_KD.reshape(B, S, -1, D) if soft_prompts else None

    def states_packed(self, trainable: Any, frozen: Any, packed: Packed, layers: Sequence[int]) -> jax.Array:
        """Hidden states of the compression tokens after each of `layers` (0: embeddings, L: last hidden states).

        Returns states (len(layers), B, S, K, D) in the backbone's dtype.
        """
        x_BTD, mask, index_BP = self._unpacked(trainable, frozen, packed)
        states = self._states(frozen, x_BTD, packed.positions_BT, mask, index_BP, self._updates(trainable))
        return states[jnp.array(layers)].reshape(len(layers), *packed.first_BS.shape, self.num_tokens, -1)

    def states_of_text(self, frozen: Any, ids_BT: jax.Array, index_BP: jax.Array, layers: Sequence[int]) -> jax.Array:
        """Hidden states (len(layers), B, P, D) of texts, without appended tokens, at the positions index_BP."""
        x_BTD = self._embed_real(frozen, ids_BT, index_BP.max(axis=1) + 1)
        return self._states(frozen, x_BTD, _positions(*ids_BT.shape), CAUSAL, index_BP)[jnp.array(layers)]

    def _unpacked(self, trainable, frozen, packed):
        """Returns (embeddings x_BTD, AttentionMask, indices index_BP of all compression tokens) of a Packed."""
        token_BTD = self._embed(frozen, jnp.maximum(packed.ids_BT, 0))
        appended_BTD = trainable["tokens"].astype(token_BTD.dtype)[jnp.maximum(-1 - packed.ids_BT, 0)]
        x_BTD = jnp.where((packed.ids_BT < 0)[..., None], appended_BTD, token_BTD)
        x_BTD = jnp.where((packed.segments_BT != 0)[..., None], x_BTD, 0)  # as in `_embed_real`
        index_BSK = packed.first_BS[..., None] + jnp.arange(self.num_tokens)
        mask = AttentionMask(causal=True, segments_BT=packed.segments_BT)
        return x_BTD, mask, index_BSK.reshape(len(index_BSK), -1)

    def prefill(self, frozen: Any, ids: jax.Array, lengths: jax.Array, slots: int | None = None) -> KVCache:
        """Returns the KVCache of texts (..., T) of `lengths` (...), padded to `slots`, default T.

        Without a LoRA it does not depend on the trainable tree, so training computes it without gradients.
        """
        ids_BT = ids.reshape(-1, ids.shape[-1])
        B, T = ids_BT.shape
        _, cache = self._run(frozen, self._embed_real(frozen, ids_BT, lengths.ravel()), _positions(B, T), CAUSAL)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, (slots or T) - T), (0, 0))), cache)

    def embed(
        self,
        trainable: Any,
        frozen: Any,
        query: jax.Array | KVCache,
        lengths_B: jax.Array,
        dropout: layers.Dropout | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """`compress` for a KVCache, `encode` for ids (B, T). With a LoRA only ids."""
        if isinstance(query, KVCache):
            assert not self.lora_rank, "the keys and values of the queries depend on the LoRA"
            return self.compress(trainable, frozen, query, lengths_B)
        return self.encode(trainable, frozen, query, lengths_B, dropout)

    def compress(
        self, trainable: Any, frozen: Any, cache: KVCache, lengths_B: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """`encode` for prefilled queries: computes and differentiates only the appended tokens.

        Returns (embedding_BE, soft_prompts_BKD), float32.
        """
        cache = jax.lax.stop_gradient(cache)
        slots = cache.k_LBGSH.shape[3]
        x_MD = trainable["tokens"].astype(frozen["embedding"].dtype)
        x_BMD = jnp.broadcast_to(x_MD, (len(lengths_B), *x_MD.shape))
        positions_BM = lengths_B[:, None] + jnp.arange(self.num_appended)
        mask = AttentionMask(causal=True, cache_BS=jnp.arange(slots) < lengths_B[:, None])
        hidden_BMD, _ = self._run(frozen, x_BMD, positions_BM, mask, cache)
        return self.heads(trainable, hidden_BMD[:, self.num_thought_tokens :])

    def heads(self, trainable: Any, h_BKD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Applies the two heads to last hidden states. Returns (embedding_BE, soft_prompts_BKD)."""
        return self.compressor.apply({"params": trainable}, h_BKD)  # type: ignore[return-value]

    def predict_answer(
        self, frozen: Any, soft_prompts_BKD: jax.Array, ids_BS: jax.Array, lengths_B: jax.Array
    ) -> jax.Array:
        """Teacher forcing of the answers after soft prompts, with the frozen LLM (section 3, "reconstruct").

        Returns hidden_BSD: position s predicts answer token s, so the last soft prompt predicts the first token.
        """
        B, S = ids_BS.shape
        # The last answer token predicts nothing, but makes the length K + S even for even K: flash attention on NVIDIA
        # GPUs does not support odd lengths in training.
        answer_BSD = self._embed_real(frozen, ids_BS, lengths_B)
        x_BTD = jnp.concatenate([soft_prompts_BKD.astype(answer_BSD.dtype), answer_BSD], axis=1)
        hidden_BTD, _ = self._run(frozen, x_BTD, _positions(B, self.num_tokens + S), CAUSAL)
        return hidden_BTD[:, self.num_tokens - 1 : -1]

    def hidden_states(
        self,
        frozen: Any,
        ids_BT: jax.Array,
        lengths_B: jax.Array,
        causal: bool,
        updates: Any = None,
        dropout: layers.Dropout | None = None,
    ) -> jax.Array:
        """Last hidden states (B, T, D) of texts without appended tokens, with causal or bidirectional attention.

        updates: a scaled LoRA tree. It and dropout are for the training of teachers.
        """
        mask = AttentionMask(causal=causal, lengths_B=lengths_B)
        x_BTD = self._embed_real(frozen, ids_BT, lengths_B)
        return self._run(frozen, x_BTD, _positions(*ids_BT.shape), mask, None, updates, dropout)[0]

    def mean_pool(
        self,
        frozen: Any,
        ids_BT: jax.Array,
        lengths_B: jax.Array,
        causal: bool,
        updates: Any = None,
        dropout: layers.Dropout | None = None,
    ) -> jax.Array:
        """Teacher embeddings: mean of the last hidden states, without padding (section 3; BehnamGhader et al. 2024).

        frozen: the backbone, with adapters merged if the teacher has any. updates, dropout: see `hidden_states`.
        Returns (B, D) float32; zeros for an empty text.
        """
        hidden_BTD = self.hidden_states(frozen, ids_BT, lengths_B, causal, updates, dropout)
        real_BT = (jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]).astype(jnp.float32)
        total_BD = layers.einsum_f32("btd,bt->bd", hidden_BTD.astype(jnp.float32), real_BT)
        return total_BD / jnp.maximum(lengths_B, 1)[:, None]

    def head_VD(self, frozen: Any) -> jax.Array:
        """The frozen LLM's output matrix (V, D)."""
        return self._backbone.apply({"params": frozen}, method="head_VD")

    def logits(self, frozen: Any, hidden: jax.Array) -> jax.Array:
        """The frozen LLM's float32 logits (..., V) of last hidden states (..., D)."""
        return self._backbone.apply({"params": frozen}, hidden, method="logits")

    @property
    def _backbone(self):
        return Backbone(self.architecture, self.execution)

    def _embed(self, frozen, ids):
        return self._backbone.apply({"params": frozen}, ids, method="embed")

    def _embed_real(self, frozen, ids_BT, lengths_B):
        """Embeddings, zero in the padding: an overflow there would reach all tokens, because zero times NaN is NaN."""
        real_BT = jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]
        return jnp.where(real_BT[..., None], self._embed(frozen, ids_BT), 0)

    def _updates(self, trainable):
        return lora.scaled(trainable["lora"], self.lora_scale) if self.lora_rank else None

    def _states(self, frozen, x_BTD, positions_BT, mask, index_BP, updates=None):
        arguments = sharding.constrain_batch(x_BTD, self.execution.mesh), positions_BT, mask, index_BP, updates
        return self._backbone.apply({"params": frozen}, *arguments, method="states")

    def _run(self, frozen, x_BTD, positions_BT, mask, cache: KVCache | None = None, updates=None, dropout=None):
        x_BTD = sharding.constrain_batch(x_BTD, self.execution.mesh)
        return self._backbone.apply({"params": frozen}, x_BTD, positions_BT, mask, cache, updates, dropout)


def _positions(B, T):
    return jnp.broadcast_to(jnp.arange(T), (B, T))
