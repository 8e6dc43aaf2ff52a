"""LLM2VecGenTrainer: the same run as the command, from records in memory."""

import pathlib
import signal
import subprocess
import sys
import threading

import datasets
import numpy as np
import pytest

from llm2vec_gen_jax import InputError, LLM2VecGen, LLM2VecGenTrainer, TrainingCallback, config
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train
from tests.conftest import write_jsonl
from tests.helpers.adapters import LORA, write_adapter
from tests.helpers.processes import Process, environment

RECORDS = [{"question": f"What is {n}?", "answer": f"It is {'abcdefgh'[n % 8] * (1 + n % 6)}."} for n in range(24)]
SETTINGS = {
    "compression": {"num_tokens": 2},
    "data": config.DataConfig(max_buckets=1),
    "train": {"steps": np.int64(4), "batch_size": 8, "log_every": 1},
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trainer(place, tiny):
    """trainer(records=..., **arguments) on a tiny backbone."""

    def make(records=RECORDS, output="run", **changes):
        values = {"backbone": tiny("qwen3"), "show_progress": False, **SETTINGS, **changes}
        return LLM2VecGenTrainer(records, output, **values)

    return make


@pytest.mark.parametrize("kind", ["list", "dataset", "path", "generator"])
def test_the_run_is_that_of_the_command(place, trainer, tiny, tiny_folder, kind):
    write_jsonl(place / "responses.jsonl", RECORDS)
    words = [f"backbone.path={tiny_folder('qwen3')}", "data.responses=responses.jsonl", "compression.num_tokens=2"]
    words += ["data.max_buckets=1", "train.output=command", "train.steps=4", "train.batch_size=8", "train.log_every=1"]
    train(options.load(config.TrainConfig, None, words), show_progress=False, backbone=tiny("qwen3"))
    sources = {
        "list": RECORDS,
        "dataset": datasets.Dataset.from_list(RECORDS),
        "path": place / "responses.jsonl",
        "generator": (record for record in RECORDS),
    }
    model = trainer(sources[kind]).train()
    losses = [[row["loss"] for row in read_metrics(pathlib.Path(name))] for name in ("command", "run")]
    assert losses[0] == losses[1] and len(losses[0]) == 4
    texts = ["What is 3?", "a"]
    expected = LLM2VecGen.from_pretrained("command/model", dtype="float32").encode(texts)
    np.testing.assert_array_equal(model.encode(texts), expected)
    assert LLM2VecGen.from_pretrained("run/model").get_embedding_dimension() == 32


def test_the_teacher_of_a_loaded_backbone_has_its_weights(place, trainer, tiny_folder):
    """Adapters are merged into weights that are loaded again."""
    adapter = write_adapter(place / "adapter", LORA, {(layer, "mlp.up_proj"): 4 for layer in range(3)})
    made = trainer(teacher={"adapters": [str(adapter)]}, output="loaded")
    named = trainer(teacher={"adapters": [str(adapter)]}, output="named", backbone=tiny_folder("qwen3"))
    assert made.config.backbone.path == str(tiny_folder("qwen3"))
    for each in (made, named):
        each.train()
    losses = [[row["loss"] for row in read_metrics(pathlib.Path(name))] for name in ("loaded", "named")]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_callbacks_see_every_record_and_can_end_the_training(trainer):
    class Watch(TrainingCallback):
        def __init__(self):
            self.logged, self.validated, self.saved = [], [], []

        def on_log(self, record):
            self.logged.append(record)

        def on_validation(self, record):
            self.validated.append(record)
            return record["step"] == 4

        def on_checkpoint(self, step):
            self.saved.append(step)

    watch = Watch()
    settings = SETTINGS["train"] | {"steps": 100}
    found = trainer(held_out=RECORDS[:8], callbacks=[watch], train=settings, validation={"every": 2})
    model = found.train()
    assert [row["step"] for row in watch.logged] == [1, 2, 3, 4] and watch.saved == [2, 4]
    assert [row["step"] for row in watch.validated] == [2, 4]
    assert watch.logged == read_metrics(pathlib.Path("run"))
    values = found.evaluate()
    best = min(watch.validated, key=lambda row: row["loss"])
    assert values == {name: value for name, value in best.items() if name != "step"}
    again = trainer(held_out=RECORDS[:8], train=settings, validation={"every": 2})
    assert again.evaluate() == values, "the model is read from the run directory"
    np.testing.assert_array_equal(again.model.encode("a"), model.encode("a"))
    evaluations = pathlib.Path("run/validation.jsonl")
    evaluations.write_text(evaluations.read_text().splitlines(keepends=True)[0])
    watch = Watch()  # as if the run had been killed between the checkpoint of step 4 and its evaluation
    trainer(held_out=RECORDS[:8], callbacks=[watch], train=settings, validation={"every": 2}).train()
    assert [row["step"] for row in watch.validated] == [4] and not watch.logged


def test_the_first_ctrl_c_saves_and_a_second_call_resumes(place, tiny_folder):
    """In a process of its own, and in a thread that gets no signals."""
    script = f"""
import json, llm2vec_gen_jax
class Show(llm2vec_gen_jax.TrainingCallback):
    def on_log(self, record):
        print(record["step"], flush=True)
records = json.loads({str(place / "records.json")!r} and open({str(place / "records.json")!r}).read())
trainer = llm2vec_gen_jax.LLM2VecGenTrainer(records, "run", backbone={str(tiny_folder("qwen3"))!r},
    callbacks=[Show()], show_progress=False, compression={{"num_tokens": 2}}, data={{"max_buckets": 1}},
    train={{"steps": 100_000, "batch_size": 8, "log_every": 1, "checkpoint_every": 100_000}})
try:
    trainer.train()
except KeyboardInterrupt as error:
    print("interrupted:", error, flush=True)
"""
    import json

    (place / "records.json").write_text(json.dumps(RECORDS))
    command = [sys.executable, "-c", script]
    process = Process(command, cwd=place, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    timer = threading.Timer(120, process.kill)
    timer.start()
    for line in process.stdout:
        if line.strip() == "3":
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate()
    timer.cancel()
    assert process.returncode == 0, err
    assert "interrupted: run: stopped on request, and saved at step " in out and "Call train() again to resume" in out
    step = int(out.split("saved at step ")[1].split(".")[0])
    assert (place / f"run/checkpoints/{step}").is_dir()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train": {"step": 1}}, "LLM2VecGenTrainer: unknown key train.step.*train.steps"),
        ({"train": {"steps": -1}}, "train.steps=-1: expected an integer >= 0"),
        ({"train": {"steps": "many"}}, "train.steps: expected an integer, found 'many'"),
        ({"loss": 1.0}, "loss: expected a dict of settings, found float"),
        ({"config": "none.yaml"}, "none.yaml"),
        ({"records": [{"question": "a"}]}, "records, row 0: no column 'answer'"),
        ({"records": [{"question": "a", "answer": 1}]}, "records, row 0: 'answer' must be a string, found int"),
        ({"records": ["a"]}, "records, row 0: expected a dict, found str"),
        ({"records": []}, "records: no rows"),
        ({"records": 5}, "records: expected a path or a list of dicts, found int"),
        ({"records": "none.jsonl"}, "none.jsonl: no such file"),
        ({"held_out": [{"question": "a"}]}, "held_out, row 0: no column 'answer'"),
    ],
)
def test_invalid_arguments_are_named(trainer, changes, message):
    with pytest.raises(InputError, match=message):
        trainer(**changes).train()


def test_nothing_to_evaluate_is_named(trainer):
    with pytest.raises(InputError, match="run/model: no model. Call train"):
        trainer(held_out=RECORDS).evaluate()
    found = trainer()
    found.train()
    with pytest.raises(InputError, match="nothing to evaluate: pass held_out=RECORDS"):
        found.evaluate()


def test_arguments_deviate_from_a_config(place, trainer):
    base = config.TrainConfig(loss=config.LossConfig(reconstruction=0.5, alignment=2.0))
    found = trainer(config=base, loss={"alignment": 3.0}).config
    assert (found.loss.reconstruction, found.loss.alignment, found.train.steps) == (0.5, 3.0, 4)
    assert base.loss.alignment == 2.0 and base.train.steps == 5000, "the given config is unchanged"
    (place / "c.yaml").write_text("loss:\n  reconstruction: 0.25\ntrain:\n  seed: 7\n")
    found = trainer(config="c.yaml").config
    assert (found.loss.reconstruction, found.train.seed, found.train.batch_size) == (0.25, 7, 8)
