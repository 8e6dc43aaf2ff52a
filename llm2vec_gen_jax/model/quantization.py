"""A frozen backbone in eight bits: half the memory of bfloat16, products in bfloat16 all the same.

Every projection's kernel becomes int8 and a float32 scale for each of its outputs (symmetric, the largest weight of an
output is 127). Embeddings, output matrix and norms stay bfloat16. The kernels are widened where they are used, a layer
at a time, and the scale is applied to the result, so that what is multiplied is exact but for the rounding of weights.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llm2vec_gen_jax.common.errors import InputError

# How many dimensions of a layer's kernel are summed over, after the layers'. Of what is not here: one.
_SUMMED = {"output": 2}


def is_quantized(frozen):
    """Whether a frozen tree has int8 kernels."""
    return "scale" in frozen["layers"]["query"]


def product_dtype(dtype):
    """Returns the dtype of the activations and products of a backbone loaded as `dtype`."""
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.int8 else dtype)


def summed(name):
    """The dimensions of a stacked kernel that its product sums over."""
    return tuple(range(1, 1 + _SUMMED.get(name, 1)))


def quantize(kernel, name):
    """Returns (int8 kernel, float32 scale without the summed dimensions) of a projection's stacked kernel."""
    axes, kernel = summed(name), kernel.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=axes, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(kernel / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


def scale_sharding(sharding, name):
    """The sharding of a kernel's scale."""
    spec = [axis for dim, axis in enumerate(sharding.spec) if dim not in summed(name)]
    return NamedSharding(sharding.mesh, jax.P(*spec))


def quantize_on_device(kernel, name, sharding):
    """`quantize`, of an array on its mesh, which is given up."""
    put = sharding, scale_sharding(sharding, name)
    return jax.jit(quantize, static_argnums=1, donate_argnums=0, out_shardings=put)(kernel, name)


def describe(frozen):
    """Returns the ShapeDtypeStructs, on their mesh, of a frozen tree of them when it is quantized."""
    layers = dict(frozen["layers"])
    for name, leaves in layers.items():
        if "kernel" in leaves:
            put = leaves["kernel"].sharding
            shapes = jax.eval_shape(lambda kernel, name=name: quantize(kernel, name), leaves["kernel"])
            kernel, scale = (
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
                for x, where in zip(shapes, (put, scale_sharding(put, name)))
            )
            layers[name] = leaves | {"kernel": kernel, "scale": scale}
    return {**frozen, "layers": layers}


def require_unquantized(frozen: Any, what: str) -> None:
    """Raises InputError where a frozen tree is quantized and `what` needs it as it was."""
    if is_quantized(frozen):
        raise InputError(f"{what}: not with an int8 backbone, whose weights are rounded; load it with dtype=bfloat16")
