"""Devices that are described but not attached, for which the GPU and TPU compilers can compile."""

import contextlib
import importlib
import importlib.metadata
import os
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from llm2vec_gen_jax.common.errors import InputError, first_line, nearest
from llm2vec_gen_jax.parallel.chips import CHIPS, Chip

TARGETS = {path.stem: path for path in (pathlib.Path(__file__).parent / "gpu_targets").glob("*.txtpb")}
_TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_KINDS = (*_TPUS, *sorted(TARGETS), "cpu")
_MAX_DEVICES = 16384  # a larger number of GPUs or CPUs is a typing error; its description would take gigabytes
ESTIMATE = "XLA:CPU estimate"  # the compiler for GPUs without the CUDA plugin
_CUDNN = 91200  # the version in the target descriptions


def described_devices(topology: str) -> tuple[Sequence[Any], Chip | None, str]:
    """Returns (devices, Chip or None, name of the compiler) of a topology.

    topology: v5e:4x4 (TPUs), h100 (one GPU), h100:8 (one host), h100:2x8 (two hosts of eight), cpu:4. GPUs are
    described for XLA's GPU compiler if the CUDA plugin is installed; otherwise the devices are CPUs, whose programs
    give an estimate. Compile inside `compiling_for(devices)`.

    Raises InputError for an unknown topology, and for a plugin of another version than jax.
    """
    kind, _, shape = topology.partition(":")
    if kind in _TPUS and shape:
        return _tpus(topology, kind, shape), CHIPS[kind], f"XLA:TPU (libtpu {_version('libtpu')})"
    hosts, per_host = _gpu_shape(shape or "1")
    known = kind in TARGETS or (kind == "cpu" and shape.isdigit())
    if not known or not 0 < hosts * per_host <= _MAX_DEVICES:
        raise InputError(
            f"topology={topology}: expected KIND:SHAPE, such as v5e:4x4, h100:8, h100:2x8 (hosts x GPUs), cpu:4"
            + ("" if kind in _KINDS else nearest(kind, _KINDS))
        )
    if kind == "cpu":
        return _cpus(topology, per_host), None, f"XLA:CPU (jaxlib {_version('jaxlib')})"
    plugin = _cuda_plugin(topology)
    if plugin is None:
        return _cpus(topology, hosts * per_host), CHIPS[kind], ESTIMATE
    name = f"XLA:GPU (cuda plugin {_version(plugin)})"
    return _gpus(plugin, TARGETS[kind].read_text(), hosts, per_host), CHIPS[kind], name


def _gpu_shape(shape: str) -> tuple[int, int]:
    """Returns (hosts, devices per host) of N or HOSTSxN, (0, 0) for other values."""
    match = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})", shape, re.ASCII)
    return (int(match[1] or 1), int(match[2])) if match else (0, 0)


def install_hint() -> str:
    """Returns the command that installs the GPU compiler for this version of jax."""
    return _install_command("cuda13")


def is_described(device: Any) -> bool:
    """Whether programs can be compiled for a device but not run on it."""
    return device.client.runtime_type == "compile_only_runtime"


@contextlib.contextmanager
def compiling_for(devices: Sequence[Any]) -> Iterator[None]:
    """Within this context, programs can be traced, lowered and compiled for devices that are not attached.

    It disables the persistent compilation cache, which cannot load programs for absent devices. For described NVIDIA
    GPUs, it replaces jax's queries of the cuDNN version and the compute capability of attached devices.
    """
    key, device = "jax_enable_compilation_cache", devices[0]
    enabled = jax.config.values[key]
    originals: dict[str, Any] = {}
    jax.config.update(key, False)
    compilation_cache.reset_cache()  # jax reads the setting only once
    if device.platform == "gpu" and is_described(device):
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        capability = _numbers(device.compute_capability)
        replacements = {
            "check_cudnn_version": lambda: _CUDNN,
            "check_compute_capability": lambda least: capability >= _numbers(least),
            "is_cuda_compute_capability_equal": lambda other: capability == _numbers(other),
        }
        originals = {name: getattr(cudnn, name) for name in replacements if hasattr(cudnn, name)}
        for name in originals:
            setattr(cudnn, name, replacements[name])
    try:
        yield
    finally:
        for name, function in originals.items():
            setattr(cudnn, name, function)
        jax.config.update(key, enabled)
        compilation_cache.reset_cache()


def _tpus(topology: str, kind: str, shape: str) -> Sequence[Any]:
    settings: dict[str, Any] = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
    if kind == "v4":
        settings["chip_config_name"] = "megacore"  # one device per chip, as on TPU VMs
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings).devices
    except Exception as error:  # the plugin raises exceptions of several types
        hint = (
            "pip install libtpu"
            if "libtpu" in str(error) or "not installed" in str(error)
            else "such as v5e:4x4, v5p:2x2x1"
        )
        raise InputError(f"topology={topology}: {first_line(error)} ({hint})") from None


def _cpus(topology: str, count: int) -> Sequence[Any]:
    with contextlib.suppress(RuntimeError):  # the number is fixed once devices are in use
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"topology={topology}: this process already has {len(devices)} devices. Use a new process")
    return devices[:count]


def _cuda_plugin(topology: str) -> str | None:
    """Returns the distribution name of the installed CUDA plugin, or None. Raises InputError for a wrong version."""
    for cuda in ("cuda13", "cuda12"):
        versions = [_version(f"jax-{cuda}-{part}") for part in ("plugin", "pjrt")]
        if None in versions:
            continue
        if wrong := next((version for version in versions if version != _version("jaxlib")), None):
            raise InputError(
                f"topology={topology}: the CUDA plugin {wrong} is not for jax {_version('jaxlib')}: "
                f"{_install_command(cuda)}"
            )
        return f"jax-{cuda}-plugin"
    return None


def _install_command(cuda: str) -> str:
    return f"pip install jax-{cuda}-pjrt=={_version('jaxlib')} jax-{cuda}-plugin=={_version('jaxlib')}"


def _gpus(plugin: str, target: str, hosts: int, per_host: int) -> Sequence[Any]:
    # jax does not load the plugin without NVIDIA's libraries, which the compiler does not need.
    key = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    before = os.environ.get(key)
    os.environ[key] = "1"
    shape = {"target_config": target, "topology": f"1x{hosts}x{per_host}"}
    try:
        try:
            return topologies.get_topology_desc(platform="cuda", **shape).devices
        except NotImplementedError:  # jax failed to load the plugin when it looked for devices
            cuda = plugin.split("-")[1]
            importlib.import_module(f"jax_plugins.xla_{cuda}").initialize()
            return topologies.get_topology_desc(platform="cuda", **shape).devices
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))
