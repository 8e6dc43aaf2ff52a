"""Layers of a transformer block, and the letters of array dimensions.

B batch, T query tokens or positions of a pass, S answer tokens or cache slots, K compression tokens, N query heads,
G key/value heads, H head size, D hidden size, F MLP size, V vocabulary, L layers, E teacher size. Array names in
model code end in their dimensions: q_BTNH.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from llm2vec_gen_jax.model.execution import Execution


def einsum_f32(equation: str, *operands: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    """einsum with float32 accumulation. dtype: of the result.

    float32 operands are not rounded; by default a TPU rounds them to bfloat16, and an NVIDIA GPU to TF32.
    """
    precision = jax.lax.Precision.HIGHEST if operands[0].dtype == jnp.float32 else None
    return jnp.einsum(equation, *operands, precision=precision, preferred_element_type=dtype)


def l2_normalize(x: jax.Array) -> jax.Array:
    """Returns vectors (..., E) of unit length; zero vectors stay zero."""
    return x * jax.lax.rsqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True) + 1e-18)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def product(equation: str, x: jax.Array, y: jax.Array, sums: Any = jnp.float32) -> jax.Array:
    """einsum of two arrays in the dtype of x, accumulated in float32. y: of the same dtype, or int8.

    sums: dtype of the result and of the all-reduce over devices that hold parts of a contracted dimension.

    The gradient is computed in the dtype of x: otherwise the backward pass multiplies a bfloat16 weight by a float32
    cotangent, and XLA converts the product and a copy of the weight to float32. An int8 weight has no gradient and is
    stored as int8 for the backward pass.
    """
    inputs, out = equation.split("->")
    x_dims, y_dims = inputs.split(",")
    sizes = dict(zip(x_dims + y_dims, x.shape + y.shape))
    x, y = _merge_heads(x_dims, x), _merge_heads(y_dims, y.astype(x.dtype))
    result = einsum_f32(equation.replace("nh", "n"), x, y, dtype=sums)
    return result.reshape([sizes[dim] for dim in out])


KEPT = "kept"  # checkpoint name of arrays that train.remat=dots stores for the backward pass


def store(x: jax.Array, execution: Execution) -> jax.Array:
    """Returns x, which `train.remat=dots` stores for the backward pass. For the rules of a custom_vjp: no gradient.

    On a CPU half precision is stored as bits: XLA would make a float32 copy of all layers to slice or update it.
    """
    if execution.target != "cpu" or x.dtype.itemsize != 2:
        return checkpoint_name(x, KEPT)
    bits = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), KEPT)
    return jax.lax.bitcast_convert_type(bits, x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def keep(x: jax.Array, execution: Execution) -> jax.Array:
    """`store` with the gradient of the identity."""
    return store(x, execution)


@keep.defjvp
def _(execution, primals, tangents):
    return store(*primals, execution), tangents[0]


def _merge_heads(dims, x):
    """Merges heads and head size: XLA would contract the two in another order, which needs a transpose."""
    place = dims.find("nh")
    return x if place < 0 else x.reshape(*x.shape[:place], -1, *x.shape[place + 2 :])


def _product_forward(equation, x, y, sums):
    return product(equation, x, y, sums), (x, y)


def _product_backward(equation, sums, operands, cotangent):
    x, y = operands
    inputs, out = equation.split("->")
    x_dims, y_dims = inputs.split(",")
    cotangent = cotangent.astype(x.dtype)
    x_cotangent = product(f"{out},{y_dims}->{x_dims}", cotangent, y, sums).astype(x.dtype)
    if not jnp.issubdtype(y.dtype, jnp.floating):
        return x_cotangent, None
    return x_cotangent, product(f"{x_dims},{out}->{y_dims}", x, cotangent).astype(y.dtype)


product.defvjp(_product_forward, _product_backward)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019), computed in float32."""

    eps: float
    axis_name: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", _partitioned(nn.initializers.ones, self.axis_name), (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale.astype(jnp.float32)).astype(x.dtype)


