"""The frozen LLM: maps embeddings to last hidden states and keys/values."""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llm2vec_gen_jax.model import layers
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.attention import CAUSAL, AttentionMask, KVCache, attend
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.parallel.sharding import constrain_batch, constrain_vocab

PROJECTIONS = ("query", "key", "value", "output", "gate", "up", "down")  # that a LoRA may update

_keep_products = jax.checkpoint_policies.save_only_these_names(layers.KEPT)


class Block(nn.Module):
    """One pre-norm transformer layer, for `scan`.

    Returns (carry, (keys and values of this pass, hidden states at the positions index_BP or None)).
    """

    architecture: Architecture
    execution: Execution
    dtype: jnp.dtype  # of the computation; between layers x_BTD has execution.storage_dtype

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        cache: KVCache | None,
        lora: Any,
        dropout: layers.Dropout | None,
        rope: tuple[jax.Array, jax.Array],
        mask: AttentionMask,
        index_BP: jax.Array | None,
    ) -> tuple[jax.Array, tuple[KVCache, jax.Array | None]]:
        a, stacked = self.architecture, self.execution.storage_dtype(self.dtype)
        D, N, G, H, F = a.hidden_size, a.num_heads, a.num_kv_heads, a.head_dim, a.intermediate_size
        sums, rate = self.execution.reduction_dtype(self.dtype), dropout.attention if dropout else 0.0
        *lora_keys, attention_key = jax.random.split(dropout.keys_L, 8) if dropout else [None] * 8

        def kept(x):
            return layers.keep(x, self.execution)

        def project(name, x, equation, shape, axes, bias_dims=()):
            y = layers.Linear(equation, shape, axes, bias_dims, sums, name=name)(x)
            if lora is None or name not in lora:
                return y
            x = layers.apply_dropout(x, lora_keys[PROJECTIONS.index(name)], dropout.lora) if dropout else x
            return y + layers.lora_delta(equation, x, lora[name]["a"], lora[name]["b"])

        def heads(name, x, count, axis):
            axes, bias_dims = ("embed", axis, "head_dim"), (1, 2) if a.qkv_bias else ()
            return project(name, x, "btd,dnh->btnh", (D, count, H), axes, bias_dims)

        def norm(name, axis):
            return layers.RMSNorm(a.norm_eps, axis, name=name)

        x_BTD = constrain_batch(x_BTD.astype(self.dtype), self.execution.mesh)
        y_BTD = norm("attention_norm", "norm")(x_BTD)
        q_BTNH = heads("query", y_BTD, N, "heads")
        k_BTGH = heads("key", y_BTD, G, "kv_heads")
        v_BTGH = kept(heads("value", y_BTD, G, "kv_heads"))
        if a.qk_norm:
            q_BTNH = norm("query_norm", "head_dim")(kept(q_BTNH))
            k_BTGH = norm("key_norm", "head_dim")(kept(k_BTGH))
        q_BTNH, k_BTGH = layers.apply_rope(q_BTNH, rope), layers.apply_rope(k_BTGH, rope)
        if not a.qk_norm:  # a rotation's gradient does not depend on what is rotated
            q_BTNH, k_BTGH = kept(q_BTNH), kept(k_BTGH)
        mixed_BTNH = attend(q_BTNH, k_BTGH, v_BTGH, mask, cache, self.execution, attention_key, rate)
        output_BTD = project("output", mixed_BTNH, "btnh,nhd->btd", (N, H, D), ("heads", "head_dim", "embed"))
        x_BTD = kept(constrain_batch(x_BTD + output_BTD, self.execution.mesh))

        y_BTD = norm("mlp_norm", "norm")(x_BTD)
        gate_BTF = kept(project("gate", y_BTD, "btd,df->btf", (D, F), ("embed", "mlp")))
        up_BTF = kept(project("up", y_BTD, "btd,df->btf", (D, F), ("embed", "mlp")))
        active_BTF = nn.silu(gate_BTF.astype(jnp.float32)) * up_BTF.astype(jnp.float32)
        x_BTD = x_BTD + project("down", active_BTF.astype(self.dtype), "btf,fd->btd", (F, D), ("mlp", "embed"))
        x_BTD = x_BTD.astype(stacked)
        own = KVCache(*(jnp.swapaxes(x, 1, 2).astype(stacked) for x in (k_BTGH, v_BTGH)))
        return x_BTD, (own, None if index_BP is None else _at(x_BTD, index_BP))


