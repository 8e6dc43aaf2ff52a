"""Execution of a backbone: mesh, attention kernel, compiler options and rematerialization.

No setting changes the result, except for rounding.
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

# Rematerialization policies. none: all activations of a layer are stored for the backward pass. dots: only the results
# of matrix products; norms, rotations, attention weights (the largest arrays) and activation functions are recomputed,
# which is cheap. block: only the input of a layer; the layer is recomputed.
REMAT = ("none", "dots", "block")
DEFAULT_REMAT = "dots"

AMPERE, HOPPER = (8, 0), (9, 0)  # CUDA compute capabilities
_MIN_FUSED_TOKENS = 64  # a fused kernel is slower than XLA for fewer tokens
# Near the memory limit XLA recomputes matrix products without lowering the peak (50% more FLOPs for Qwen3-8B, batch 32,
# remat=dots, on an H100). train.remat controls recomputation.
_GPU_OPTIONS = {"xla_disable_hlo_passes": "rematerialization"}
# Gathers the weights of the next layer while a layer runs, with two sets of gathered weights in memory.
_FSDP_OPTIONS = {"xla_gpu_enable_pipelined_all_gather": True, "xla_gpu_enable_while_loop_double_buffering": True}


@dataclasses.dataclass(frozen=True)
class Execution:
    """mesh: of the arrays, None for one device. attention: one of ATTENTION. remat: one of REMAT.

    platform: "cpu", "gpu" or "tpu", if programs are compiled for another platform than that of the mesh.
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
        """The platform of compiled programs: "cpu", "gpu" or "tpu"."""
        return self.platform or (self.mesh.devices.flat[0].platform if self.mesh else jax.default_backend())

    @property
    def compiler_options(self) -> dict[str, Any] | None:
        """XLA options of all programs on this platform and mesh; None for the defaults."""
        if self.target != "gpu":
            return None
        gathers = self.mesh is not None and self.mesh.shape["fsdp"] > 1
        return _known_options(self._device, tuple((_GPU_OPTIONS | (_FSDP_OPTIONS if gathers else {})).items()))

    def check(self, head_dim: int, dtype: jnp.dtype) -> None:
        """Raises InputError if the attention kernel of the settings does not support the backbone."""
        if reason := self._unsupported(self.attention, head_dim, jnp.dtype(dtype)):
            raise InputError(f"kernels.attention={self.attention}: {reason}; pass kernels.attention=auto")

    def attention_kernel(self, tokens: int, head_dim: int, dtype: jnp.dtype, cached: bool, dropout: bool) -> str:
        """Returns the attention kernel, one of ATTENTION except auto, for a pass over `tokens` tokens.

        cached: whether the pass continues a cache. XLA reads the cache in place; a fused kernel would need a copy of
        it. No fused kernel supports dropout.
        """
        if dropout:
            return "xla"
        if self.attention != "auto":
            return self.attention
        kernel = {"gpu": "cudnn", "tpu": "pallas"}.get(self.target, "xla")
        if cached or tokens < _MIN_FUSED_TOKENS or self._unsupported(kernel, head_dim, dtype):
            return "xla"
        return kernel

    def shares_prefix(self, head_dim: int, dtype: jnp.dtype) -> bool:
        """Returns whether texts of a packed row can attend to a common prefix.

        Splash attention cannot: it only compares segments.
        """
        return self.attention_kernel(_MIN_FUSED_TOKENS, head_dim, dtype, False, False) != "pallas"

    def storage_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """Returns the dtype of arrays of `dtype` that are stacked over layers or cache slots.

        float32 for half precision on a CPU: XLA's CPU compiler would make a float32 copy of the stack in every layer to
        slice or update it. The values are the same.
        """
        return jnp.dtype(jnp.float32 if self.target == "cpu" and jnp.dtype(dtype).itemsize == 2 else dtype)

    def reduction_dtype(self, dtype: jnp.dtype) -> jnp.dtype:
        """Returns the dtype of the all-reduce over partial products of tensor-parallel devices.

        Each partial product is accumulated in float32; half precision halves the communication.
        """
        split = self.mesh is not None and self.mesh.shape["tensor"] > 1
        return jnp.dtype(dtype if split and self.target != "cpu" else jnp.float32)  # not supported on CPUs

    @property
    def _device(self):
        return self.mesh.devices.flat[0] if self.mesh else jax.devices()[0]

    def _unsupported(self, kernel: str, head_dim: int, dtype: jnp.dtype) -> str | None:
        """Returns the reason why a kernel does not support a head size and dtype on these devices, or None."""
        if kernel == "cudnn":
            capability = compute_capability(self._device)
            if capability is not None and capability < AMPERE:
                return f"needs an NVIDIA GPU of compute capability 8.0 or later, found {capability}"
            if capability is None and self._device.platform == "gpu":
                return f"needs an NVIDIA GPU, found {self._device.device_kind}"
            if dtype.itemsize != 2:
                return f"supports float16 and bfloat16, not {dtype}"
            largest = 256 if capability is None or capability >= HOPPER else 128
            if head_dim % 8 or head_dim > largest:
                return f"supports head sizes that are multiples of 8 up to {largest}, not {head_dim}"
        if kernel == "pallas" and self.target == "tpu" and dtype == jnp.float16:
            return "does not support float16 on a TPU"
        return None


def first_remat(setting: str) -> str:
    """Returns the initial policy: `train.remat=auto` may change it after the memory of the programs is known."""
    return DEFAULT_REMAT if setting == "auto" else setting


def compute_capability(device: Any) -> tuple[int, ...] | None:
    """Returns the CUDA compute capability of a device, for example (9, 0); None if it is not an NVIDIA GPU."""
    parts = str(getattr(device, "compute_capability", "")).split(".")
    return tuple(map(int, parts)) if len(parts) == 2 and all(part.isdecimal() for part in parts) else None


class PlatformJit:
    """A function jitted with the compiler options of each call's devices. jitted(execution): its `jax.jit`."""

    def __init__(self, function: Callable, static_argnums: tuple[int, ...]) -> None:
        @functools.cache
        def jitted(execution):
            return jax.jit(function, static_argnums=(0, *static_argnums), compiler_options=execution.compiler_options)

        functools.update_wrapper(self, function)
        self.jitted = jitted

    def __call__(self, model: Any, *arguments: Any) -> Any:
        return self.jitted(model.execution)(model, *arguments)

    def compile(self, model: Any, *arguments: Any) -> jax.stages.Compiled:
        """Compiles for arguments without running, or reads the program from JAX's persistent compilation cache.

        A later call with the same shapes, dtypes and shardings runs this program: JAX neither traces nor compiles then.
        """
        return self.jitted(model.execution).lower(model, *arguments).compile()


def platform_jit(function: Callable, static_argnums: tuple[int, ...] = ()) -> PlatformJit:
    """`jax.jit` with the compiler options of each call's devices.

    The first argument of `function` is static and has an `execution`: an LLM2VecGenModel or a Backbone.
    """
    return PlatformJit(function, static_argnums)


@functools.cache
def _known_options(device, options) -> dict[str, Any]:
    """Returns the options that the installed version of XLA supports."""
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
