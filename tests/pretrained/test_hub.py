"""The hub: models load from its cache, and are uploaded to it."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import yaml

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError
from tests.conftest import one_device_mesh
from tests.helpers.conversion import load, new_model, same_trees


@pytest.fixture(scope="module")
def model_folder(tiny, tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder") / "model"
    new_model(tiny("llama")).save_pretrained(folder)
    return folder


COMMIT = "4567cdef" * 5
LOAD = """
from llm2vec_gen_jax import LLM2VecGen
from tests.conftest import one_device_mesh
print(LLM2VecGen.from_pretrained("someone/embedder", "float32", BACKBONE, one_device_mesh()).encode("x").sum())
"""


def add_to_cache(cache, folder, revision="main", commit="0123abcd"):
    """Adds a folder to a hub cache as a revision of someone/embedder."""
    repository = cache / "models--someone--embedder"
    snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
    for path in (repository / "refs", blobs):
        path.mkdir(parents=True, exist_ok=True)
    (repository / "refs" / revision).write_text(commit)
    for number, file in enumerate(path for path in folder.rglob("*") if path.is_file()):
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        (blobs / f"{commit}-{number}").write_bytes(file.read_bytes())
        link.symlink_to(blobs / f"{commit}-{number}")


def test_a_hub_id_loads_from_the_hubs_cache_and_a_path_never_asks_it(model_folder, tiny_folder, tmp_path, monkeypatch):
    add_to_cache(tmp_path, model_folder)
    code = LOAD.replace("BACKBONE", repr(str(tiny_folder("llama"))))
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert np.isclose(float(result.stdout), load(model_folder).encode("x").sum(), atol=1e-5)
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="no such directory"):
        load("runs/embeder")


def test_a_revision_loads_from_a_cache_of_ones_own(model_folder, tiny, tiny_folder, tmp_path):
    other = new_model(tiny("llama"))
    other.trainable["tokens"] = other.trainable["tokens"] + 1
    other.save_pretrained(tmp_path / "other")
    for folder, revision, commit in ((model_folder, "main", "0123abcd"), (tmp_path / "other", "v2", COMMIT)):
        add_to_cache(tmp_path / "cache", folder, revision, commit)

    def vector(path="someone/embedder", **options):
        backbone, mesh = tiny_folder("llama"), one_device_mesh()
        model = LLM2VecGen.from_pretrained(
            path, "float32", backbone, mesh, cache_dir=tmp_path / "cache", local_files_only=True, **options
        )
        return model.encode("x")

    expected = {
        revision: load(folder).encode("x") for folder, revision in ((model_folder, "main"), (tmp_path / "other", "v2"))
    }
    assert np.abs(expected["main"] - expected["v2"]).max() > 1e-3
    np.testing.assert_allclose(vector(), expected["main"], atol=1e-5)
    for revision in ("v2", COMMIT):
        np.testing.assert_allclose(vector(revision=revision), expected["v2"], atol=1e-5)
    with pytest.raises(InputError, match=r"someone/embedder \(revision v3\): .* cannot be fetched"):
        vector(revision="v3")
    with pytest.raises(InputError, match="revision=v2: .* is not on the hub"):
        vector(model_folder, revision="v2")


def test_push_to_hub_uploads_what_loads_elsewhere(tiny, tiny_folder, tmp_path, monkeypatch):
    """The hub's own client is replaced by one that keeps what it is given: there is no hub here."""
    import huggingface_hub

    kept = []

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, private, exist_ok):
            return f"https://huggingface.co/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            pathlib.Path(folder_path).rename(tmp_path / "uploaded")
            kept.append(repo_id)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = new_model(tiny("llama"))
    with pytest.raises(InputError, match="which other users cannot load"):
        model.push_to_hub("someone/embedder")
    model.backbone = dataclasses.replace(model.backbone, name="someone/llm")
    left = tmp_path / "temporary" / ".llm2vec-gen-upload.tmp-abcd1234"  # by a process that was killed
    left.mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(left.parent))
    assert model.push_to_hub("someone/embedder") == "https://huggingface.co/someone/embedder"
    assert not list(left.parent.iterdir())
    again = LLM2VecGen.from_pretrained(tmp_path / "uploaded", "float32", tiny_folder("llama"), one_device_mesh())
    same_trees(again.trainable, model.trainable)
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert card.count('from_pretrained("someone/embedder")') == 2
    front = yaml.safe_load(card.split("---")[1])
    assert front["base_model"] == "someone/llm" and front["library_name"] == "llm2vec_gen_jax"


def test_offline_the_hub_says_so(tiny, monkeypatch):
    model = new_model(tiny("llama"))
    model.backbone = dataclasses.replace(model.backbone, name="someone/llm")
    with pytest.raises(InputError, match="someone/embedder: the upload to the hub failed"):
        model.push_to_hub("someone/embedder")


def test_an_option_that_is_no_boolean_is_named():
    with pytest.raises(InputError, match="local_files_only='no': expected True or False"):
        LLM2VecGen.from_pretrained("smollm2-135m", local_files_only="no")
