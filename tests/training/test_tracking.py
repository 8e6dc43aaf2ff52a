"""Tracked training: what wandb (offline) and trackio (local) keep of a run is what metrics.jsonl says of it."""

import json
import pathlib
import shutil
import struct
import sys
import time

import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.training.metrics import MetricsWriter, read_metrics
from llm2vec_gen_jax.training.tracking import names
from llm2vec_gen_jax.training.train import train
from llm2vec_gen_jax.training.train_teacher import train_teacher
from tests.conftest import write_jsonl

WORDS = (
    "data.responses=responses.jsonl",
    "compression.num_tokens=2",
    "data.max_buckets=1",
    "train.output=runs/first",
    "train.batch_size=4",
    "train.log_every=1",
    "train.checkpoint_every=2",
)


@pytest.fixture(scope="module")
def trackio_folder(tmp_path_factory):
    """Where trackio keeps everything: it looks once, when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRACKIO_DIR", str(tmp_path_factory.mktemp("trackio")))
        patch.setenv("HF_HUB_OFFLINE", "1")
        pytest.importorskip("trackio")
        yield


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request, tmp_path, monkeypatch):
    """(package, read(project) -> [{id, name, config, rows, exit}], one for each tracked run), in an empty folder."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "responses.jsonl", [{"question": f"{n}?", "answer": f"It is {n}."} for n in range(8)])
    project = f"project-{abs(hash(tmp_path))}"
    if request.param == "wandb":
        pytest.importorskip("wandb")
        monkeypatch.setenv("WANDB_MODE", "offline")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_PROJECT", project)
        return "wandb", lambda: wandb_runs(tmp_path, project)
    request.getfixturevalue("trackio_folder")
    monkeypatch.setenv("TRACKIO_PROJECT", project)
    return "trackio", lambda: trackio_runs(project)


