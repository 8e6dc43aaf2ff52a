"""The alignment head's start: the ridge regression of numpy, on any mesh, once, and better than a random head."""

import shutil

import jax
import numpy as np
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.data import buckets
from llm2vec_gen_jax.data.examples import tokenize
from llm2vec_gen_jax.data.records import read_records
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from llm2vec_gen_jax.pretrained.model_directory import read_model_directory
from llm2vec_gen_jax.training import ridge
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import CompressionTrainer, train
from tests.conftest import write_jsonl
from tests.helpers.adapters import settings_of

WORDS = ("train.batch_size=8", "compression.num_tokens=2", "loss.reconstruction=0", "train.remat=none")


@pytest.fixture
def questions(tmp_path):
    """The path of responses, and their questions."""
    rows = [{"question": f"{'why ' * (n % 7)}{n * 7919 % 1000}?", "answer": f"{n}"} for n in range(100)]
    write_jsonl(tmp_path / "responses.jsonl", rows)
    return tmp_path / "responses.jsonl", [row["question"] for row in rows]


def trainer_of(tiny_folder, backbone, path, targets, *words):
    settings = settings_of(tiny_folder, *WORDS, f"data.responses={path}", *words)
    records = read_records(path, ("question", "answer"))
    examples = tokenize(records, backbone.tokenizer, settings.data, 2)
    examples.target = targets
    return CompressionTrainer(settings, backbone, examples)


@pytest.mark.parametrize("signal, words", [(0, ()), (1, ()), (1, ("lora.rank=2",))])
def test_it_is_the_ridge_regression_of_numpy(tiny, tiny_folder, questions, signal, words):
    """On all examples that it reads, with the penalty that suits those held out best."""
    path, texts = questions
    backbone = tiny("qwen3")
    targets = np.random.default_rng(0).normal(5, 1, (len(texts), 6)).astype(np.float32)
    targets += signal * np.array([[len(text)] for text in texts])
    trainer = trainer_of(tiny_folder, backbone, path, targets, *words)
    before = trainer.init()
    after = ridge.solve_alignment_head(trainer, before, 1000)
    assert jax.tree.all(jax.tree.map(np.array_equal, before["reconstruction"], after["reconstruction"]))
    np.testing.assert_array_equal(before["tokens"], after["tokens"])
    rows = np.concatenate([trainer.schedule[step].rows for step in range(trainer.schedule.batches_per_epoch)])
    assert len(rows) == 96, "one epoch at most"

    queries = [trainer.examples.query[row] for row in rows]
    lengths_B = np.array([len(ids) for ids in queries], np.int32)
    encode = jax.jit(trainer.model.encode)
    _, soft_prompts = encode(before, backbone.frozen, buckets.pad(queries, lengths_B.max()), lengths_B)
    x, y = np.asarray(soft_prompts, np.float64).mean(axis=1), np.asarray(targets[rows], np.float64)
    held_out = np.arange(len(rows)) // 8 % 10 == 0

    def solve(x, y, penalty):
        x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
        variance = (x - x_mean).T @ (x - x_mean) / len(x)
        scaled = penalty * np.trace(variance) / len(variance) * np.eye(len(variance))
        kernel = np.linalg.solve(variance + scaled, (x - x_mean).T @ (y - y_mean) / len(x))
        return kernel, y_mean - x_mean @ kernel

    errors = []
    for penalty in ridge._PENALTIES:
        kernel, bias = solve(x[~held_out], y[~held_out], penalty)
        errors.append(np.square(x[held_out] @ kernel + bias - y[held_out]).sum())
    best = int(np.argmin(errors))
    assert (best == len(errors) - 1) == (not signal), "targets that say nothing are best met by their mean"
    kernel, bias = solve(x, y, ridge._PENALTIES[best])
    np.testing.assert_allclose(after["alignment"]["kernel"], kernel, atol=1e-3 * np.abs(kernel).max())
    found = x @ after["alignment"]["kernel"] + after["alignment"]["bias"]
    np.testing.assert_allclose(found, x @ kernel + bias, atol=1e-3 * y.std())


def test_it_finds_a_head_that_is_there_on_every_mesh(tiny, tiny_folder, questions):
    path, texts = questions
    backbone = tiny("qwen3")
    blind = trainer_of(tiny_folder, backbone, path, np.zeros((len(texts), 6), np.float32))
    lengths_B = np.array([len(ids) for ids in blind.examples.query], np.int32)
    ids_BT = buckets.pad(blind.examples.query, lengths_B.max())
    targets, _ = blind.model.encode(blind.init(), backbone.frozen, ids_BT, lengths_B)
    spread, found = np.asarray(targets).std(), []
    for devices in (1, 4):
        mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:devices])
        there = load_backbone(str(tiny_folder("qwen3")), "float32", mesh)
        trainer = trainer_of(tiny_folder, there, path, np.asarray(targets))
        start = ridge.solve_alignment_head(trainer, trainer.init(), 1000)
        found.append(np.asarray(trainer.model.encode(start, there.frozen, ids_BT, lengths_B)[0]))
        assert np.abs(found[-1] - targets).max() < 0.05 * spread
    np.testing.assert_allclose(*found, atol=0.02 * spread)


