"""Accelerators that JAX cannot use: one line that says why and how to mend it, instead of logs and tracebacks."""

import ctypes
import glob
import importlib.metadata
import logging
import os
import pathlib
import platform
import re
import sys
import traceback
import warnings

from llm2vec_gen_jax.common.errors import first_line

_CUDA_PLUGINS = ("jax-cuda13-plugin", "jax-cuda12-plugin")
_KNOWN = {"xla_cuda12", "xla_cuda13", "xla_rocm60", "xla_rocm7"}  # plugins whose devices `_nothing_here` looks for
_NVIDIA, _GOOGLE = "0x10de", "0x1ae0"  # PCI vendors
_KEEP_FREED = {-8: 1, -4: 0, -1: -1}  # mallopt: M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD
_failures: list[str] = []  # of plugins, as they were reported


def prepare():
    """Call it before `import jax`: what it reports of plugins is left out; one line where a GPU is not used.

    Where only the CPU is used, memory that is freed stays with the process.
    """
    warnings.filterwarnings("ignore", "JAX plugin .* is installed, but", RuntimeWarning)
    logging.getLogger("jax._src.xla_bridge").addFilter(_note)
    logging.getLogger("jax_plugins.xla_cuda13").addFilter(_note)
    logging.getLogger("jax_plugins.xla_cuda12").addFilter(_note)
    asked = os.environ.get("JAX_PLATFORMS", "")
    if asked:
        if asked == "cpu":
            _keep_freed()
        return
    if _mismatch() or (_pci(_NVIDIA) and not _has_driver()):
        print(f"warning: {_cuda_problem()}. The CPU is used", file=sys.stderr)
    if _nothing_here():
        import jax

        jax.config.update("jax_platforms", "cpu")  # plugins that look for devices in vain are loud
        _keep_freed()


def _keep_freed():
    """Makes glibc keep freed memory, unless the environment sets up its malloc.

    A program takes its memory anew each time it runs. Given back in between, it comes as pages that the system clears:
    half a million for a training step of SmolLM2-135M.
    """
    if platform.libc_ver()[0] != "glibc" or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return
    for option, value in _KEEP_FREED.items():
        ctypes.CDLL(None).mallopt(option, value)


def problem_of(error):
    """Returns the line for an exception with which JAX says that it has no device; None for any other."""
    asked = os.environ.get("JAX_PLATFORMS", "")
    frames = traceback.extract_tb(error.__traceback__)
    no_backend = isinstance(error, AssertionError) and frames and frames[-1].filename.endswith("xla_bridge.py")
    if not no_backend and not (isinstance(error, RuntimeError) and "Unable to initialize backend" in str(error)):
        return None
    reason = first_line(error) if not no_backend else "no such device can be used"
    if {"cuda", "gpu"} & set(re.split(r"\s*,\s*", asked.lower())):
        reason = _cuda_problem()
    return f"JAX_PLATFORMS={asked}: {reason}. To compute on the CPU, set JAX_PLATFORMS=cpu or unset it"


def _cuda_problem():
    """Says why JAX does not use a GPU of NVIDIA, and what to do."""
    if mismatch := _mismatch():
        return mismatch
    if not _has_driver():
        return (
            "no NVIDIA driver is to be seen here (no /dev/nvidia0): install it, or, in a container, pass the GPU to it "
            "(docker run --gpus all)"
        )
    if not _versions():
        return "JAX's CUDA plugin is not installed: pip install -U 'jax[cuda13]'"
    why = f" ({_failures[-1]})" if _failures else ""
    return f"JAX's CUDA plugin cannot be used{why}: pip install -U 'jax[cuda13]'"


def _mismatch():
    """Says which CUDA plugin is of another version than jaxlib, which then does not use it; None when they fit."""
    jaxlib = importlib.metadata.version("jaxlib")
    for name, version in _versions().items():
        if _numbers(version) != _numbers(jaxlib):
            extra = name.removeprefix("jax-").removesuffix("-plugin")
            jax = importlib.metadata.version("jax")
            return (
                f"{name} {version} is of another version than jaxlib {jaxlib}, which does not use it: "
                f"pip install -U 'jax[{extra}]=={jax}'"
            )
    return None


def _versions():
    found = {}
    for name in _CUDA_PLUGINS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _numbers(version):
    return re.match(r"[0-9.]*", version)[0].strip(".")


def _has_driver():
    return any(map(os.path.exists, ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")))


def _nothing_here():
    """Whether there is no device but the CPU, as far as this can tell: no other system, no unknown plugin."""
    plugins = {entry.name for entry in importlib.metadata.entry_points(group="jax_plugins")}
    nodes = ("/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/dxg")
    found = any(glob.glob(node) for node in nodes) or _pci(_GOOGLE) or "TPU_NAME" in os.environ
    return sys.platform == "linux" and plugins <= _KNOWN and not found


def _pci(vendor):
    """Whether a PCI device of a vendor is here: of NVIDIA's, one that displays or computes (class 03)."""
    for path in pathlib.Path("/sys/bus/pci/devices").glob("*/vendor"):
        try:
            if path.read_text().strip() == vendor:
                if vendor != _NVIDIA or path.with_name("class").read_text().startswith("0x03"):
                    return True
        except OSError:
            continue
    return False


def _note(record):
    """A logging filter: drops the report of a plugin that cannot be used; says it in a line where there is a GPU."""
    message = record.getMessage()
    if "plugin configuration error" not in message and "plugin_extension is not found" not in message:
        return True
    if record.exc_info and record.exc_info[1]:
        _failures.append(first_line(record.exc_info[1]))
        if _has_driver() and not os.environ.get("JAX_PLATFORMS"):
            print(f"warning: {_cuda_problem()}", file=sys.stderr)
    return False
