"""Evaluation during training: held-out losses, tasks, the best step, early end, and interruption at any point."""

import functools
import itertools
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.data.buckets import pad
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.training import losses
from llm2vec_gen_jax.training.examples import load_training_data
from llm2vec_gen_jax.training.loop import Run
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train
from tests.conftest import write_jsonl
from tests.helpers import tasks

RECORDS = [{"question": f"What is {n}?", "answer": f"It is {'abcdefgh'[n % 8] * (1 + n % 6)}."} for n in range(24)]
HELD_OUT = [{"question": f"Where is {n}?", "answer": f"There, {'xyz'[n % 3] * (1 + n % 4)}."} for n in range(11)]
# The learning rate grows until the loss does, so the best step is not the last.
RISING = ("optimizer.schedule=constant", "optimizer.learning_rate=0.5", "optimizer.warmup_steps=60")


@pytest.fixture
def run(tiny_folder, tiny, tmp_path, monkeypatch):
    """run("key=value", ...) trains on a tiny backbone and returns the run directory."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "responses.jsonl", RECORDS)
    write_jsonl(tmp_path / "held-out.jsonl", HELD_OUT)
    common = [f"backbone.path={tiny_folder('qwen3')}", "data.responses=responses.jsonl", "compression.num_tokens=2"]
    common += ["data.max_buckets=1", "train.output=run", "train.batch_size=8", "train.steps=6", "train.log_every=100"]

    def start(*words):
        settings = options.load(config.TrainConfig, None, [*common, *words])
        train(settings, show_progress=False, backbone=tiny("qwen3"))
        return pathlib.Path(settings.train.output)

    start.settings = lambda *words: options.load(config.TrainConfig, None, [*common, *words])
    return start


VALIDATED = ("validation.responses=held-out.jsonl", "validation.every=2")


def rows(folder):
    return [json.loads(line) for line in (folder / "validation.jsonl").read_text().splitlines()]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_losses_are_those_of_the_held_out_records_and_change_no_step(run, tiny):
    plain = run("train.output=plain", "train.log_every=1")
    folder = run(*VALIDATED, "train.log_every=1")
    assert [row["step"] for row in rows(folder)] == [2, 4, 6]
    losses_of = [{row["step"]: row["loss"] for row in read_metrics(path)} for path in (plain, folder)]
    assert losses_of[0].items() <= losses_of[1].items(), "evaluation leaves the trajectory as it was"
    # The same losses from the model directory, of the 8 examples of the only complete batch.
    backbone, settings = tiny("qwen3"), run.settings(*VALIDATED)
    held_out = load_training_data(settings, backbone).held_out
    record = model_directory.read_model_directory(folder / "model")
    model, trainable = model_directory.to_model(record, backbone, folder)
    chosen = np.random.default_rng([settings.data.seed, 0]).permutation(11)[:8]
    query, answer = ([ids[row] for row in chosen] for ids in (held_out.query, held_out.answer))
    lengths = [np.array([len(ids) for ids in part], np.int32) for part in (query, answer)]
    width = int(lengths[0].max())
    batch = {
        "query": model.prefill(backbone.frozen, pad(query, width), lengths[0], slots=width),
        "query_lengths": lengths[0],
        "answer": pad(answer, lengths[1].max()),
        "answer_lengths": lengths[1],
        "target": held_out.target[chosen],
    }
    compute = jax.jit(functools.partial(losses.loss_fn, model=model, loss_config=settings.loss))
    loss, parts = compute(trainable, frozen=backbone.frozen, batch=batch)
    found = next(row for row in rows(folder) if row["step"] == record.extra["metrics"]["step"])
    for name, value in {"loss": loss, **parts}.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5)


def test_the_model_is_that_of_the_best_step(run):
    words = (*VALIDATED, *RISING, "train.steps=40", "train.keep_checkpoints=1")
    folder = run(*words)
    found = {row["step"]: row["loss"] for row in rows(folder)}
    best = min(found, key=found.get)
    assert 2 < best < 40, found
    record = model_directory.read_model_directory(folder / "model")
    assert record.extra["metrics"]["step"] == record.extra["validation"]["step"] == best
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {str(best), "40"}
    at_best = run(*words[:2], *RISING, f"train.steps={best}", "train.output=shorter", "validation.keep_best=false")
    np.testing.assert_array_equal(record.tokens_MD, model_directory.read_model_directory(at_best / "model").tokens_MD)
    assert f"| validation loss, step {best} | " in (folder / "model/README.md").read_text()
    last = run(*words, "validation.keep_best=false")  # of the finished run
    assert model_directory.read_model_directory(last / "model").extra["metrics"]["step"] == 40


def test_training_ends_without_progress_and_stays_ended(run, messages):
    words = (*VALIDATED, *RISING, "train.steps=400", "validation.patience=3")
    folder = run(*words)
    found = [(row["loss"], row["step"]) for row in rows(folder)]
    best = min(found)[1]
    assert found[-1][1] == best + 3 * 2 < 400
    before = contents(folder)
    run(*words)
    assert "already finished" in messages()
    assert {path: before[path] for path in contents(folder) if "tensorboard" not in str(path)}.items() <= before.items()
    run(*words[:-1], "validation.patience=5")
    assert rows(folder)[-1]["step"] == best + 5 * 2


@pytest.mark.parametrize(
    "method, call, after", [("_validate", 2, False), ("_validate", 2, True), ("_finish", 7, False)]
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(run, monkeypatch, method, call, after):
    """Killed between a checkpoint and its evaluation, after the evaluation, and in a later step."""
    words = (*VALIDATED, "train.log_every=1")
    undisturbed = pathlib.Path(shutil.move(run(*words), "undisturbed"))
    original, calls = getattr(Run, method), itertools.count(1)

    def dies(*arguments):
        is_last = next(calls) == call
        result = None if is_last and not after else original(*arguments)
        if is_last:
            raise RuntimeError("killed")
        return result

    with monkeypatch.context() as patch:
        patch.setattr(Run, method, dies)
        with pytest.raises(RuntimeError, match="killed"):
            run(*words)
    folder = run(*words)
    assert rows(folder) == rows(undisturbed)
    assert contents(folder / "model") == contents(undisturbed / "model")


@tasks.needs_mteb
def test_tasks_are_scored_and_choose_the_best_step(run, tmp_path, tiny_folder):
    tasks.write_task(tmp_path / "tasks/sts", "sts")
    tasks.write_task(tmp_path / "tasks/safety", "safety_retrieval")
    folder = run("validation.tasks=tasks", "validation.limit=5", "validation.every=3", *RISING)
    found = rows(folder)
    assert [row["step"] for row in found] == [3, 6]
    for row in found:
        assert set(row) == {"step", "Small-sts", "Small-safety_retrieval", "tasks"}
        assert row["tasks"] == pytest.approx((row["Small-sts"] + row["Small-safety_retrieval"]) / 2)
    best = max(found, key=lambda row: (row["tasks"], -row["step"]))
    model = folder / "model"
    assert model_directory.read_model_directory(model).extra["metrics"]["step"] == best["step"]
    scores = tasks.run(model, tmp_path / "tasks", tmp_path / "scores", "limit=5")
    assert scores["Small-sts"]["main_score"] == pytest.approx(best["Small-sts"], abs=1e-6)


@pytest.mark.parametrize(
    "words, message",
    [
        (["validation.patience=2"], "validation.patience needs validation.responses or validation.tasks"),
        (["validation.metric=loss"], "validation.metric needs validation.responses or validation.tasks"),
        (["validation.responses=none.jsonl"], "none.jsonl: no such file"),
        (["validation.responses=empty.jsonl"], "empty.jsonl: no rows"),
        (["validation.responses=held-out.jsonl", "validation.metric=los"], "validation.metric=los: unknown.*loss"),
        (["validation.responses=held-out.jsonl", "validation.metric=margin_loss"], "metric=margin_loss: unknown"),
        (["validation.responses=held-out.jsonl", "validation.metric=tasks"], "validation.metric=tasks: unknown"),
        (["validation.tasks=./none"], "validation.tasks=./none: no such folder"),
        (["validation.tasks=empty"], "empty: no task.json"),
        (["validation.responses=held-out.jsonl", "validation.every=0"], "validation.every=0: .* >= 1"),
        (["validation.responses=held-out.jsonl", "teacher.kind=file", "teacher.path=t.npy"], "teacher.kind=file has"),
    ],
)
def test_an_invalid_setting_is_named_before_the_first_step(run, tmp_path, words, message):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "t.npy", np.zeros((24, 4), np.float32))
    with pytest.raises(InputError, match=message):
        run(*words)
    assert not (tmp_path / "run/metrics.jsonl").exists()


def test_a_damaged_checkpoint_of_the_best_step_is_named(run, monkeypatch):
    words = (*VALIDATED, *RISING, "train.steps=40")
    folder = run(*words)
    best = model_directory.read_model_directory(folder / "model").extra["metrics"]["step"]
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / f"checkpoints/{best}")
    with pytest.raises(InputError, match=f"checkpoints/{best}: .*missing or damaged.*validation.keep_best=false"):
        run(*words)
    run(*words, "validation.keep_best=false")
    assert model_directory.read_model_directory(folder / "model").extra["metrics"]["step"] == 40


def test_a_run_is_not_resumed_with_other_held_out_records(run, tmp_path):
    """Its evaluations would be compared with those of other records."""
    run(*VALIDATED, "train.steps=2")
    write_jsonl(tmp_path / "held-out.jsonl", HELD_OUT[1:])
    with pytest.raises(InputError, match="is of another run .*validation"):
        run(*VALIDATED, "train.steps=4")


def test_held_out_targets_are_whitened_as_those_of_the_training_records(run, tiny):
    words = ("teacher.whiten=0.5", *VALIDATED)
    same = load_training_data(run.settings(*words, "validation.responses=responses.jsonl"), tiny("qwen3"))
    np.testing.assert_allclose(same.held_out.target, same.examples.target, atol=1e-5)
    other = load_training_data(run.settings(*words), tiny("qwen3"))
    plain = load_training_data(run.settings(*VALIDATED), tiny("qwen3"))
    np.testing.assert_array_equal(other.examples.target, same.examples.target)
    assert np.abs(other.held_out.target - plain.held_out.target).max() > 1e-3
