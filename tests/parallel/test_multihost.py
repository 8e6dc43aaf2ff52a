"""Several real processes with fake devices are one run: the same losses and models as one process.

That they share one fate is what test_chaos.py shows: signals, lost and frozen processes, full disks.
"""

import concurrent.futures
import fcntl
import json
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from llm2vec_gen_jax import LLM2VecGen, config, load_embeddings
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.parallel import processes, rendezvous
from llm2vec_gen_jax.training.metrics import read_metrics, read_validation
from tests.conftest import write_jsonl
from tests.helpers.processes import Process, environment
from tests.helpers.tasks import write_task

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

    def __init__(self, folder, processes, devices, *words, different=(), script="", torch=False):
        """words: the command's name and what follows. different: more words, for all processes but the first; script:
        Python that these (or a single one) run before; torch: whether PyTorch can be imported."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.address = address = free_address()
        self.processes = []
        for index in range(processes):
            own = [f"distributed={address}", f"num_processes={processes}", f"process_id={index}"]
            own = [*(own if processes > 1 else []), *(different if index else ())]
            first = script if index or processes == 1 else ""
            run = f"{first}\nimport runpy; runpy.run_module('launch.{words[0]}', run_name='__main__')"
            command = [sys.executable, "-c", run, *words[1:], *own]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            self.processes.append(Process(command, cwd=folder, env=environment(devices, torch), **pipes))

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
    """Targets, training, evaluation, checkpoint and model of 2 x 4 devices, of 1 x 8 and of one device."""
    words = ("mesh.fsdp=2", "mesh.tensor=2", "train.steps=4", "train.checkpoint_every=2")
    words += ("validation.responses=../responses.jsonl", "validation.every=2", "validation.keep_best=false")
    two = cluster("two", 2, 4, *words).succeed()
    one = cluster("one", 1, 8, *words).succeed()
    evaluated = [read_validation(run, 4) for run in (two, one)]
    assert [row["step"] for row in evaluated[0]] == [2, 4]
    for rows in zip(*evaluated, strict=True):
        np.testing.assert_allclose(*([row[name] for name in sorted(row)] for row in rows), rtol=1e-5)
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


def test_tensor_parallel_processes_have_the_same_rows(cluster):
    """The devices of a group are in two processes, which both need all rows of the group's batch."""
    words = ("train.steps=3", "validation.responses=../responses.jsonl", "train.ridge_examples=16")
    two = cluster("two", 2, 1, *words, "mesh.tensor=2").succeed()
    four = cluster("four", 4, 1, *words, "mesh.data=2", "mesh.tensor=2").succeed()
    single = cluster("single", 1, 1, *words).succeed()
    for run in (two, four):
        np.testing.assert_allclose(losses(run), losses(single), rtol=1e-4)
        assert read_validation(run, 3)[0]["loss"] == pytest.approx(read_validation(single, 3)[0]["loss"], rel=1e-4)


