"""What training compiles before its first step, and what it chooses by the memory that programs take."""

import dataclasses
import logging

import jax
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.data.examples import tokenize
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.execution import DEFAULT_REMAT, Execution
from llm2vec_gen_jax.parallel import memory
from llm2vec_gen_jax.training import loop, step_memory
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.optimizer import make_optimizer
from llm2vec_gen_jax.training.step import new_state
from llm2vec_gen_jax.training.train import CompressionTrainer, train
from tests.conftest import one_device_mesh, write_jsonl

RECORDS = [
    {"question": "why " * (1 + number % 40), "answer": "so " * (1 + (7 * number) % 60), "negative_answer": "no"}
    for number in range(200)
]


@pytest.fixture
def run(tmp_path, monkeypatch, tiny, tiny_folder):
    """run("key=value", ...) trains a tiny model on texts of many lengths, and returns the run directory."""
    monkeypatch.chdir(tmp_path)
    write_jsonl(tmp_path / "responses.jsonl", RECORDS)

    def start(*words):
        words = (f"backbone.path={tiny_folder('qwen3')}", "data.responses=responses.jsonl", "train.output=run", *words)
        words = ("compression.num_tokens=4", "train.batch_size=4", "train.log_every=1", *words)
        train(options.load(config.TrainConfig, None, words), show_progress=False, backbone=tiny("qwen3"))
        return tmp_path / "run"

    return start


@pytest.mark.parametrize(
    "words",
    [
        (),
        pytest.param(("lora.rank=2",), marks=pytest.mark.slow),
        pytest.param(("loss.repeat=0.5", "loss.contrastive=0.1", "lora.rank=0"), marks=pytest.mark.slow),
    ],
)
def test_no_step_waits_for_a_compilation(run, monkeypatch, caplog, words):
    begun = []

    def ahead(*arguments, inner=loop._ahead):
        begun.append(len(caplog.records))
        yield from inner(*arguments)

    monkeypatch.setattr(loop, "_ahead", ahead)
    jax.clear_caches()
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        run("train.steps=12", "train.checkpoint_every=100", "data.max_buckets=2", *words)
    names = [record.getMessage() for record in caplog.records if "Finished XLA compilation" in record.getMessage()]
    late = [record.getMessage() for record in caplog.records[begun[0] :]]
    assert sum("train_step" in name for name in names) > 1  # there are several shapes
    assert not [name for name in late if "XLA compilation of jit(train_step" in name or "jit(prefill" in name]


def trainer_of(tiny, tiny_folder, tmp_path):
    words = (f"backbone.path={tiny_folder('qwen3')}", "compression.num_tokens=4", "train.batch_size=4")
    words += ("data.max_buckets=2",)
    settings = options.load(config.TrainConfig, None, words)
    backbone = tiny("qwen3")
    examples = tokenize(RECORDS, backbone.tokenizer, settings.data, 4)
    examples.target = jax.numpy.zeros((len(examples), 6))
    return CompressionTrainer(settings, backbone, examples)


@pytest.mark.slow
def test_the_fastest_policy_that_fits_is_taken(tiny, tiny_folder, tmp_path, monkeypatch):
    """With the memory of the compiled steps themselves as the limit."""

    def chosen(limit):
        trainer = trainer_of(tiny, tiny_folder, tmp_path)
        monkeypatch.setattr(memory, "limit", lambda mesh: limit)
        state = new_state(trainer.init(), make_optimizer(trainer.config.optimizer))
        steps, step_with = [], trainer._step_with

        def recorded(remat):
            steps.append((remat, step_with(remat)))
            return steps[-1][1]

        monkeypatch.setattr(trainer, "_step_with", recorded)
        trainer.compile(state, range(5), False)
        policy, step = steps[-1]
        return policy, sum(memory.program_bytes(next(iter(step.compiled.values()))))  # of the largest batch

    policy, most = chosen(1e12)
    assert policy == "dots"
    policy, least = chosen(0.98 * most)  # the limit also determines the chunks of logits, and so some bytes
    assert policy == "block" and least < most
    assert chosen(1)[0] == "block"  # and the device itself will say that it does not fit
    assert chosen(None)[0] == DEFAULT_REMAT


def test_chunks_of_logits_grow_with_the_memory(monkeypatch):
    architecture = Architecture(151936, 4096, 12288, 36, 32, 8, 128, 1e-6, 1e6, None, False, True, False)
    execution = Execution(one_device_mesh())
    found = []
    for gigabytes in (None, 8, 16, 80, 1000):
        monkeypatch.setattr(memory, "limit", lambda mesh, size=gigabytes: size and size * 1e9)
        found.append(step_memory.chunk_tokens(architecture, execution))
    assert found == [512, 256, 512, 2048, 4096]
    narrow = dataclasses.replace(architecture, vocab_size=32000)
    monkeypatch.setattr(memory, "limit", lambda mesh: 16e9)
    assert step_memory.chunk_tokens(narrow, execution) == 2048


def test_a_profile_is_written_and_changes_nothing(run, messages):
    folder = run("train.steps=4", "train.profile=2:3")
    assert f"profile: {folder / 'profile'}" in messages().replace("run/profile", str(folder / "profile"))
    assert list((folder / "profile").rglob("*.xplane.pb"))
    assert [row["step"] for row in read_metrics(folder)] == [1, 2, 3, 4]
    run("train.steps=4", "train.profile=null")  # a finished run: what is profiled is not part of it


@pytest.mark.parametrize("value", ["3", "3:2", "0:2", "a:b", "1:2:3"])
def test_a_profile_of_no_steps_is_named(run, value):
    with pytest.raises(InputError, match=f"train.profile={value}: expected START:STOP"):
        run("train.steps=1", f"train.profile={value}")