def wandb_runs(folder, project):
    """What the files of offline runs, put together as their upload does, hold."""
    runs = {}
    for file in sorted(folder.rglob("*.wandb"), key=lambda file: file.stat().st_mtime_ns):
        records = finished_records(file)
        start = next(record.run for record in records if record.HasField("run"))
        assert start.project == project and file.is_relative_to(folder / start.display_name)
        run = runs.setdefault(start.run_id, {"id": start.run_id, "name": start.display_name, "rows": []})
        run["config"] = {item.key: json.loads(item.value_json) for item in start.config.update}
        del run["config"]["_wandb"]
        for record in records:
            if record.HasField("history"):
                items = {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
                run["rows"].append({key: json.loads(value) for key, value in items.items() if key[0] != "_"})
                assert record.history.step.num == run["rows"][-1]["train/global_step"]
            if record.HasField("exit"):
                run["exit"] = record.exit.exit_code
    return list(runs.values())


def finished_records(file, seconds=60):
    """The records of a run that has ended: wandb's own process may still be writing the last when `finish` returns."""
    from wandb.proto.wandb_internal_pb2 import Record

    until = time.monotonic() + seconds
    while True:
        records = [Record.FromString(entry) for entry in log_entries(file)]
        if any(record.HasField("exit") for record in records):
            return records
        assert time.monotonic() < until, f"{file}: no end among {len(records)} records"
        time.sleep(0.05)


def log_entries(file):
    """The entries of a log in LevelDB's format: blocks of 32 KiB, chunks of (checksum, length, kind, bytes)."""
    data, at, entry = file.read_bytes(), 7, b""
    assert data[:4] in (b"", b":W&B")
    while at + 7 <= len(data):
        if 2**15 - at % 2**15 < 7:  # the rest of a block, too short for a chunk
            at += 2**15 - at % 2**15
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if at + 7 + length > len(data):
            return  # being written
        entry += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield entry
            entry = b""


def trackio_runs(project):
    from trackio.sqlite_storage import SQLiteStorage

    runs = []
    for record in SQLiteStorage.get_run_records(project):
        logs = SQLiteStorage.get_logs(project, run_id=record["id"])
        assert [row["step"] for row in logs] == [row["train/global_step"] for row in logs]
        kept = SQLiteStorage.get_run_config(project, run_id=record["id"])
        name, _, identity = record["name"].rpartition("-")
        rows = [{key: value for key, value in row.items() if key.startswith("train/")} for row in logs]
        settings = {key: value for key, value in kept.items() if key[0] != "_"}
        runs.append({"id": identity, "name": name, "config": settings, "rows": rows})
    return runs


def run(tiny_folder, tiny, *words):
    settings = options.load(config.TrainConfig, None, [f"backbone.path={tiny_folder('qwen3')}", *WORDS, *words])
    train(settings, show_progress=False, backbone=tiny("qwen3"))
    return settings, pathlib.Path(settings.train.output)


def test_a_resumed_run_goes_on_in_the_same_tracked_run_and_repeats_nothing(tracker, tiny_folder, tiny):
    package, read = tracker
    _, folder = run(tiny_folder, tiny, f"tracking={package}", "train.steps=3")
    shutil.rmtree(folder / "checkpoints/3")  # as if killed before it was whole: step 3 is computed and logged again
    settings, _ = run(tiny_folder, tiny, f"tracking={package}", "train.steps=4")
    logged = [row | {"train/tokens_per_second": 0} for row in map(names, read_metrics(folder))]
    (tracked,) = read()
    assert [row["train/global_step"] for row in tracked["rows"]] == [1, 2, 3, 4]
    assert [row | {"train/tokens_per_second": 0} for row in tracked["rows"]] == logged
    assert tracked["name"] == "runs/first"
    assert {package: tracked["id"]} == json.loads((folder / "tracking.json").read_text())
    assert tracked["config"] == options.to_dict(settings)


def test_names_are_those_of_the_published_trainer():
    record = {"step": 3, "loss": 1.0, "reconstruction_loss": 2.0, "alignment_loss": 3.0, "grad_norm": 4.0}
    record |= {"learning_rate": 5.0, "margin_loss": 6.0, "contrastive_loss": 7.0, "negative_alignment_loss": 8.0}
    theirs = "global_step loss recon_loss align_loss grad_norm learning_rate margin_loss contrastive_loss neg_mse_loss"
    assert names(record) == {f"train/{name}": value for name, value in zip(theirs.split(), record.values())}


def test_a_stage_of_a_teacher_is_a_tracked_run(tracker, tiny_folder, tmp_path):
    package, read = tracker
    (tmp_path / "corpus.txt").write_text("\n".join(f"Sentence number {n} is made of a few words." for n in range(9)))
    words = ["corpus.path=corpus.txt", "mntp.steps=0", "simcse.steps=1", "simcse.batch_size=8", "simcse.rank=1"]
    words += [f"backbone.path={tiny_folder('qwen3')}", "train.output=teacher", f"tracking={package}"]
    settings = options.load(config.TeacherTrainConfig, None, words)
    train_teacher(settings, show_progress=False)
    (tracked,) = read()
    assert tracked["name"] == "teacher/simcse-run"
    assert tracked["rows"] == [names(row) for row in read_metrics(tmp_path / "teacher/simcse-run")]
    assert tracked["config"] == options.to_dict(settings)


def test_a_run_that_fails_ends_as_failed(tracker, tmp_path):
    package, read = tracker
    settings = {"a": {"b": None}}
    with pytest.raises(FloatingPointError), MetricsWriter(tmp_path / "here", 0, package, settings) as writer:
        writer.write({"step": 1, "loss": 2.5})
        raise FloatingPointError
    (tracked,) = read()
    assert tracked["rows"] == [{"train/global_step": 1, "train/loss": 2.5}]
    assert tracked.get("exit", 1) == 1  # trackio has no such thing
    assert tracked["config"] == settings


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_a_missing_package_is_named_with_its_installation(package, tmp_path, monkeypatch, tiny_folder, tiny):
    monkeypatch.chdir(tmp_path)
    tiny("qwen3")  # what it imports can be found no longer when the path is empty
    (tmp_path / package / "offline-run").mkdir(parents=True)  # not the package, though Python could import it
    monkeypatch.delitem(sys.modules, package, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(InputError, match=f"tracking={package}: .*pip install {package}"):
        run(tiny_folder, tiny, f"tracking={package}")
    assert not (tmp_path / "runs").exists()


def test_an_unknown_tracker_is_named_with_the_nearest():
    with pytest.raises(InputError, match="tracking=wandv: unknown, did you mean 'wandb'"):
        options.load(config.TrainConfig, None, ["tracking=wandv"])
    assert options.load(config.TrainConfig, None, ["tracking=null"]).tracking is None
