"""The method: read a query, compress it, reconstruct the answer, align with the teacher (arXiv 2603.10913)."""

import dataclasses

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
    """Texts packed into rows, each followed by its appended tokens; S is the most texts that fit a row.

    ids_BT: token ids, -1 - m for the appended token m, 0 in padding. segments_BT: the text of its row that a token is
    of, counted from 1; 0 in padding. positions_BT: a token's place in its text. first_BS: the slot of each text's
    first compression token; 0 where there is no text.
    """

    ids_BT: jax.Array
    segments_BT: jax.Array
    positions_BT: jax.Array
    first_BS: jax.Array


@dataclasses.dataclass(frozen=True)
class LLM2VecGenModel:
    """LLM2Vec-Gen as pure functions of two trees: `trainable` (tokens and heads, float32) and `frozen` (the LLM).

    A LoRA on the encoder's pass (`lora_rank` > 0) is in `trainable` too; the decoder stays the frozen LLM.

    Ids and lengths are right-padded: ids_BT int32, lengths_B real tokens of each row (0 is an empty text).
    """

    architecture: Architecture
    num_tokens: int
    num_thought_tokens: int
    embedding_size: int
    lora_rank: int = 0
    lora_scale: float = 0.0  # alpha / rank
    execution: Execution = Execution()

    @property
    def compressor(self):
        """The Linen module of the trainable tree."""
        a = self.architecture
        return Compressor(self.num_thought_tokens, self.num_tokens, a.hidden_size, self.embedding_size)

    @property
    def shapes(self):
        """What makes two models' trees different: a dict of numbers."""
        return {key: value for key, value in vars(self).items() if key not in ("architecture", "execution")} | {
            "architecture": dataclasses.asdict(self.architecture)
        }

    @property
    def num_appended(self):
        """Tokens that follow every query: thought tokens, then compression tokens."""
        return self.num_thought_tokens + self.num_tokens

    def init(self, key, frozen):
        """Returns a fresh trainable tree, float32."""
        trainable = init_trainable(self.compressor, key, frozen["embedding"])
        if self.lora_rank:
            trainable["lora"] = lora.init(self.architecture, self.lora_rank, jax.random.fold_in(key, 1))
        return trainable

    def encode(self, trainable, frozen, ids_BT, lengths_B, dropout=None):
        """The embedding of each query, in one causal pass (section 3, "encode").

        The compression tokens follow the last real token of each row, so padding stays behind them and unseen.
        dropout: a layers.Dropout while a LoRA trains.
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

    def encode_packed(self, trainable, frozen, packed, soft_prompts):
        """`encode` of several texts in a row, of which none sees another.

        soft_prompts: whether they are wanted; without them the mean is taken before the heads, which is the same,
        because the heads are affine, and K times cheaper. packed: a Packed.
        Returns (embedding_BSE, soft_prompts_BSKD or None), float32; unread where there is no text.
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

    def states_packed(self, trainable, frozen, packed, layers):
        """What the backbone makes of the compression tokens in each of `layers` (0: their embeddings, L: h).

        packed: a Packed, as for `encode_packed`. Returns states (len(layers), B, S, K, D) in the backbone's dtype.
        """
        x_BTD, mask, index_BP = self._unpacked(trainable, frozen, packed)
        states = self._states(frozen, x_BTD, packed.positions_BT, mask, index_BP, self._updates(trainable))
        return states[jnp.array(layers)].reshape(len(layers), *packed.first_BS.shape, self.num_tokens, -1)

    def states_of_text(self, frozen, ids_BT, index_BP, layers):
        """What the backbone makes of the slots index_BP of texts alone: states (len(layers), B, P, D)."""
        x_BTD = self._embed_real(frozen, ids_BT, index_BP.max(axis=1) + 1)
        return self._states(frozen, x_BTD, _positions(*ids_BT.shape), CAUSAL, index_BP)[jnp.array(layers)]

    def _unpacked(self, trainable, frozen, packed):
        """Returns (embeddings x_BTD, AttentionMask, slots index_BP of all compression tokens) of a Packed."""
        token_BTD = self._embed(frozen, jnp.maximum(packed.ids_BT, 0))
        appended_BTD = trainable["tokens"].astype(token_BTD.dtype)[jnp.maximum(-1 - packed.ids_BT, 0)]
        x_BTD = jnp.where((packed.ids_BT < 0)[..., None], appended_BTD, token_BTD)
        x_BTD = jnp.where((packed.segments_BT > 0)[..., None], x_BTD, 0)  # as in `_embed_real`
        index_BSK = packed.first_BS[..., None] + jnp.arange(self.num_tokens)
        mask = AttentionMask(causal=True, segments_BT=packed.segments_BT)
        return x_BTD, mask, index_BSK.reshape(len(index_BSK), -1)

    def prefill(self, frozen, ids, lengths, slots):
        """Keys and values of texts (..., T) of `lengths` (...), padded to `slots`, one shape for all later passes.

        Without a LoRA they do not depend on the trainable tree, so training computes them without gradient.
        """
        ids_BT = ids.reshape(-1, ids.shape[-1])
        B, T = ids_BT.shape
        _, cache = self._run(frozen, self._embed_real(frozen, ids_BT, lengths.ravel()), _positions(B, T), CAUSAL)
        return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, slots - T), (0, 0))), cache)

    def embed(self, trainable, frozen, query, lengths_B, dropout=None):
        """`compress` of a KVCache, `encode` of ids (B, T)."""
        if isinstance(query, KVCache):
            return self.compress(trainable, frozen, query, lengths_B)
        return self.encode(trainable, frozen, query, lengths_B, dropout)

    def compress(self, trainable, frozen, cache, lengths_B):
        """`encode` of prefilled queries: only the appended tokens run, so only they are differentiated.

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

    def heads(self, trainable, h_BKD):
        """The two heads: (embedding_BE, soft_prompts_BKD) of last hidden states h_BKD."""
        return self.compressor.apply({"params": trainable}, h_BKD)

    def predict_answer(self, frozen, soft_prompts_BKD, ids_BS, lengths_B):
        """Teacher-forced reading of the answers by the frozen LLM, from soft prompts (section 3, "reconstruct").

        Returns hidden_BSD: position s predicts answer token s, so the last soft prompt predicts the first token.
        """
        B, S = ids_BS.shape
        # The last answer token predicts nothing, but with it the length K + S is even for even K: flash attention on
        # NVIDIA GPUs takes no odd lengths in training.
        answer_BSD = self._embed_real(frozen, ids_BS, lengths_B)
        x_BTD = jnp.concatenate([soft_prompts_BKD.astype(answer_BSD.dtype), answer_BSD], axis=1)
        hidden_BTD, _ = self._run(frozen, x_BTD, _positions(B, self.num_tokens + S), CAUSAL)
        return hidden_BTD[:, self.num_tokens - 1 : -1]

    def hidden_states(self, frozen, ids_BT, lengths_B, causal, updates=None, dropout=None):
        """Last hidden states (B, T, D) of texts alone, causal or bidirectional.

        updates: a LoRA tree with its scale folded in. dropout: a layers.Dropout. Both are for teachers that train.
        """
        mask = AttentionMask(causal=causal, lengths_B=lengths_B)
        x_BTD = self._embed_real(frozen, ids_BT, lengths_B)
        return self._run(frozen, x_BTD, _positions(*ids_BT.shape), mask, None, updates, dropout)[0]

    def mean_pool(self, frozen, ids_BT, lengths_B, causal, updates=None, dropout=None):
        """The teacher: mean over real tokens of the last hidden state (section 3; LLM2Vec, BehnamGhader 2024).

        frozen: the backbone, or the backbone with adapters merged. updates, dropout: as for `hidden_states`.
        Returns (B, D) float32; zeros for an empty text.
        """
        hidden_BTD = self.hidden_states(frozen, ids_BT, lengths_B, causal, updates, dropout)
        real_BT = (jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]).astype(jnp.float32)
        total_BD = layers.einsum_f32("btd,bt->bd", hidden_BTD.astype(jnp.float32), real_BT)
        return total_BD / jnp.maximum(lengths_B, 1)[:, None]

    def head_VD(self, frozen):
        """The frozen LLM's output matrix (V, D)."""
        return self._backbone.apply({"params": frozen}, method="head_VD")

    def logits(self, frozen, hidden):
        """The frozen LLM's float32 logits (..., V) of last hidden states (..., D)."""
        return self._backbone.apply({"params": frozen}, hidden, method="logits")

    @property
    def _backbone(self):
        return Backbone(self.architecture, self.execution)

    def _embed(self, frozen, ids):
        return self._backbone.apply({"params": frozen}, ids, method="embed")

    def _embed_real(self, frozen, ids_BT, lengths_B):
        """Embeddings, and zeros in the padding: an overflow there would reach real tokens, as zero times NaN is NaN."""
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
