"""Trainable parameters: compression tokens and two affine heads."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

HEADS = ("reconstruction", "alignment")


def _uniform(fan_in):
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the initialization of the published heads (torch.nn.Linear)."""

    def initializer(key, shape, dtype=jnp.float32):
        return jax.random.uniform(key, shape, dtype, -(fan_in**-0.5), fan_in**-0.5)

    return initializer


class Compressor(nn.Module):
    """The trainable tree, float32: tokens (M+K, D), reconstruction D -> D, alignment D -> E.

    The M thought tokens precede the K compression tokens. Their hidden states are not used.
    """

    num_thought_tokens: int
    num_tokens: int
    hidden_size: int
    embedding_size: int

    def setup(self) -> None:
        count, D, E = self.num_thought_tokens + self.num_tokens, self.hidden_size, self.embedding_size
        self.tokens = self.param("tokens", nn.initializers.normal(0.02), (count, D), jnp.float32)
        highest = jax.lax.Precision.HIGHEST  # by default TPUs and GPUs round float32 operands
        self.reconstruction = nn.Dense(D, kernel_init=_uniform(D), bias_init=_uniform(D), precision=highest)
        self.alignment = nn.Dense(E, kernel_init=_uniform(D), bias_init=_uniform(D), precision=highest)

    def __call__(self, h_BKD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Applies the reconstruction head, then the alignment head to its output (paper, section 3).

        h_BKD: last hidden states of the compression tokens.
        Returns (embedding_BE, soft_prompts_BKD), float32.
        """
        soft_prompts_BKD = self.reconstruction(h_BKD.astype(jnp.float32))
        return self.alignment(soft_prompts_BKD).mean(axis=1), soft_prompts_BKD


def init_trainable(compressor: Compressor, key: jax.Array, embedding_VD: jax.Array) -> dict[str, Any]:
    """Returns an initialized trainable tree.

    The tokens are the mean of the backbone's embedding table, as for tokens added to a Hugging Face model, plus noise
    with a tenth of its standard deviation.
    """
    key_tokens, key_heads = jax.random.split(key)
    h_BKD = jnp.zeros((1, compressor.num_tokens, compressor.hidden_size), jnp.float32)
    params = compressor.init(key_heads, h_BKD)["params"]
    table = embedding_VD.astype(jnp.float32)
    noise = 0.1 * table.std(axis=0) * jax.random.normal(key_tokens, params["tokens"].shape, jnp.float32)
    return {**params, "tokens": table.mean(axis=0) + noise}