def test_two_processes_train_a_teacher(cluster, tiny_folder):
    texts = [f"Sentence number {number} is about {number * number}." for number in range(24)]
    (cluster.folder / "corpus.txt").write_text("\n".join(texts))
    words = ["corpus.path=../corpus.txt", "train.output=run", "train.log_every=1", "heartbeat_timeout=10"]
    words += ["mntp.max_length=16", "mntp.rank=2", "simcse.rank=2"]
    words += [f"{stage}.{key}" for stage in ("mntp", "simcse") for key in ("steps=2", "batch_size=8")]
    command = ("train_teacher", f"backbone.path={tiny_folder('qwen3')}", *words)
    two, one = (cluster.start(str(count), count, 2 // count, *command).succeed() for count in (2, 1))
    for stage in ("mntp", "simcse"):
        np.testing.assert_allclose(losses(two / f"{stage}-run"), losses(one / f"{stage}-run"), rtol=1e-4)
        first, second = (load_file(run / stage / "adapter_model.safetensors") for run in (two, one))
        assert first.keys() == second.keys()
        for name, array in first.items():
            np.testing.assert_allclose(array, second[name], atol=1e-5)


@pytest.mark.slow
def test_two_processes_score_tasks_and_end_at_the_same_step(cluster):
    pytest.importorskip("mteb", reason="needs requirements-eval.txt")
    write_task(cluster.folder / "tasks/sts", "sts")
    words = ("validation.tasks=../tasks", "validation.every=2", "validation.patience=1", "train.steps=100")
    two, one = (cluster(str(count), count, 2 // count, *words, torch=True).succeed() for count in (2, 1))
    scores = [read_validation(run, 100) for run in (two, one)]
    assert len(scores[0]) < 50, "the run ended before its last step"
    assert [row["step"] for row in scores[0]] == [row["step"] for row in scores[1]]
    for rows in zip(*scores):
        assert rows[0]["Small-sts"] == pytest.approx(rows[1]["Small-sts"], abs=1e-4)


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
from llm2vec_gen_jax.training.checkpoints import ocp
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
from llm2vec_gen_jax.data import batches

def slowly(self, *arguments, run=asyncio.BaseEventLoop.run_in_executor):
    time.sleep(0.2)
    return run(self, *arguments)

def broken(self, step, read=batches.Batches.__getitem__):
    return read(self, step) if step < 12 else 1 / 0

asyncio.BaseEventLoop.run_in_executor, batches.Batches.__getitem__ = slowly, broken
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
    for name, count in (("alone", 1), ("joined", 2)):
        for code, out, err in cluster.start(name, count, 2, *words, "output=vectors").wait():
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
def test_bad_words_are_named(words, message):
    with pytest.raises(InputError, match=message):
        processes.initialize(options.load(config.TrainConfig, None, words))


def test_a_bad_word_is_named_on_the_command_line(cluster):
    ((code, _, err),) = cluster("bad", 1, 1, "train.steps=1", "distributed=host").wait()
    assert code == 2 and err == "error: distributed=host: expected auto, off or HOST:PORT (of process 0)\n"


# Joining


AUTO = """if True:
    import sys
    import jax
    from llm2vec_gen_jax.config import TrainConfig
    from llm2vec_gen_jax.parallel import processes
    try:
        processes.initialize(TrainConfig(join_timeout=int(sys.argv[1])))
    except processes.PeerMissing as error:
        sys.exit(str(error))
    print(jax.process_index(), jax.process_count())
    """


@pytest.mark.parametrize("present", [(0,), (1,), (0, 1)])
def test_processes_of_a_cluster_that_jax_detects_meet_as_others_do(present):
    """JAX alone would end in C++ when one does not come."""
    port = free_address().rpartition(":")[2]
    slurm = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "127.0.0.1", "SLURM_NTASKS": "2", "JAX_COORDINATOR_PORT": port}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", AUTO, "60" if len(present) == 2 else "2"]
    processes = []
    for index in present:
        own = environment(**slurm, SLURM_PROCID=str(index), SLURM_LOCALID="0")
        processes.append(subprocess.Popen(command, env=own, **pipes))
    for index, process in zip(present, processes):
        out, errors = process.communicate(timeout=120)
        if len(present) == 2:
            assert (process.returncode, out.strip()) == (0, f"{index} 2"), errors
        else:
            assert process.returncode == 1 and errors.count("\n") == 1
            assert f"distributed=auto: process {index} of 2 could not join (" in errors


def test_a_process_that_does_not_come_is_said(cluster):
    for index in (0, 1):
        words = (f"distributed={free_address()}", "num_processes=2", f"process_id={index}", "join_timeout=2")
        ((code, _, err),) = cluster("alone", 1, 1, "train.steps=1", *words).wait(timeout=60)
        assert code == 75 and err.count("\n") == 1, err
        assert f"process {index} of 2 could not join (" in err
        assert ("no connection within join_timeout from process 1" if index == 0 else "Connection refused") in err


def test_a_port_that_is_taken_is_said(cluster):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = (f"distributed=127.0.0.1:{port}", "num_processes=2", "process_id=0")
        ((code, _, err),) = cluster("taken", 1, 1, "train.steps=1", *words).wait(timeout=60)
    assert code == 75 and err.count("\n") == 1
    assert f"could not join (cannot listen on port {port}: Address already in use)" in err


def met(address, count, *indices, timeout=20):
    """Lets threads stand for the processes `indices`. Returns a Future of each."""
    host, _, port = address.rpartition(":")
    pool = concurrent.futures.ThreadPoolExecutor(len(indices))
    found = []
    for index in indices:
        found.append(pool.submit(rendezvous.meet, host, int(port), count, index, timeout))
        time.sleep(0.3)
    pool.shutdown(wait=False)
    return found


def test_processes_meet_whoever_comes_first():
    for order in ((0, 1, 2), (2, 1, 0)):
        assert [each.result(10) for each in met(free_address(), 3, *order)] == [None] * 3


def test_who_is_not_of_the_run_is_refused_and_the_others_meet():
    address = free_address()
    host, _, port = address.rpartition(":")
    first, one, twin = met(address, 3, 0, 1, 1)
    with pytest.raises(rendezvous.Missed, match="another process joined with process_id=1"):
        twin.result(10)
    (larger,) = met(address, 4, 3)
    with pytest.raises(rendezvous.Missed, match="process 0 was started with num_processes=3"):
        larger.result(10)
    for message in (b"GET / HTTP/1.1\r\n\r\n", b"[" * 4000, b"", b'{"process": true, "of": 3}\n', b"\x00\n"):
        with socket.create_connection((host, int(port))) as stranger:
            stranger.sendall(message)
    assert not first.done() and not one.done()
    (two,) = met(address, 3, 2)
    assert [each.result(10) for each in (first, one, two)] == [None] * 3


def test_a_process_that_is_started_again_is_met():
    address = free_address()
    host, _, port = address.rpartition(":")
    (first,) = met(address, 2, 0)
    with socket.create_connection((host, int(port))) as ended:
        ended.sendall(b'{"process": 1, "of": 3}\n')
        ended.recv(100)
    (one,) = met(address, 2, 1)
    assert [each.result(10) for each in (first, one)] == [None] * 2


@pytest.mark.slow
def test_a_stray_process_cannot_end_a_run_and_a_signal_stops_it(cluster):
    """A second start of a process of a run that trains, and of its process 0; then Ctrl-C to one of them."""
    run = cluster("run", 2, 1, "train.steps=100000")
    address = run.address
    metrics = run.folder / "run" / "metrics.jsonl"
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 2):
        assert [process.poll() for process in run.processes] == [None, None], run.wait()
        time.sleep(0.05)
    for index in (1, 0):
        words = (f"distributed={address}", "num_processes=2", f"process_id={index}", "join_timeout=3")
        ((code, _, err),) = cluster("stray", 1, 1, "train.steps=1", *words).wait(timeout=60)
        assert code == 75 and "could not join" in err and err.count("\n") == 1
    before = len(metrics.read_text().splitlines())
    time.sleep(1)
    assert [process.poll() for process in run.processes] == [None, None]
    assert len(metrics.read_text().splitlines()) > before
    run.processes[1].send_signal(signal.SIGINT)
    for code, _, err in run.wait(timeout=60):
        assert code == 3 and "stopped on request, and saved at step" in err


@pytest.mark.slow
def test_processes_that_wait_for_targets_stop_together(cluster):
    cluster("first", 1, 1, "train.steps=1").succeed()
    (targets,) = (cluster.folder / "responses.jsonl.targets").glob("*.npy")
    targets.unlink()
    with open(targets.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = cluster("second", 2, 1, "train.steps=1")
        assert any("waiting for another process" in line for line in waiting.processes[0].stdout)
        waiting.processes[1].send_signal(signal.SIGTERM)
        for code, _, err in waiting.wait(timeout=30):
            assert code == 3 and "stopped on request, while another process computes the targets" in err


# The watchdog


def test_the_watchdog_ends_a_process_that_hangs():
    script = """
import time
from llm2vec_gen_jax.parallel.watchdog import Watchdog

with Watchdog(1) as watchdog:
    watchdog.beat("step 3")
    time.sleep(60)
"""
    root = pathlib.Path(__file__).parents[2]
    hung = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=50)
    assert hung.returncode == 76
    assert "no progress for 1 seconds since step 3" in hung.stderr and "most recent call first" in hung.stderr


# The files that start a run on a cluster

LAUNCH = pathlib.Path(__file__).parents[2] / "launch"
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