def test_a_run_starts_from_it_and_resumes_without_it(tiny_folder, questions, tmp_path, messages, monkeypatch):
    path, texts = questions
    targets = np.stack([[len(text), text.count("w")] for text in texts]).astype(np.float32)
    np.save(tmp_path / "targets.npy", targets)
    words = (*WORDS, f"data.responses={path}", "teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}")
    words += ("train.checkpoint_every=1", "train.log_every=1")

    def run(name, *more):
        settings = settings_of(tiny_folder, *words, f"train.output={tmp_path / name}", *more)
        train(settings, show_progress=False)
        return read_metrics(tmp_path / name)

    plain = run("plain", "train.steps=1")
    assert (
        run("solved", "train.steps=1", "train.ridge_examples=96")[0]["alignment_loss"] < plain[0]["alignment_loss"] / 5
    )
    assert "alignment head: solved on 96 examples" in messages()
    monkeypatch.setattr(ridge, "solve_alignment_head", None)  # a resumed run does not ask for it
    assert len(run("solved", "train.steps=2", "train.ridge_examples=96")) == 2
    with pytest.raises(InputError, match="holds another run .train.ridge_examples: 96 -> 0"):
        run("solved", "train.steps=3")


def test_the_head_is_solved_again_every_few_steps(tiny_folder, questions, tmp_path, messages):
    path, texts = questions
    np.save(tmp_path / "targets.npy", np.stack([[len(text), text.count("w")] for text in texts]).astype(np.float32))
    words = (*WORDS, f"data.responses={path}", "teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}")
    words += ("train.ridge_examples=96", "optimizer.head_learning_rate=0", "optimizer.learning_rate=0.1")

    def run(name, *more):
        settings = settings_of(tiny_folder, *words, f"train.output={tmp_path / name}", *more)
        return read_model_directory(train(settings, show_progress=False))

    start, fixed = run("start", "train.steps=0"), run("fixed", "train.steps=3")
    np.testing.assert_array_equal(start.alignment["kernel"], fixed.alignment["kernel"])
    assert messages().count("alignment head: solved") == 2
    again = run("again", "train.steps=3", "train.ridge_every=2")
    assert messages().count("alignment head: solved") == 2
    assert np.abs(again.alignment["kernel"] - start.alignment["kernel"]).max() > 1e-3
    run("parts", "train.steps=2", "train.ridge_every=2")
    resumed = run("parts", "train.steps=3", "train.ridge_every=2")
    for head in ("tokens_MD", "alignment", "reconstruction"):
        jax.tree.map(np.testing.assert_array_equal, getattr(again, head), getattr(resumed, head))
    with pytest.raises(InputError, match="train.ridge_every=2: set train.ridge_examples"):
        run("none", "train.ridge_every=2", "train.ridge_examples=0")


def test_the_head_of_a_finished_model_is_solved_anew_without_a_step(tiny_folder, questions, tmp_path, messages):
    path, texts = questions
    np.save(tmp_path / "targets.npy", np.stack([[len(text), text.count("w")] for text in texts]).astype(np.float32))
    words = (*WORDS, f"data.responses={path}", "teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}")

    def run(name, *more):
        return train(settings_of(tiny_folder, *words, f"train.output={tmp_path / name}", *more), show_progress=False)

    first = run("first", "train.steps=1")
    solve = (f"train.init_from={first}", "train.steps=0", "train.ridge_examples=96")
    second = run("second", *solve)
    assert "alignment head: solved on 96 examples" in messages()
    before, after = (read_model_directory(folder) for folder in (first, second))
    np.testing.assert_array_equal(before.tokens_MD, after.tokens_MD)
    np.testing.assert_array_equal(before.reconstruction["kernel"], after.reconstruction["kernel"])
    assert np.abs(before.alignment["kernel"] - after.alignment["kernel"]).max() > 1e-3
    assert run("second", *solve) == second
    again = messages()
    assert "already finished" in again and "solved" not in again
    shutil.copytree(second, tmp_path / "solved")
    assert read_model_directory(run("second", *solve[::2], "train.steps=1")).extra["metrics"]["step"] == 1
    shutil.rmtree(second)
    shutil.move(tmp_path / "solved", second)  # as if the run had been killed before it replaced the model
    assert read_model_directory(run("second", *solve[::2], "train.steps=1")).extra["metrics"]["step"] == 1
    with pytest.raises(InputError, match="train.steps=0: nothing to train. Set train.ridge_examples"):
        run("third", "train.steps=0")


def test_too_few_examples_are_named(tiny, tiny_folder, questions):
    path, texts = questions
    trainer = trainer_of(tiny_folder, tiny("qwen3"), path, np.zeros((len(texts), 6), np.float32))
    with pytest.raises(InputError, match="train.ridge_examples=8: at least two batches of 8"):
        ridge.solve_alignment_head(trainer, trainer.init(), 8)