class Backbone(nn.Module):
    """A causal LM as functions of its parameters: `Backbone(a).apply({"params": frozen}, ..., method="embed")`.

    Layers are stacked on a leading axis and run in a scan, so that compile time does not grow with depth.
    """

    architecture: Architecture
    execution: Execution = Execution()

    def setup(self):
        a = self.architecture
        table = nn.with_logical_partitioning(nn.initializers.normal(0.02), ("vocab", "embed"))
        self.embedding = self.param("embedding", table, (a.vocab_size, a.hidden_size))
        if not a.tied_embeddings:
            self.head = self.param("head", table, (a.vocab_size, a.hidden_size))
        # XLA's CPU compiler copies all layers to float32 to slice bfloat16, so they are sliced as uint16.
        as_bits = self.execution.target == "cpu" and not self.is_initializing()
        block = nn.map_variables(Block, "params", _to_floats) if as_bits else Block
        if self.execution.remat != "none":
            policy = _keep_products if self.execution.remat == "dots" else None
            block = nn.remat(block, policy=policy, prevent_cse=False)
        scan = nn.scan(
            block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, 0, 0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=a.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
            check_constancy_invariants=False,  # the check traces the block once more
        )
        self.layers = (nn.map_variables(scan, "params", _to_bits) if as_bits else scan)(
            a, self.execution, self.embedding.dtype
        )
        self.final_norm = layers.RMSNorm(a.norm_eps, "norm")

    def embed(self, ids: jax.Array) -> jax.Array:
        """Returns the input embeddings (..., D) of token ids (...)."""
        return constrain_batch(jnp.take(self.embedding, ids, axis=0), self.execution.mesh)

    def decode_step(
        self,
        x_B1D: jax.Array,
        positions_B1: jax.Array,
        mask: AttentionMask,
        layer_params: Sequence[Any],
        caches: Sequence[KVCache],
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """Runs one new token per row, with a Python loop over the layers instead of a scan.

        On NVIDIA GPUs a scan copies the weights and the cache of each layer, which triples the memory traffic of
        decoding. Compile time grows with depth. layer_params: parameters of each layer (`unstack_layers`).
        caches: a KVCache of each layer, B G S H.
        Returns (hidden_B1D after the final norm, KVCache of this token for each layer).
        """
        a, new = self.architecture, []
        rope = layers.rope_angles(positions_B1, a.head_dim, a.rope_theta, a.rope_scaling)
        block = Block(a, self.execution, self.embedding.dtype, parent=None)
        for params, cache in zip(layer_params, caches, strict=True):
            x_B1D, (own, _) = block.apply({"params": params}, x_B1D, cache, None, None, rope, mask, None)
            new.append(own)
        return self.final_norm(constrain_batch(x_B1D, self.execution.mesh)), tuple(new)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        mask: AttentionMask,
        cache: KVCache | None = None,
        lora: Any = None,
        dropout: layers.Dropout | None = None,
    ) -> tuple[jax.Array, KVCache]:
        """Runs all layers on embeddings x_BTD.

        cache: of the prefix that the pass continues, not modified. lora: a scaled LoRA tree (see lora.py).
        Returns (hidden_BTD after the final norm, KVCache of this pass only, L B G T H, in execution.storage_dtype).
        """
        x_BTD, (own, _) = self._run(x_BTD, cache, lora, dropout, positions_BT, mask, None)
        return self.final_norm(constrain_batch(x_BTD, self.execution.mesh)), own

    def states(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        mask: AttentionMask,
        index_BP: jax.Array,
        lora: Any = None,
    ) -> jax.Array:
        """Runs all layers and stores the hidden states at the positions index_BP only.

        Returns states (L + 1, B, P, D): embeddings, then the output of each layer, the last after the final norm
        (`hidden_states` of transformers).
        """
        first_BPD = _at(x_BTD, index_BP)
        _, (_, states_LBPD) = self._run(x_BTD, None, lora, None, positions_BT, mask, index_BP)
        states_LBPD = states_LBPD.astype(x_BTD.dtype)
        last_BPD = self.final_norm(states_LBPD[-1])
        return jnp.concatenate([first_BPD[None], states_LBPD[:-1], last_BPD[None]])

    def _run(self, x_BTD, cache, lora, dropout, positions_BT, mask, index_BP):
        a, dtype = self.architecture, x_BTD.dtype
        rope = layers.rope_angles(positions_BT, a.head_dim, a.rope_theta, a.rope_scaling)
        x_BTD = x_BTD.astype(self.execution.storage_dtype(dtype))
        x_BTD, made = self.layers(x_BTD, cache, lora, dropout, rope, mask, index_BP)
        return x_BTD.astype(dtype), made

    def head_VD(self) -> jax.Array:
        """Returns the output matrix (V, D), which is the embedding table if they are tied."""
        head_VD = self.embedding if self.architecture.tied_embeddings else self.head
        return constrain_vocab(head_VD, self.execution.mesh)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Returns float32 logits (..., V) of last hidden states (..., D)."""
        return layers.einsum_f32("...d,vd->...v", hidden, self.head_VD())


def _at(x_BTD, index_BP):
    return jnp.take_along_axis(x_BTD, index_BP[..., None], axis=1)


def _to_bits(params):
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.bfloat16 else x, params)


def _to_floats(params):
    return jax.tree.map(lambda x: jax.lax.bitcast_convert_type(x, jnp.bfloat16) if x.dtype == jnp.uint16 else x, params)


def unstack_layers(stacked: Any) -> tuple[Any, ...]:
    """Splits a tree that is stacked on a leading layer axis into one tree per layer."""
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda x, layer=layer: x[layer], stacked) for layer in range(count))


@functools.lru_cache(maxsize=8)
def abstract_params(architecture: Architecture) -> Any:
    """Returns the parameter tree of a backbone as ShapeDtypeStructs boxed with their logical axes."""
    backbone = Backbone(architecture)

    def init(key):
        x_BTD = jnp.zeros((1, 1, architecture.hidden_size))
        return backbone.init(key, x_BTD, jnp.zeros((1, 1), jnp.int32), CAUSAL)["params"]

    return jax.eval_shape(init, jax.random.key(0))
