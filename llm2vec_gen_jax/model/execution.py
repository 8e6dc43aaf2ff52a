"""How a backbone runs: on which devices, by which kernels and compiler options, and what its backward pass keeps.

Nothing here changes what is computed.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, SingleDeviceSharding

from llm2vec_gen_jax.common.errors import InputError, nearest

ATTENTION = ("auto", "xla", "cudnn", "pallas")

# What the backward pass keeps of a layer. none: everything is kept. dots: the results of its matrix products, no more;
# norms, rotations, the attention weights (the largest of all) and activations are computed again, which costs next to
# nothing. block: only what goes into a layer is kept, and the layer is computed again.
REMAT = ("none", "dots", "block")
DEFAULT_REMAT = "dots"

AMPERE, HOPPER = (8, 0), (9, 0)  # CUDA compute capabilities
_SHORTEST_FUSED = 64  # tokens from which a fused kernel is faster than XLA's products
# Near the memory limit XLA recomputes matrix products without lowering the peak (Qwen3-8B, batch 32, remat=dots, H100:
# half again as many FLOPs); what is recomputed is decided by train.remat.
_GPU_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
# The weights of the next layer are gathered while a layer runs. Two sets of gathered weights are in memory then.
_FSDP_OPTIONS = {"xla_gpu_enable_pipelined_all_gather": True, "xla_gpu_enable_while_loop_double_buffering": True}


@dataclasses.dataclass(frozen=True)
class Execution:
    """mesh: where the arrays are, None on one device. attention: one of ATTENTION. remat: one of REMAT.

    platform: "cpu", "gpu" or "tpu", where programs are for another one than that of the mesh's devices.
    """

    mesh: Mesh | None = None
    attention: str = "auto"
    remat: str = DEFAULT_REMAT
    platform: str | None = None

    def __post_init__(self) -> None:
        if self.attention not in ATTENTION:
            raise InputError(f"kernels.attention={self.attention}: unknown{nearest(str(self.attention), ATTENTION)}")
        needed = {"cudnn": ("gpu",), "pallas": ("tpu", "cpu")}.get(self.attention)
        if needed and self.target not in needed:
            raise InputError(
                f"kernels.attention={self.attention}: is not for {self.target} devices; pass kernels.attention=auto"
            )

    @property
    def target(self) -> str:
        """The platform that programs are for: "cpu", "gpu" or "tpu"."""
        return self.platform or (self.mesh.devices.flat[0].platform if self.mesh else jax.default_backend())

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """Options of the compiler for every program, by platform and mesh; None for its defaults."""
        if self.target != "gpu":
            return None
        gathers = self.mesh is not None and self.mesh.shape["fsdp"] > 1
        return _known_options(self._device, tuple((_GPU_OPTIONS | (_FSDP_OPTIONS if gathers else {})).items()))

    def check(self, head_dim: int, dtype: jnp.dtype) -> None:
        """Raises InputError where the attention kernel that was asked for does not take the backbone."""
        if reason := self._unsupported(self.attention, head_dim, jnp.dtype(dtype)):
            raise InputError(f"kernels.attention={self.attention}: {reason}; pass kernels.attention=auto")

    def attention_kernel(self, tokens: int, head_dim: int, dtype: jnp.dtype, cached: bool, dropout: bool) -> str:
        """Returns which of ATTENTION but auto a pass over so many tokens takes. cached: whether it continues a cache.

        A pass of few tokens over a cache has few scores, and XLA reads the cache in place; a kernel would need a copy
        of it. No kernel supports dropout.
        """
        if dropout:
            return "xla"
        if self.attention != "auto":
            return self.attention
        kernel = {"gpu": "cudnn", "tpu": "pallas"}.get(self.target, "xla")
        if cached or tokens < _SHORTEST_FUSED or self._unsupported(kernel, head_dim, dtype):
            return "xla"
        return kernel

    def storage_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """Returns the dtype in which arrays of `dtype` are stacked over layers or slots.

        XLA's CPU compiler neither slices half precision nor updates a slice of it: it would make a float32 copy of the
        whole stack for every layer. So there the stack is float32 to begin with, and holds the same numbers.
        """
        return jnp.dtype(jnp.float32 if self.target == "cpu" and jnp.dtype(dtype).itemsize == 2 else dtype)

    def reduction_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """Returns the dtype in which tensor-parallel devices add their parts of a product of `dtype`.

        Each part is accumulated in float32; half precision halves the bytes that the devices exchange.
        """
        split = self.mesh is not None and self.mesh.shape["tensor"] > 1
        return jnp.dtype(dtype if split and self.target != "cpu" else jnp.float32)  # CPUs have no such products

    @property
    def _device(self):
        return self.mesh.devices.flat[0] if self.mesh else jax.devices()[0]

    def _unsupported(self, kernel: str, head_dim: int, dtype: jnp.dtype) -> str | None:
        """Returns why a kernel does not take heads of `head_dim` numbers of `dtype` on these devices, or None."""
        if kernel == "cudnn":
            capability = compute_capability(self._device)
            if capability is not None and capability < AMPERE:
                return f"needs an NVIDIA GPU of compute capability 8.0 or later, and this one has {capability}"
            if capability is None and self._device.platform == "gpu":
                return f"needs an NVIDIA GPU, and this is {self._device.device_kind}"
            if dtype.itemsize != 2:
                return f"takes float16 and bfloat16, not {dtype}"
            largest = 256 if capability is None or capability >= HOPPER else 128
            if head_dim % 8 or head_dim > largest:
                return f"takes heads of a multiple of 8 up to {largest} numbers, not {head_dim}"
        if kernel == "pallas" and self.target == "tpu" and dtype == jnp.float16:
            return "takes no float16 on a TPU"
        return None


def first_remat(setting: str) -> str:
    """Returns the policy to build programs with before `train.remat=auto` is settled by their memory."""
    return DEFAULT_REMAT if setting == "auto" else setting


def compute_capability(device) -> tuple[int, ...] | None:
    """Returns the CUDA compute capability of a device, (9, 0) for instance; None of other than NVIDIA's."""
    parts = str(getattr(device, "compute_capability", "")).split(".")
    return tuple(map(int, parts)) if len(parts) == 2 and all(part.isdecimal() for part in parts) else None


def platform_jit(function: Callable, static_argnums: tuple[int, ...] = ()) -> Callable:
    """`jax.jit` with the compiler options of the devices that each call is for.

    The first argument of `function` is static and has an `execution`: a Model or a Backbone.
    """

    @functools.cache
    def jitted(execution):
        return jax.jit(function, static_argnums=(0, *static_argnums), compiler_options=execution.compiler_options)

    @functools.wraps(function)
    def call(model, *arguments):
        return jitted(model.execution)(model, *arguments)

    call.jitted = jitted  # type: ignore[attr-defined]
    return call


@functools.cache
def _known_options(device, options) -> dict[str, Any]:
    """Returns those of the options that this version of the compiler knows: they come and go between versions."""
    here = SingleDeviceSharding(device)
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=here)

    def known(name, value):
        try:
            jax.jit(lambda x: x, out_shardings=here).lower(number).compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            return False
        return True

    return {name: value for name, value in options if known(name, value)}
