"""Documents encoded by the teacher in the model directory: their vectors are the alignment targets."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen, config, load_embeddings
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.evaluation import encoders
from llm2vec_gen_jax.evaluation.evaluate import evaluate
from llm2vec_gen_jax.serving.encode_corpus import encode_corpus
from llm2vec_gen_jax.training.examples import load_training_data
from llm2vec_gen_jax.training.train import train
from tests.conftest import write_jsonl
from tests.helpers.adapters import ANSWERS, FAMILY, LORA, write_adapter
from tests.helpers.commands import write_task

TEXTS = [*ANSWERS, *(f"More text {number}." for number in range(5))]
MODULES = {(0, "self_attn.q_proj"): 4, (2, "mlp.down_proj"): 4}


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """(model directory with its teacher, targets of TEXTS in training). The adapters themselves are gone."""
    folder = tmp_path_factory.mktemp("documents")
    write_jsonl(folder / "responses.jsonl", [{"question": f"{n}?", "answer": text} for n, text in enumerate(TEXTS)])
    adapters = [write_adapter(folder / name, LORA, MODULES, seed) for seed, name in enumerate(("mntp", "simcse"))]
    words = [f"backbone.path={tiny_folder(FAMILY)}", f"data.responses={folder / 'responses.jsonl'}"]
    words += [f"teacher.adapters={','.join(adapters)}", "teacher.whiten=0.5", "teacher.keep=true"]
    words += ["compression.num_tokens=2", "train.steps=1", "train.batch_size=8", f"train.output={folder / 'run'}"]
    settings = options.load(config.TrainConfig, None, words)
    path = train(settings, show_progress=False)
    expected = load_training_data(settings).examples.target
    for adapter in adapters:
        shutil.rmtree(adapter)
    return path, expected


@pytest.fixture
def model(trained):
    return LLM2VecGen.from_pretrained(trained[0])


def test_vectors_are_the_targets_of_training(trained, model, tmp_path):
    path, expected = trained
    found = model.encode_document(TEXTS, by_teacher=True, batch_size=2)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert np.abs(model.encode(TEXTS) - expected).max() > 0.1 * np.abs(expected).max(), "the student is untrained"
    single = model.encode(TEXTS[0], by_teacher=True, normalize_embeddings=True, truncate_dim=4)
    np.testing.assert_allclose(single, expected[0, :4] / np.linalg.norm(expected[0, :4]), atol=1e-5)

    model.save_pretrained(tmp_path / "copy")  # carries the teacher on
    files = sorted(file.relative_to(path) for file in (path / "teacher").rglob("*"))
    assert files == sorted(file.relative_to(tmp_path / "copy") for file in (tmp_path / "copy/teacher").rglob("*"))
    again = LLM2VecGen.from_pretrained(tmp_path / "copy").encode(TEXTS, by_teacher=True)
    np.testing.assert_allclose(again, expected, atol=1e-5 * np.abs(expected).max())


def test_the_prompt_of_documents_is_not_used_by_the_teacher(trained, model):
    model.prompts = {"document": "Summarize:", "query": "Answer:"}
    plain = model.encode(TEXTS, by_teacher=True)
    np.testing.assert_array_equal(model.encode_document(TEXTS, by_teacher=True), plain)
    joined = model.encode([f"Summarize: {text}" for text in TEXTS], by_teacher=True)
    assert np.abs(joined - plain).max() > 1e-3
    np.testing.assert_allclose(model.encode_document(TEXTS, by_teacher=True, prompt_name="document"), joined, atol=1e-5)


def test_a_corpus_is_encoded_by_the_teacher(trained, model, tmp_path):
    path, expected = trained
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    settings = config.EncodeConfig(
        input=str(tmp_path / "texts.jsonl"), output=str(tmp_path / "out"), by_teacher=True, shard_size=2, batch_size=4
    )
    encode_corpus(str(path), settings)
    np.testing.assert_allclose(load_embeddings(tmp_path / "out"), expected, atol=1e-5 * np.abs(expected).max())
    with pytest.raises(InputError, match="holds another run"):
        encode_corpus(str(path), dataclasses.replace(settings, by_teacher=False))
    short = dataclasses.replace(settings, output=str(tmp_path / "short"), max_length=8)
    encode_corpus(str(path), short)  # the teacher appends no tokens
    expected = model.encode(TEXTS, by_teacher=True, max_length=8)
    np.testing.assert_allclose(load_embeddings(tmp_path / "short"), expected, atol=1e-5 * np.abs(expected).max())
    for key in ("warmup", "save_soft_prompts"):
        with pytest.raises(InputError, match=f"{key}=true is not for by_teacher=true"):
            encode_corpus(str(path), dataclasses.replace(settings, output=str(tmp_path / key), **{key: True}))
        assert not (tmp_path / key).exists()


def test_queries_are_evaluated_on_documents_of_the_teacher(trained, model, tmp_path):
    path, expected = trained
    (tmp_path / "tasks").mkdir()
    write_task(tmp_path / "tasks/Small")
    settings = config.EvaluateConfig(
        tasks=str(tmp_path / "tasks"), output=str(tmp_path / "out"), by_teacher="documents"
    )
    query, document, _ = encoders.load(str(path), settings)
    np.testing.assert_allclose(query.encode(TEXTS), model.encode(TEXTS), atol=1e-5)
    np.testing.assert_allclose(document.encode(TEXTS), expected, atol=1e-5 * np.abs(expected).max())
    evaluate(str(path), settings)
    assert 0 <= json.loads((tmp_path / "out/results.json").read_text())["Small"]["main_score"] <= 1
    with pytest.raises(InputError, match="holds another run"):
        evaluate(str(path), dataclasses.replace(settings, by_teacher="none"))
    with pytest.raises(InputError, match="by_teacher: 'documents' -> 'all'"):
        evaluate(str(path), dataclasses.replace(settings, by_teacher="all", query_instruction=""))
    query, _, _ = encoders.load(str(path), dataclasses.replace(settings, by_teacher="all"))
    np.testing.assert_allclose(query.encode(TEXTS), document.encode(TEXTS), atol=1e-5)
    with pytest.raises(InputError, match="by_teacher=documents is for kind=student, not for kind=teacher"):
        evaluate(str(path), dataclasses.replace(settings, output=str(tmp_path / "x"), kind="teacher"))


def test_a_model_without_a_teacher_says_so(trained, model, tmp_path):
    shutil.copytree(trained[0], tmp_path / "bare")
    shutil.rmtree(tmp_path / "bare/teacher")
    bare = LLM2VecGen.from_pretrained(tmp_path / "bare")
    with pytest.raises(InputError, match="has no teacher. Train with teacher.keep=true"):
        bare.encode(TEXTS, by_teacher=True)
    with pytest.raises(InputError, match="return_soft_prompts"):
        model.encode(TEXTS, by_teacher=True, return_soft_prompts=True)


def _edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: _edit(folder / "teacher.json", adapters=["../.."]), r"teacher\.json: expected adapters"),
        (lambda folder: _edit(folder / "teacher.json", causal="no"), r"teacher\.json: expected adapters"),
        (lambda folder: _edit(folder / "teacher.json", format_version=2), "format_version is 2, expected 1"),
        (lambda folder: (folder / "teacher.json").write_text("["), r"teacher\.json"),
        (lambda folder: shutil.rmtree(folder / "adapter-1"), "adapter-1: not a PEFT adapter"),
        (lambda folder: (folder / "targets.safetensors").unlink(), r"targets\.safetensors"),
        (lambda folder: (folder / "targets.safetensors").write_bytes(b"x" * 50), r"targets\.safetensors"),
    ],
)
def test_a_damaged_teacher_is_named(trained, tmp_path, damage, message):
    shutil.copytree(trained[0], tmp_path / "model")
    damage(tmp_path / "model/teacher")
    model = LLM2VecGen.from_pretrained(tmp_path / "model")
    assert np.isfinite(model.encode("the model itself is intact")).all()
    with pytest.raises(InputError, match=message):
        model.encode(TEXTS, by_teacher=True)


@pytest.mark.parametrize(
    "words, message",
    [
        (["teacher.kind=file", "teacher.path=x.npy"], "not with teacher.kind=file"),
        (["teacher.path=other"], "not with teacher.path=other"),
    ],
)
def test_a_teacher_that_cannot_be_kept_is_refused_before_any_work(tmp_path, words, message):
    write_jsonl(tmp_path / "r.jsonl", [{"question": "a", "answer": "b"}])
    words = [*words, f"data.responses={tmp_path / 'r.jsonl'}", f"train.output={tmp_path / 'run'}", "teacher.keep=true"]
    with pytest.raises(InputError, match=message):
        train(options.load(config.TrainConfig, None, words))
    assert not (tmp_path / "run").exists()