class Linear(nn.Module):
    """`einsum(equation, x, kernel) + bias`, a projection with named axes.

    shape: of the kernel. axes: logical axis of each kernel dimension, which sharding.py maps to the mesh. bias_dims:
    the kernel dimensions of the bias, if any. The scale of a quantized kernel has all dimensions that are not
    contracted. sums: see `product`.
    """

    equation: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    bias_dims: tuple[int, ...] = ()
    sums: jnp.dtype = jnp.dtype(jnp.float32)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        initializer = nn.initializers.normal(self.shape[0] ** -0.5)
        kernel = self.param("kernel", _partitioned(initializer, *self.axes), self.shape)
        y = product(self.equation, x, kernel, self.sums)
        if self.has_variable("params", "scale"):
            y = y * self.get_variable("params", "scale")
        y = y.astype(x.dtype)
        if self.bias_dims:
            axes = tuple(self.axes[dim] for dim in self.bias_dims)
            shape = tuple(self.shape[dim] for dim in self.bias_dims)
            y = y + self.param("bias", _partitioned(nn.initializers.normal(0.02), *axes), shape)
        return y


@struct.dataclass
class Dropout:
    """Dropout of a training pass. keys_L: a random key for each layer; inside a layer, a single key."""

    keys_L: jax.Array
    lora: float = struct.field(pytree_node=False)  # rate for the inputs of LoRA updates
    attention: float = struct.field(pytree_node=False)  # rate for attention weights


def apply_dropout(x: jax.Array, key: Any, rate: float) -> jax.Array:
    """Sets each element to zero with probability `rate` and scales the others by 1 / (1 - rate)."""
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0) if rate else x


def lora_delta(equation: str, x: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the LoRA update (Hu et al. 2021) of the projection `equation` of x: x A B, in x's dtype.

    a: the kernel's contracted dimensions, then the rank. b: the rank, then the kernel's other dimensions.
    """
    inputs, out = equation.split("->")
    x_dims, kernel_dims = inputs.split(",")
    inner = "".join(dim for dim in kernel_dims if dim not in out)
    outer = kernel_dims.removeprefix(inner)
    batch = x_dims.removesuffix(inner)
    # Rank first: the gradient of `a` then transposes the narrow cotangent instead of x.
    a = jnp.moveaxis(a, -1, 0).astype(x.dtype)
    down = product(f"{x_dims},r{inner}->{batch}r", x, a).astype(x.dtype)
    return product(f"{batch}r,r{outer}->{out}", down, b.astype(x.dtype)).astype(x.dtype)


def rope_angles(positions_BT: jax.Array, head_dim: int, theta: float, scaling: Any) -> tuple[jax.Array, jax.Array]:
    """Returns (cos_BTH, sin_BTH), float32, of rotary embeddings (Su et al. 2021; halves rotated as in Llama).

    scaling: None, or a RopeScaling, applied as in Llama 3.1.
    """
    frequency_H = theta ** -(jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    if scaling is not None:
        factor, low, high, length = map(float, dataclasses.astuple(scaling))
        wavelength_H = 2 * jnp.pi / frequency_H
        blend = jnp.clip((length / wavelength_H - low) / (high - low), 0.0, 1.0)
        frequency_H = frequency_H * (blend + (1 - blend) / factor)
    angle_BTH = positions_BT[..., None].astype(jnp.float32) * frequency_H
    angle_BTH = jnp.concatenate([angle_BTH, angle_BTH], axis=-1)
    return jnp.cos(angle_BTH), jnp.sin(angle_BTH)


def apply_rope(x_BTNH: jax.Array, rope: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates queries or keys by the angles of `rope_angles`, in float32. Returns x's dtype."""
    cos, sin = (angle_BTH[:, :, None, :] for angle_BTH in rope)
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x_BTNH.astype(jnp.float32) * cos + turned * sin).astype(x_BTNH.dtype)


def _partitioned(initializer, *axes):
    return nn.with_logical_partitioning(initializer, axes)
