"""Several real processes with fake devices are one run: the same losses and models as one process.

That they share one fate is what test_chaos.py shows: signals, lost and frozen processes, full disks.
"""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import yaml

from llm2vec_gen_jax import LLM2VecGen, config, load_embeddings, options
from llm2vec_gen_jax.metrics import read_metrics

from .conftest import write_jsonl

RECORDS = [
    {"question": f"What is {number}?", "answer": f"It is {'abcdefgh'[number % 8] * (1 + number % 6)}."}
    for number in range(24)
]
WORDS = (
    "data.responses=../responses.jsonl",
    "compression.num_tokens=4",
    "data.max_buckets=1",
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_steps=2",
    "train.output=run",
    "train.batch_size=8",
    "train.log_every=1",
    "heartbeat_timeout=10",
)


def free_address():
    """Returns HOST:PORT of this machine where nothing listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


class Cluster:
    """Processes of one run on this machine, `devices` fake ones each, in a folder of their own."""

    def __init__(self, folder, processes, devices, *words, different=(), script=""):
        """words: the command's name and what follows. different: more words, for all processes but the first; script:
        Python that these (or a single one) run before."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        address = free_address()
        environment = os.environ | {
            "PYTHONPATH": str(pathlib.Path(__file__).parent.parent),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self.processes = []
        for index in range(processes):
            own = [f"distributed={address}", f"num_processes={processes}", f"process_id={index}"]
            own = [*(own if processes > 1 else []), *(different if index else ())]
            first = script if index or processes == 1 else ""
            run = f"{first}\nimport runpy; runpy.run_module('launch.{words[0]}', run_name='__main__')"
            command = [sys.executable, "-c", run, *words[1:], *own]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(subprocess.Popen(command, cwd=folder, env=environment, **pipes))

    def wait(self, timeout=300):
        """Returns [(exit code, stdout, stderr)] of the processes."""
        outputs = [process.communicate(timeout=timeout) for process in self.processes]
        return [(process.returncode, *output) for process, output in zip(self.processes, outputs)]

    def succeed(self):
        """Waits, and returns the run directory."""
        for code, out, err in self.wait():
            assert code == 0, out + err
        return self.folder / "run"


@pytest.fixture
def cluster(tmp_path, tiny_folder):
    """cluster(name, processes, devices, *words, different=...) starts a Cluster that trains; what still runs is ended.

    cluster.start(name, processes, devices, *words) starts any command.
    """
    write_jsonl(tmp_path / "responses.jsonl", RECORDS)
    started = []

    def start(name, processes, devices, *words, **options):
        started.append(Cluster(tmp_path / name, processes, devices, *words, **options))
        return started[-1]

    def train(name, processes, devices, *words, **options):
        first = ("train", f"backbone.path={tiny_folder('qwen3')}", *WORDS)
        return start(name, processes, devices, *first, *words, **options)

    train.start, train.folder = start, tmp_path
    yield train
    for each in started:
        for process in each.processes:
            process.kill()
            process.communicate()


def losses(run):
    return [row["loss"] for row in read_metrics(run)]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_two_processes_equal_one(cluster):
    """Targets, training, checkpoint and model of 2 x 4 devices, of 1 x 8 and of one device; then from 2 to 1."""
    words = ("mesh.fsdp=2", "mesh.tensor=2", "train.steps=4", "train.checkpoint_every=2")
    two = cluster("two", 2, 4, *words).succeed()
    one = cluster("one", 1, 8, *words).succeed()
    single = cluster("single", 1, 1, "train.steps=4").succeed()
    np.testing.assert_allclose(losses(two), losses(one), rtol=1e-5)
    np.testing.assert_allclose(losses(two), losses(single), rtol=1e-5)
    padding = [[row["padding_fraction"] for row in read_metrics(run)] for run in (two, one)]
    assert padding[0] == padding[1]
    texts = ["What is 7?", "What is 90?"]
    expected = LLM2VecGen.from_pretrained(single / "model", dtype="float32").encode(texts)
    for run in (two, one):
        found = LLM2VecGen.from_pretrained(run / "model", dtype="float32").encode(texts)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    assert sorted(path.name for path in two.iterdir()) == sorted(path.name for path in one.iterdir())


@pytest.mark.slow
def test_what_two_processes_began_one_finishes(cluster):
    """Bit for bit: two numbers have one sum. (More devices are summed in another order by each way of joining them.)"""
    words = ("train.checkpoint_every=2",)
    cluster("moved", 2, 1, *words, "train.steps=2").succeed()
    moved = cluster("moved", 1, 2, *words, "train.steps=4").succeed()
    stayed = cluster("stayed", 1, 2, *words, "train.steps=4").succeed()
    assert losses(moved) == losses(stayed)
    assert contents(moved / "model") == contents(stayed / "model")


@pytest.mark.slow
def test_two_processes_are_one_tracked_run(cluster, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = cluster("tracked", 2, 1, "train.steps=2", "tracking=wandb").succeed()
    (log,) = (run.parent).rglob("*.wandb")
    identity = json.loads((run / "tracking.json").read_text())["wandb"]
    assert log.is_relative_to(run) and log.name == f"run-{identity}.wandb"


def test_processes_that_do_not_agree_say_so(cluster):
    for code, _, err in cluster("seeds", 2, 1, "train.steps=2", different=["train.seed=7"]).wait():
        assert code == 2
        assert "do not agree: config.train.seed: 42 -> 7 (process 0 -> process 1)" in err
    for code, _, err in cluster("missing", 2, 1, "train.steps=2", "teacher.kind=file", "teacher.path=no.npy").wait():
        assert code == 2 and "no.npy" in err


@pytest.mark.slow
def test_a_peer_that_dies_in_the_restore_is_no_damage(cluster):
    words = ("train.checkpoint_every=2", "train.watchdog=20")
    cluster("lost", 2, 1, *words, "train.steps=4").succeed()
    script = """
import os, signal
from llm2vec_gen_jax.checkpoint import ocp
ocp.args.StandardRestore = lambda abstract: os.kill(os.getpid(), signal.SIGKILL)
"""
    (code, out, err), _ = cluster("lost", 2, 1, *words, "train.steps=6", script=script).wait()
    assert code in (75, -6), out + err
    assert "sound" not in err and not list((cluster.folder / "lost" / "run").rglob("_damaged"))
    resumed = cluster("lost", 2, 1, *words, "train.steps=6").succeed()
    assert [row["step"] for row in read_metrics(resumed)] == [1, 2, 3, 4, 5, 6]


def test_a_failure_beside_a_save_ends_the_process(cluster):
    """On a disk so slow that a save is under way when the reading of data fails."""
    script = """
import asyncio, time
from llm2vec_gen_jax import data

def slowly(self, *arguments, run=asyncio.BaseEventLoop.run_in_executor):
    time.sleep(0.2)
    return run(self, *arguments)

def broken(self, step, read=data.Batches.__getitem__):
    return read(self, step) if step < 12 else 1 / 0

asyncio.BaseEventLoop.run_in_executor, data.Batches.__getitem__ = slowly, broken
"""
    words = ("train.steps=40", "train.checkpoint_every=10")
    ((code, out, err),) = cluster("failing", 1, 1, *words, script=script).wait(timeout=60)
    assert code == 1 and "ZeroDivisionError" in err
    assert cluster("failing", 1, 1, *words).succeed()


@pytest.mark.slow
def test_joined_processes_encode_a_share_each(cluster, tmp_path):
    model = cluster("trained", 1, 1, "train.steps=1").succeed() / "model"
    (tmp_path / "texts.txt").write_text("\n".join(f"text {'of words ' * (n % 7)}{n}" for n in range(60)))
    words = ("encode", str(model), "input=../texts.txt", "shard_size=8", "dtype=float32")
    for name, processes in (("alone", 1), ("joined", 2)):
        for code, out, err in cluster.start(name, processes, 2, *words, "output=vectors").wait():
            assert code == 0, out + err
    alone, joined = (load_embeddings(tmp_path / name / "vectors", verify=True) for name in ("alone", "joined"))
    np.testing.assert_array_equal(alone, joined)
    assert len(list((tmp_path / "joined" / "vectors").glob("manifest-0000?-of-00002.json"))) == 2


@pytest.mark.parametrize(
    "words, message",
    [
        (["distributed=host"], "distributed=host: expected auto, off or HOST:PORT"),
        (["distributed=host:1"], "distributed=host:1 needs num_processes=N and process_id"),
        (["distributed=host:1", "num_processes=2", "process_id=2"], r"found 2, 2"),
        (["num_processes=2"], "num_processes and process_id need distributed=HOST:PORT"),
    ],
)
def test_bad_words_are_named(cluster, words, message):
    ((code, _, err),) = cluster("bad", 1, 1, "train.steps=1", *words).wait()
    assert code == 2 and message in err


def test_the_watchdog_ends_a_process_that_hangs():
    script = """
import time
from llm2vec_gen_jax.distributed import Watchdog

with Watchdog(1) as watchdog:
    watchdog.beat("step 3")
    time.sleep(60)
"""
    root = pathlib.Path(__file__).parent.parent
    hung = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=50)
    assert hung.returncode == 76
    assert "no progress for 1 seconds since step 3" in hung.stderr and "most recent call first" in hung.stderr


# The files that start a run on a cluster

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = [path for pattern in ("*.sh", "*.sbatch", "*.yaml") for path in LAUNCH.rglob(pattern)]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_launch_files_are_well_formed_and_their_keys_exist(path):
    text = path.read_text()
    if path.suffix == ".yaml":
        text = json.dumps(yaml.safe_load(text))
    else:
        subprocess.run(["bash", "-n", path], check=True)
    words = re.findall(r"\b((?:data|train|mesh)\.\w+=[\w/.]+|configs/[\w.-]+\.yaml)", text)
    keys, files = [word for word in words if "=" in word], [word for word in words if "=" not in word]
    assert files and all((LAUNCH.parent / file).exists() for file in files)
    options.load(config.TrainConfig, LAUNCH.parent / files[0], keys)
