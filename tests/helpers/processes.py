"""Environments of the processes that tests start."""

import os
import pathlib
import socket

import jax

from tests.conftest import COMPILE_FAST

ROOT = pathlib.Path(__file__).parents[2]
WITHOUT_TORCH = ROOT / "tests" / "helpers" / "without_torch"


def environment(devices=1, torch=False, **variables):
    """Returns the environment of `python -m launch.NAME` in any folder, on a number of fake devices.

    torch: whether PyTorch can be imported. transformers imports it where it can, which takes longer than most of what
    these processes do.
    """
    paths = [ROOT] if torch else [WITHOUT_TORCH, ROOT]
    return (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "XLA_FLAGS": f"{COMPILE_FAST} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        | variables
    )


def free_port():
    """Returns a port of this machine that nothing listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
