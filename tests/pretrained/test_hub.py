"""The hub: models load from its cache, and are uploaded to it."""

import dataclasses
import importlib.util
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import yaml

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.hub import HubOptions
from llm2vec_gen_jax.formats import published
from tests.conftest import one_device_mesh
from tests.helpers.conversion import load, new_model, same_trees
from tests.helpers.hub import COMMIT, add_to_cache, serving


@pytest.fixture(scope="module")
def model_folder(tiny, tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder") / "model"
    new_model(tiny("llama")).save_pretrained(folder)
    return folder


LOAD = """
from llm2vec_gen_jax import LLM2VecGen
from tests.conftest import one_device_mesh
print(LLM2VecGen.from_pretrained("someone/embedder", "float32", BACKBONE, one_device_mesh()).encode("x").sum())
"""


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
    with pytest.raises(
        InputError, match="someone/embedder: its revision=v3 is not, .* in the cache .*local_files_only"
    ):
        vector(revision="v3")
    with pytest.raises(InputError, match="not on the hub, so it has no revision=v2"):
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
    if importlib.util.find_spec("sentence_transformers"):
        from sentence_transformers import SentenceTransformer

        add_to_cache(tmp_path / "cache", tiny_folder("llama"), repository="someone/llm")
        options = {"trust_remote_code": True, "cache_folder": str(tmp_path / "cache"), "local_files_only": True}
        vectors = SentenceTransformer(str(tmp_path / "uploaded"), device="cpu", **options).encode(["x"])
        np.testing.assert_allclose(vectors, again.encode(["x"]), rtol=0, atol=1e-5 * np.abs(vectors).max())
    card = (tmp_path / "uploaded" / "README.md").read_text()
    assert card.count('from_pretrained("someone/embedder")') == 2
    front = yaml.safe_load(card.split("---")[1])
    model.backbone = dataclasses.replace(model.backbone, revision="v1")
    record = published.read(tmp_path / "uploaded")
    shutil.rmtree(tmp_path / "uploaded")
    # The directory names a folder of the machine on which it was trained, and the backbone was loaded from the hub.
    model.record = dataclasses.replace(record, backbone="/of/another/machine")
    model.push_to_hub("someone/embedder")
    written = published.read(tmp_path / "uploaded")
    assert (written.backbone, written.extra["backbone_revision"]) == ("someone/llm", "v1")
    shutil.rmtree(tmp_path / "uploaded")
    # The directory names a repository, and the backbone was loaded from a local copy of it.
    model.backbone = dataclasses.replace(model.backbone, name=str(tiny_folder("llama")), revision=None)
    model.record = written
    model.push_to_hub("someone/embedder")
    written = published.read(tmp_path / "uploaded")
    assert (written.backbone, written.extra["backbone_revision"]) == ("someone/llm", "v1")
    assert front["base_model"] == "someone/llm" and front["library_name"] == "llm2vec_gen_jax"


def test_offline_the_hub_says_so(tiny, monkeypatch):
    model = new_model(tiny("llama"))
    model.backbone = dataclasses.replace(model.backbone, name="someone/llm")
    with pytest.raises(InputError, match="someone/embedder: the upload to the hub failed"):
        model.push_to_hub("someone/embedder")


def test_an_option_that_is_no_boolean_is_named():
    with pytest.raises(InputError, match="local_files_only='no': expected True or False"):
        LLM2VecGen.from_pretrained("smollm2-135m", local_files_only="no")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"revision": 2}, "revision=2: expected a branch, tag or commit"),
        ({"revision": ""}, "revision is empty: pass a value, or leave revision out"),
        ({"cache_dir": ""}, "cache_dir is empty"),
        ({"token": ""}, "token is empty"),
        ({"token": "hf_secret\n"}, "token: not an access token"),
        ({"token": 5}, "token: not an access token"),
    ],
)
def test_an_option_that_would_fail_later_or_be_the_default_is_refused(options, message):
    with pytest.raises(InputError, match=message) as error:
        HubOptions(**options)
    assert "hf_secret" not in str(error.value)


FETCH = """
import sys
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.hub import HubOptions, fetch_from_hub
revision, token, cache, local = sys.argv[1:]
try:
    print(fetch_from_hub("someone/private", ["*.json"], HubOptions(revision, token, cache, local == "local")))
except InputError as error:
    print(error)
"""


def test_a_private_repository_is_fetched_with_the_token_which_no_message_has(tmp_path):
    def fetch(revision, token, address, local="remote"):
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "JAX_"))}
        environment |= {"HF_ENDPOINT": address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        words = [sys.executable, "-c", FETCH, revision, token, tmp_path / "cache", local]
        result = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert result.returncode == 0 and "hf_" not in result.stdout + result.stderr, result.stderr
        return result.stdout.strip()

    files = {"config.json": b"{}", "model.bin": b"not fetched"}
    with serving("someone/private", files, ("main", "v1"), "hf_secret") as address:
        assert "someone/private: no such local folder, and its revision=v1 cannot" in fetch("v1", "hf_wrong", address)
        assert "someone/private: its revision=v1 is not, or not completely, in the cache" in fetch(
            "v1", "hf_secret", address, "local"
        )
        message = "someone/private: has no revision=v2 on the hub. Pass a branch, tag or commit of it"
        assert fetch("v2", "hf_secret", address) == message
        folder = pathlib.Path(fetch("v1", "hf_secret", address))
        assert [path.name for path in folder.iterdir()] == ["config.json"]
    assert folder.is_relative_to(tmp_path / "cache")
    assert fetch("v1", "hf_wrong", address, "local") == str(folder)  # without the server
