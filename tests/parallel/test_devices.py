"""Accelerators that JAX cannot use: one line that names what is wrong, and silence where the CPU is simply used."""

import importlib.metadata
import os
import subprocess
import sys

import pytest

from llm2vec_gen_jax.parallel import devices
from tests.helpers.processes import ROOT, WITHOUT_TORCH

PLUGIN = "jax-cuda13-plugin"


def start(folder, *words, path=(), **variables):
    """Runs a command that computes on whatever device there is. Returns (exit code, its errors)."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, (*path, WITHOUT_TORCH, ROOT)))} | variables
    command = [sys.executable, "-m", "launch.decode", str(folder), "text=a", "max_new_tokens=2", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stderr


@pytest.fixture
def other_version(tmp_path):
    """A folder for PYTHONPATH in which the CUDA plugin is of a version that fits no jaxlib."""
    folder = tmp_path / f"{PLUGIN.replace('-', '_')}-0.1.2.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PLUGIN}\nVersion: 0.1.2\n")
    return tmp_path


no_gpu = pytest.mark.skipif(devices._has_driver(), reason="there is a GPU here")


@no_gpu
def test_a_cpu_is_used_without_a_word(model_folder):
    assert start(model_folder) == (0, "")


@no_gpu
@pytest.mark.parametrize("name", ["cuda", "gpu", "cuda,cpu"])
def test_cuda_without_a_gpu_is_one_line(model_folder, name):
    code, errors = start(model_folder, JAX_PLATFORMS=name)
    if name == "cuda,cpu":  # there is one of them
        assert code == 0 and "Traceback" not in errors
        return
    assert code == 2 and errors.count("\n") == 1
    assert errors.startswith(f"error: JAX_PLATFORMS={name}: no NVIDIA driver found (no /dev/nvidia0)")
    assert errors.endswith("To compute on the CPU, set JAX_PLATFORMS=cpu or unset it\n")


def test_an_unknown_platform_is_one_line(model_folder):
    code, errors = start(model_folder, JAX_PLATFORMS="nonsense")
    assert code == 2 and errors.startswith("error: JAX_PLATFORMS=nonsense: ") and errors.count("\n") == 1
    assert "not in the list of known backends" in errors


@pytest.mark.slow
def test_a_plugin_of_another_version_is_named_with_its_fix(model_folder, other_version):
    expected = f"{PLUGIN} 0.1.2 does not match jaxlib {importlib.metadata.version('jaxlib')}"
    fix = f"pip install -U 'jax[cuda13]=={importlib.metadata.version('jax')}'"
    code, errors = start(model_folder, path=[other_version])
    assert code == 0 and errors.startswith(f"warning: {expected}") and fix in errors
    if not devices._has_driver():
        assert errors.count("\n") == 1
        code, errors = start(model_folder, path=[other_version], JAX_PLATFORMS="cuda")
        assert code == 2 and errors.startswith(f"error: JAX_PLATFORMS=cuda: {expected}") and fix in errors
    assert start(model_folder, path=[other_version], JAX_PLATFORMS="cpu") == (0, "")
