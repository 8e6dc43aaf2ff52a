"""How a backbone runs: on which devices, by which kernels, and what its backward pass keeps. Never what it computes."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm2vec_gen_jax.errors import InputError, nearest

ATTENTION = ("auto", "xla", "cudnn", "pallas")

# What the backward pass keeps of a layer. none: everything is kept. dots: the results of its matrix products, no more;
# norms, rotations, the attention weights (the largest of all) and activations are computed again, which costs next to
# nothing. block: only what goes into a layer is kept, and the layer is computed again.
REMAT = ("none", "dots", "block")


@dataclasses.dataclass(frozen=True)
class Execution:
    """mesh: where the arrays are, None on one device. attention: one of ATTENTION. remat: one of REMAT.

    platform: "cpu", "gpu" or "tpu", where programs are for another one than that of the mesh's devices.
    """

    mesh: Mesh | None = None
    attention: str = "auto"
    remat: str = "dots"
    platform: str | None = None

    def __post_init__(self):
        if self.attention not in ATTENTION:
            raise InputError(f"kernels.attention={self.attention}: unknown{nearest(str(self.attention), ATTENTION)}")
        needed = {"cudnn": ("gpu",), "pallas": ("tpu", "cpu")}.get(self.attention)
        if needed and self.target not in needed:
            raise InputError(
                f"kernels.attention={self.attention}: is not for {self.target} devices; pass kernels.attention=auto"
            )

    @property
    def target(self):
        """The platform that programs are for: "cpu", "gpu" or "tpu"."""
        return self.platform or (self.mesh.devices.flat[0].platform if self.mesh else jax.default_backend())

    def attention_kernel(self, tokens, head_dim, dtype, cached, dropout):
        """Returns which of ATTENTION but auto a pass over so many tokens takes. cached: whether it continues a cache.

        Few tokens that continue a cache have few scores, and XLA reads the cache where it lies: a kernel would first
        have it copied. No kernel knows dropout. cuDNN knows half precision only.
        """
        if dropout:
            return "xla"
        if self.attention != "auto":
            return self.attention
        if cached or tokens < 64 or head_dim % 8 or head_dim > 256:
            return "xla"
        if self.target == "gpu" and dtype.itemsize == 2 and self._has_tensor_cores():
            return "cudnn"
        return "pallas" if self.target == "tpu" else "xla"

    def stacked(self, dtype):
        """Returns the dtype in which arrays of `dtype` are stacked over layers or slots.

        XLA's CPU compiler neither slices half precision nor updates a slice of it: it would make a float32 copy of the
        whole stack for every layer. So there the stack is float32 to begin with, and holds the same numbers.
        """
        return jnp.dtype(jnp.float32 if self.target == "cpu" and jnp.dtype(dtype).itemsize == 2 else dtype)

    def _has_tensor_cores(self):
        """cuDNN's flash attention is for Ampere (8.0) and later."""
        device = self.mesh.devices.flat[0] if self.mesh else jax.devices()[0]
        return device.platform != "gpu" or float(getattr(device, "compute_capability", 0)) >= 8
