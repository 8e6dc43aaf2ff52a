"""Devices that are described, not attached: compilers for GPUs and TPUs run without them."""

import contextlib
import importlib
import importlib.metadata
import os
import pathlib
import re

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache import compilation_cache

from llm2vec_gen_jax.common.errors import InputError, nearest
from llm2vec_gen_jax.parallel.chips import CHIPS

TARGETS = {path.stem: path for path in (pathlib.Path(__file__).parent / "gpu_targets").glob("*.txtpb")}
_TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
_KINDS = (*_TPUS, *sorted(TARGETS), "cpu")
_MOST_DEVICES = 16384  # more GPUs or CPUs are a typing error, and would take gigabytes to describe
ESTIMATE = "XLA:CPU estimate"  # the compiler where GPUs are meant and the CUDA plugin is absent
_CUDNN = 91200  # the version in the target descriptions


def described_devices(topology):
    """Returns (devices, Chip or None, name of the compiler) of a topology.

    topology: v5e:4x4 (TPUs), h100 (one GPU), h100:8 (one host), h100:2x8 (two hosts of eight), cpu:4. GPUs are
    described for XLA's own GPU compiler where the CUDA plugin is installed; without it the devices are CPUs, and what
    is compiled for them is an estimate. Compile inside `compiling_for(devices)`.

    Raises InputError where there is no such topology, or the plugin is not of this jax's version.
    """
    kind, _, shape = topology.partition(":")
    if kind in _TPUS and shape:
        return _tpus(topology, kind, shape), CHIPS[kind], f"XLA:TPU (libtpu {_version('libtpu')})"
    hosts, per_host = _gpu_shape(shape or "1")
    known = kind in TARGETS or (kind == "cpu" and shape.isdigit())
    if not known or not 0 < hosts * per_host <= _MOST_DEVICES:
        raise InputError(
            f"topology={topology}: expected KIND:SHAPE, as v5e:4x4, h100:8, h100:2x8 (hosts x GPUs), cpu:4"
            + ("" if kind in _KINDS else nearest(kind, _KINDS))
        )
    if kind == "cpu":
        return _cpus(topology, per_host), None, f"XLA:CPU (jaxlib {_version('jaxlib')})"
    plugin = _cuda_plugin(topology)
    if plugin is None:
        return _cpus(topology, hosts * per_host), CHIPS[kind], ESTIMATE
    name = f"XLA:GPU (cuda plugin {_version(plugin)})"
    return _gpus(plugin, TARGETS[kind].read_text(), hosts, per_host), CHIPS[kind], name


def _gpu_shape(shape):
    """Returns (hosts, devices of each) of N or HOSTSxN, (0, 0) where it is neither."""
    found = re.fullmatch(r"(?:(\d{1,6})x)?(\d{1,6})", shape, re.ASCII)
    return (int(found[1] or 1), int(found[2])) if found else (0, 0)


def install_hint():
    """Returns the command that installs the GPU compiler of this jax."""
    return _install("cuda13")


def is_described(device):
    """Whether programs can be compiled for a device but not run on it."""
    return device.client.runtime_type == "compile_only_runtime"


@contextlib.contextmanager
def compiling_for(devices):
    """While it lasts, programs can be traced, lowered and compiled for devices that are not attached.

    The persistent compilation cache is off: a program of absent devices cannot be read back. For described NVIDIA GPUs
    jax's checks of cuDNN's version and of the compute capability, which ask attached devices, are answered from the
    description.
    """
    key, device = "jax_enable_compilation_cache", devices[0]
    enabled, replaced = jax.config.values[key], {}
    jax.config.update(key, False)
    compilation_cache.reset_cache()  # jax decides once whether there is a cache
    if device.platform == "gpu" and is_described(device):
        from jax._src.cudnn import fused_attention_stablehlo as cudnn

        capability = _numbers(device.compute_capability)
        answers = {
            "check_cudnn_version": lambda: _CUDNN,
            "check_compute_capability": lambda least: capability >= _numbers(least),
            "is_cuda_compute_capability_equal": lambda other: capability == _numbers(other),
        }
        replaced = {name: getattr(cudnn, name) for name in answers if hasattr(cudnn, name)}
        for name in replaced:
            setattr(cudnn, name, answers[name])
    try:
        yield
    finally:
        for name, function in replaced.items():
            setattr(cudnn, name, function)
        jax.config.update(key, enabled)
        compilation_cache.reset_cache()


def _tpus(topology, kind, shape):
    settings = {"chips_per_host_bounds": (1, 1, 1)} if set(shape.split("x")) == {"1"} else {}
    if kind == "v4":
        settings["chip_config_name"] = "megacore"  # one device a chip, as TPU VMs have it
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology, **settings).devices
    except Exception as error:  # whatever the plugin makes of it
        hint = (
            "pip install libtpu" if "libtpu" in str(error) or "not installed" in str(error) else "as v5e:4x4, v5p:2x2x1"
        )
        raise InputError(f"topology={topology}: {str(error).strip().splitlines()[0]} ({hint})") from None


def _cpus(topology, count):
    with contextlib.suppress(RuntimeError):  # a program that has used its devices keeps them
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise InputError(f"topology={topology}: this process has {len(devices)} devices already")
    return devices[:count]


def _cuda_plugin(topology):
    """Returns the distribution name of the installed CUDA plugin, or None. Raises InputError for another version."""
    for cuda in ("cuda13", "cuda12"):
        versions = [_version(f"jax-{cuda}-{part}") for part in ("plugin", "pjrt")]
        if None in versions:
            continue
        if wrong := next((version for version in versions if version != _version("jaxlib")), None):
            raise InputError(
                f"topology={topology}: the CUDA plugin {wrong} is not of jax {_version('jaxlib')}; {_install(cuda)}"
            )
        return f"jax-{cuda}-plugin"
    return None


def _install(cuda):
    return f"pip install jax-{cuda}-pjrt=={_version('jaxlib')} jax-{cuda}-plugin=={_version('jaxlib')}"


def _gpus(plugin, target, hosts, per_host):
    # jax would refuse to load the plugin where NVIDIA's libraries are absent; its compiler needs none of them.
    key = "JAX_SKIP_CUDA_CONSTRAINTS_CHECK"
    before = os.environ.get(key)
    os.environ[key] = "1"
    shape = {"target_config": target, "topology": f"1x{hosts}x{per_host}"}
    try:
        try:
            return topologies.get_topology_desc(platform="cuda", **shape).devices
        except NotImplementedError:  # refused before, when jax looked for devices
            cuda = plugin.split("-")[1]
            importlib.import_module(f"jax_plugins.xla_{cuda}").initialize()
            return topologies.get_topology_desc(platform="cuda", **shape).devices
    finally:
        os.environ.pop(key)
        if before is not None:
            os.environ[key] = before


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _numbers(version):
    return tuple(int(number) for number in version.split("."))
