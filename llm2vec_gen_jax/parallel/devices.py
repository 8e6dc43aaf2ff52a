"""One-line messages for accelerators that JAX cannot use, instead of logs and tracebacks."""

import glob
import importlib.metadata
import logging
import os
import pathlib
import re
import sys
import traceback
import warnings

from llm2vec_gen_jax.common.errors import first_line

_CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_KNOWN = {"xla_cuda12", "xla_cuda13", "xla_rocm60", "xla_rocm7"}  # plugins whose devices `_no_accelerator` looks for
_NVIDIA, _GOOGLE = "0x10de", "0x1ae0"  # PCI vendors
_failures: list[str] = []  # plugin errors logged by JAX


def prepare() -> None:
    """Filters JAX's messages about plugins, and warns if a GPU is present but not used. Call it before `import jax`."""
    warnings.filterwarnings("ignore", "JAX plugin .* is installed, but", RuntimeWarning)
    logging.getLogger("jax._src.xla_bridge").addFilter(_note)
    logging.getLogger("jax_plugins.xla_cuda13").addFilter(_note)
    logging.getLogger("jax_plugins.xla_cuda12").addFilter(_note)
    if os.environ.get("JAX_PLATFORMS"):
        return
    if _mismatch() or (_pci(_NVIDIA) and not _has_driver()):
        print(f"warning: {_cuda_problem()}. The CPU is used", file=sys.stderr)
    if _no_accelerator():
        import jax

        jax.config.update("jax_platforms", "cpu")  # plugins without devices print warnings


def problem_of(error: BaseException) -> str | None:
    """Returns the message for an exception of JAX about unavailable devices, or None for any other exception."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    frames = traceback.extract_tb(error.__traceback__)
    no_backend = isinstance(error, AssertionError) and frames and frames[-1].filename.endswith("xla_bridge.py")
    if not no_backend and not (isinstance(error, RuntimeError) and "Unable to initialize backend" in str(error)):
        return None
    reason = first_line(error) if not no_backend else "no such device is available"
    if {"cuda", "gpu"} & set(re.split(r"\s*,\s*", platforms.lower())):
        reason = _cuda_problem()
    return f"JAX_PLATFORMS={platforms}: {reason}. To compute on the CPU, set JAX_PLATFORMS=cpu or unset it"


def _cuda_problem():
    """Returns why JAX does not use an NVIDIA GPU, and the fix."""
    if mismatch := _mismatch():
        return mismatch
    if not _has_driver():
        return (
            "no NVIDIA driver found (no /dev/nvidia0): install it, or, in a container, enable the GPU "
            "(docker run --gpus all)"
        )
    if not _versions():
        return "JAX's CUDA plugin is not installed: pip install -U 'jax[cuda13]'"
    why = f" ({_failures[-1]})" if _failures else ""
    return f"JAX's CUDA plugin cannot be used{why}: pip install -U 'jax[cuda13]'"


def _mismatch():
    """Returns a message if the version of a CUDA plugin differs from jaxlib's, which then ignores it, else None."""
    jaxlib = importlib.metadata.version("jaxlib")
    for name, version in _versions().items():
        if _release(version) != _release(jaxlib):
            extra = name.removeprefix("jax-").removesuffix("-plugin")
            jax = importlib.metadata.version("jax")
            return (
                f"{name} {version} does not match jaxlib {jaxlib}, which ignores it: "
                f"pip install -U 'jax[{extra}]=={jax}'"
            )
    return None


def _versions():
    versions = {}
    for name in _CUDA_PLUGINS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _release(version):
    return re.match(r"[0-9.]*", version)[0].strip(".")


def _has_driver():
    return any(map(os.path.exists, ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")))


def _no_accelerator():
    """Whether the CPU is certainly the only device. False on other systems than Linux and with unknown plugins."""
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    nodes = ("/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg")
    device = any(glob.glob(node) for node in nodes) or _pci(_GOOGLE) or "TPU_NAME" in os.environ
    return sys.platform == "linux" and plugins <= _KNOWN and not device


def _pci(vendor):
    """Whether a PCI device of a vendor is present; for NVIDIA, a display controller (class 03)."""
    for path in pathlib.Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            if path.read_text().strip() == vendor:
                if vendor != _NVIDIA or path.with_name("class").read_text().startswith("0x03"):
                    return True
        except OSError:
            continue
    return False


def _note(record):
    """Logging filter: drops errors of unusable plugins, and prints one line instead if there is a GPU."""
    message = record.getMessage()
    if "plugin configuration error" not in message and "plugin_extension is not found" not in message:
        return True
    if record.exc_info and record.exc_info[1]:
        _failures.append(first_line(record.exc_info[1]))
        if _has_driver() and not os.environ.get("JAX_PLATFORMS"):
            print(f"warning: {_cuda_problem()}", file=sys.stderr)
    return False
