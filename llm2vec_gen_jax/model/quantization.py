"""int8 weight-only quantization of a frozen backbone: half the memory of bfloat16, with bfloat16 products.

Each projection kernel becomes int8 with one float32 scale per output (symmetric, absolute maximum 127). Embeddings,
output matrix and norms stay bfloat16. A kernel is converted to bfloat16, which is exact, when its layer runs, and the
scale is applied to the product.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from llm2vec_gen_jax.common.errors import InputError

_NUM_CONTRACTED = {"output": 2}  # contracted dimensions of a layer's kernel, if not one


def is_quantized(frozen: Any) -> bool:
    """Whether a frozen tree has int8 kernels."""
    return "scale" in frozen["layers"]["query"]


def product_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Returns the dtype of activations and products of a backbone loaded as `dtype`."""
    return jnp.dtype(jnp.bfloat16 if dtype == jnp.int8 else dtype)


def contracted_axes(name: str) -> tuple[int, ...]:
    """Returns the contracted axes of a projection's stacked kernel."""
    return tuple(range(1, 1 + _NUM_CONTRACTED.get(name, 1)))


def quantize(kernel: jax.Array, name: str) -> tuple[jax.Array, jax.Array]:
    """Returns (int8 kernel, float32 scale without the contracted axes) of a projection's stacked kernel."""
    axes, kernel = contracted_axes(name), kernel.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=axes, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    return jnp.round(kernel / scale).astype(jnp.int8), jnp.squeeze(scale, axes)


def scale_sharding(sharding: NamedSharding, name: str) -> NamedSharding:
    """Returns the sharding of a kernel's scale."""
    spec = [axis for dim, axis in enumerate(sharding.spec) if dim not in contracted_axes(name)]
    return NamedSharding(sharding.mesh, jax.P(*spec))


def quantize_on_device(kernel: jax.Array, name: str, sharding: NamedSharding) -> tuple[jax.Array, jax.Array]:
    """`quantize` for an array on a mesh. `kernel` is donated."""
    shardings = sharding, scale_sharding(sharding, name)
    return jax.jit(quantize, static_argnums=1, donate_argnums=0, out_shardings=shardings)(kernel, name)


def describe(frozen: Any) -> dict[str, Any]:
    """Returns the ShapeDtypeStructs of the quantized tree for a frozen tree of ShapeDtypeStructs with shardings."""
    layers = dict(frozen["layers"])
    for name, leaves in layers.items():
        if "kernel" in leaves:
            sharding = leaves["kernel"].sharding
            shapes = jax.eval_shape(lambda kernel, name=name: quantize(kernel, name), leaves["kernel"])
            kernel, scale = (
                jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
                for x, where in zip(shapes, (sharding, scale_sharding(sharding, name)))
            )
            layers[name] = leaves | {"kernel": kernel, "scale": scale}
    return {**frozen, "layers": layers}


def require_unquantized(frozen: Any, what: str) -> None:
    """Raises InputError if a frozen tree is quantized. what: the operation that needs the original weights."""
    if is_quantized(frozen):
        raise InputError(f"{what}: not with an int8 backbone, whose weights are rounded. Load it with dtype=bfloat16")
