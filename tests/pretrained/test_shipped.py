"""The embedder that comes with the package: found by its name, in order, and of use."""

import dataclasses
import pathlib
import re
import shutil

import numpy as np
import pytest

import llm2vec_gen_jax
from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import TEACHERS, resolve_path
from tests.conftest import one_device_mesh

FOLDER = pathlib.Path(llm2vec_gen_jax.__file__).parent / "pretrained" / "assets" / "models"
# Two ways of asking the same, of six things.
PAIRS = [
    ("How do I make bread rise?", "What makes a loaf of bread rise in the oven?"),
    ("What is the capital of France?", "Which city is the capital of France?"),
    ("How do I reset my password?", "I forgot my password, how can I get a new one?"),
    ("Who wrote Hamlet?", "Which author wrote the play Hamlet?"),
    ("What causes rain?", "Why does it rain?"),
    ("How many legs does a spider have?", "What is the number of legs of a spider?"),
]


@pytest.fixture(scope="module", params=model_directory.MODELS)
def shipped(request):
    return LLM2VecGen.from_pretrained(request.param, dtype="float32", mesh=one_device_mesh())


def test_every_shipped_model_has_its_folder_and_every_folder_its_name():
    assert sorted(model_directory.MODELS) == sorted(path.name for path in FOLDER.iterdir() if path.is_dir())


def test_the_nearest_text_is_the_one_that_asks_the_same(shipped):
    vectors = shipped.encode([text for pair in PAIRS for text in pair])
    assert vectors.shape == (12, 576) and np.isfinite(vectors).all()
    similarity = np.asarray(shipped.similarity(vectors, vectors))
    np.fill_diagonal(similarity, -1)
    assert (similarity.argmax(axis=1) == np.arange(12) ^ 1).sum() >= 10


def test_what_it_decodes_is_text(shipped):
    _, soft_prompts = shipped.encode([text for text, _ in PAIRS], return_soft_prompts=True)
    for answer in shipped.decode(soft_prompts, max_new_tokens=16):
        assert len(re.findall(r"[A-Za-z]{2,}", answer)) >= 2, answer


def test_the_teacher_is_the_included_one_whatever_the_working_directory_holds(tmp_path, monkeypatch):
    for name in TEACHERS:
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    model = LLM2VecGen.from_pretrained("smollm2-135m", dtype="float32", mesh=one_device_mesh())
    assert model.encode_document(["a text"], by_teacher=True).shape == (1, 576)
    resolved = resolve_path(pathlib.Path("smollm2-135m"))
    assert resolved == resolve_path("smollm2-135m") and resolved.suffix == ".gguf"


def test_the_card_has_scores_and_no_path_of_a_machine():
    for name in model_directory.MODELS:
        card = (FOLDER / name / "README.md").read_text()
        assert f'from_pretrained("{name}")' in card and "## Scores" in card and "STS" in card
        for file in (FOLDER / name).rglob("*"):
            if file.suffix in (".md", ".json", ".yml") and file.name != "tokenizer.json":
                assert not re.search(r"""(^|[\s"'`=])(/|~/|[A-Z]:\\)\w""", file.read_text(), flags=re.M), file


def test_a_local_folder_of_that_name_comes_first(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, tmp_path / "smollm2-135m")
    assert model_directory.local_folder("smollm2-135m") == pathlib.Path("smollm2-135m")
    assert model_directory.read_model_directory("smollm2-135m").tokens_MD.shape != (10, 576)


def test_the_default_backbone_is_not_a_local_folder_of_its_name(embedder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    backbone = dataclasses.replace(embedder.backbone, name="smollm2-135m")
    model_directory.save(tmp_path / "smollm2-135m" / "model", embedder.model, embedder.trainable, backbone, {})
    assert model_directory.read_model_directory(tmp_path / "smollm2-135m" / "model").backbone == "smollm2-135m"


def test_a_mistyped_name_is_an_error_that_lists_the_names():
    with pytest.raises(InputError, match=r"smollm-135m: no such directory, hub id .*smollm2-135m"):
        LLM2VecGen.from_pretrained("smollm-135m")
