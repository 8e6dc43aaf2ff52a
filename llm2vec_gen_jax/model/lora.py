"""LoRA trees (Hu et al. 2021): {projection: {"a": (L, in, r), "b": (L, r, out)}}, float32, stacked over layers.

`in` and `out` are the contracted and the remaining dimensions of a kernel: D and N H for a query, N H and D for the
output projection.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from llm2vec_gen_jax.model import quantization
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.backbone import PROJECTIONS, abstract_params


def kernel_dims(architecture: Architecture) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Returns {projection: (in, out)} of one layer, each a tuple of sizes."""
    kernels = abstract_params(architecture)["layers"]
    shapes = {name: kernels[name]["kernel"].value.shape[1:] for name in PROJECTIONS}
    inner = {name: 2 if name == "output" else 1 for name in PROJECTIONS}
    return {name: (shape[: inner[name]], shape[inner[name] :]) for name, shape in shapes.items()}


def init(architecture: Architecture, rank: int, key: jax.Array) -> dict[str, dict[str, jax.Array]]:
    """Returns an initialized tree, as in PEFT: b is 0, a is U(-1/sqrt(in), 1/sqrt(in))."""
    L, tree = architecture.num_layers, {}
    for name, (inner, outer) in kernel_dims(architecture).items():
        key, part = jax.random.split(key)
        bound = math.prod(inner) ** -0.5
        a = jax.random.uniform(part, (L, *inner, rank), jnp.float32, minval=-bound, maxval=bound)
        tree[name] = {"a": a, "b": jnp.zeros((L, rank, *outer), jnp.float32)}
    return tree


def scaled(tree: Any, scale: float) -> dict[str, dict[str, Any]]:
    """Returns the tree with `scale` (alpha / r) folded into b."""
    return {name: {"a": pair["a"], "b": scale * pair["b"]} for name, pair in tree.items()}


def merge(frozen: Any, tree: Any) -> dict[str, Any]:
    """Returns `frozen` with a scaled tree merged: W + A B for each updated kernel, computed in float32.

    The updated kernels are donated: do not use `frozen` afterwards.
    """
    quantization.require_unquantized(frozen, "merging adapters")
    layers = dict(frozen["layers"])
    for name, pair in tree.items():
        layers[name] = layers[name] | {"kernel": _add(layers[name]["kernel"], pair["a"], pair["b"])}
    return {**frozen, "layers": layers}


@functools.partial(jax.jit, donate_argnums=0)
def _add(kernel, a, b):
    """Adds A B in place, one layer at a time: a float32 sum of all layers would need twice the kernel's memory."""

    def add_one(layer, kernel):
        a_IR, b_RO = a[layer].reshape(-1, b.shape[1]), b[layer].reshape(b.shape[1], -1)
        old = jax.lax.dynamic_index_in_dim(kernel, layer, keepdims=False).astype(jnp.float32)
        new = old + jnp.matmul(a_IR, b_RO, precision=jax.lax.Precision.HIGHEST).reshape(old.shape)
        return jax.lax.dynamic_update_index_in_dim(kernel, new.astype(kernel.dtype), layer, axis=0)

    return jax.lax.fori_loop(0, len(kernel), add_one, kernel)
