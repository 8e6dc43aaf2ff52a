"""Signals, and streams that are closed: a run saves and stops, a command ends with one line and its exit code."""

import fcntl
import itertools
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from llm2vec_gen_jax.parallel import preemption
from llm2vec_gen_jax.training.metrics import read_metrics
from tests.conftest import write_jsonl
from tests.helpers.embedders import TEXTS
from tests.helpers.processes import Process, environment

ROOT = pathlib.Path(__file__).parents[2]
RECORDS = [{"question": f"What is {number}?", "answer": f"It is {'abcdefgh'[number % 8]}."} for number in range(24)]
WORDS = (
    "data.responses=responses.jsonl",
    "compression.num_tokens=4",
    "data.max_buckets=1",
    "train.output=run",
    "train.batch_size=8",
    "train.log_every=1",
)
STOPS = (signal.SIGTERM, signal.SIGINT)
ONE_STOP = (pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT)  # both have one handler


@pytest.fixture
def start(tmp_path, tiny_folder):
    """start(*words, script="", name="train") starts the command in tmp_path, after Python that it is to run before.

    Returns its Popen; what still runs at the end of the test is killed.
    """
    write_jsonl(tmp_path / "responses.jsonl", RECORDS)
    started = []

    def launch(*words, script="", name="train", stdin=None, **variables):
        words = (f"backbone.path={tiny_folder('qwen3')}", *WORDS, *words) if name == "train" else words
        run = f"{script}\nimport runpy; runpy.run_module('launch.{name}', run_name='__main__')"
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        command = [sys.executable, "-c", run, *words]
        started.append(Process(command, cwd=tmp_path, env=environment(**variables), **pipes))
        return started[-1]

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def until(process, condition):
    """Waits until condition() is true while the process runs."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def ended(process, code, seconds=120):
    """Waits for the process. Returns its errors, which hold no traceback."""
    out, errors = process.communicate(timeout=seconds)
    assert process.returncode == code, out + errors
    assert "Traceback" not in errors and "Fatal" not in errors
    return errors


def steps_of(folder):
    return sorted(int(path.name) for path in (folder / "run/checkpoints").glob("*") if path.name.isdigit())


def logged(folder):
    path = folder / "run/metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


# Training


@pytest.mark.parametrize("number", STOPS)
def test_the_first_signal_saves_and_stops_and_the_run_goes_on(start, tmp_path, number):
    run = start("train.steps=100000")
    until(run, lambda: logged(tmp_path) > 3)
    run.send_signal(number)
    errors = ended(run, 3)
    (step,) = steps_of(tmp_path)
    assert f"stopped on request, and saved at step {step}. Repeat the command to resume" in errors
    assert ("press Ctrl-C again to exit immediately" in errors) == (number == signal.SIGINT)
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, step + 1))
    again = start(f"train.steps={step + 2}")
    out, errors = again.communicate(timeout=120)
    assert again.returncode == 0 and f"resuming run at step {step}" in out, errors


SLOW_SAVE = """
import time
from llm2vec_gen_jax.training.checkpoints import Checkpoints
Checkpoints.save = lambda self, step, state: (print('saving', flush=True), time.sleep(600))
"""


def test_a_second_ctrl_c_ends_at_once(start, tmp_path):
    run = start("train.steps=100000", script=SLOW_SAVE)
    until(run, lambda: logged(tmp_path) > 3)
    run.send_signal(signal.SIGINT)
    assert any("saving" in line for line in run.stdout)
    run.send_signal(signal.SIGINT)
    ended(run, -signal.SIGINT, 20)


@pytest.mark.parametrize("number", ONE_STOP)
def test_a_signal_before_the_first_step_ends_at_once(start, tmp_path, number):
    script = "import time; from llm2vec_gen_jax.data import records\n"
    script += "records.read_records = lambda *a, **k: (print('reading', flush=True), time.sleep(600))"
    run = start("train.steps=2", script=script)
    assert any("reading" in line for line in run.stdout)
    run.send_signal(number)
    assert "stopped on request" in ended(run, 3, 20)


@pytest.mark.parametrize("number", ONE_STOP)
def test_a_run_that_waits_for_the_targets_of_another_can_be_stopped(start, tmp_path, number):
    ended(start("train.steps=1"), 0, 120)
    (targets,) = (tmp_path / "responses.jsonl.targets").glob("*.npy")
    targets.unlink()
    with open(targets.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiting = start("train.steps=2", "train.output=other")
        assert any("waiting for another process" in line for line in waiting.stdout)
        waiting.send_signal(number)
        assert "stopped on request" in ended(waiting, 3, 20)


def test_a_checkpoint_is_saved_by_time_too(start, tmp_path):
    words = ("train.steps=6", "train.keep_checkpoints=9")
    ended(start(*words, "train.checkpoint_minutes=1e-6"), 0, 120)
    assert steps_of(tmp_path) == [1, 3, 5, 6]  # a step later than asked: all processes read it with its metrics
    out, errors = (again := start("train.steps=8", *words[1:], "train.checkpoint_minutes=0")).communicate(timeout=120)
    assert again.returncode == 0 and "resuming run at step 6" in out, errors
    assert steps_of(tmp_path)[-1] == 8 and 7 not in steps_of(tmp_path)


@pytest.mark.slow
def test_64_bit_numbers_in_jax_change_nothing(start, tmp_path):
    ended(start("train.steps=3", "train.checkpoint_every=2"), 0, 120)
    words = ("train.steps=3", "train.checkpoint_every=2", "train.output=wide")
    ended(start(*words, JAX_ENABLE_X64="1"), 0, 120)
    narrow, wide = (read_metrics(tmp_path / name) for name in ("run", "wide"))
    assert [row["loss"] for row in narrow] == pytest.approx([row["loss"] for row in wide], rel=1e-6)
    (path,) = (tmp_path / "wide/model").glob("alignment_mlp.safetensors")
    assert path.stat().st_size == (tmp_path / "run/model" / path.name).stat().st_size
    resumed = start("train.steps=4", "train.output=wide")
    assert "resuming" in resumed.communicate(timeout=120)[0] and resumed.returncode == 0


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOPS]
    with preemption.caught():
        assert [signal.getsignal(number) for number in STOPS] != before
        signal.raise_signal(signal.SIGTERM)
        assert preemption.asked()
        with pytest.raises(preemption.Stopped):
            preemption.stop_at_once()
    assert [signal.getsignal(number) for number in STOPS] == before and not preemption.asked()
    with preemption.caught():
        preemption.stop_at_once()
        with preemption.deferred():
            signal.raise_signal(signal.SIGINT)
        assert preemption.asked()


# Encoding standard input


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_encode_stops_while_its_producer_is_silent(start, model_folder, tmp_path, number, code):
    encode = start(str(model_folder), "input=-", "output=out", "shard_size=2", name="encode", stdin=subprocess.PIPE)
    encode.stdin.write("".join(f"{text}\n" for text in itertools.islice(itertools.cycle(TEXTS), 1100)))
    encode.stdin.flush()
    until(encode, lambda: list(tmp_path.glob("out/embeddings-*")))
    encode.send_signal(number)
    assert encode.wait(timeout=20) == code
    encode.stdin.close()
    encode.stdin = None
    ended(encode, code)


def test_a_stdin_that_cannot_be_read_is_one_line(start, model_folder, tmp_path):
    words = (str(model_folder), "input=-", "output=out")
    with open(tmp_path / "written", "w") as file:
        errors = ended(start(*words, name="encode", stdin=file), 2)
        assert errors.endswith("\nerror: input=-: standard input cannot be read (Bad file descriptor)\n")
    closed = subprocess.run(
        ["bash", "-c", f'"$0" -m launch.encode {" ".join(words)} <&-', sys.executable],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert closed.returncode == 2 and "Traceback" not in closed.stderr
    assert closed.stderr.endswith("error: input=-: no texts\n")


# Output that nobody reads


@pytest.mark.parametrize("module", ["launch", "launch.train", "launch.lens"])
def test_help_may_be_cut_off(module):
    command = f'"$0" -m {module} --help | true; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command, sys.executable], env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_streams_are_no_traceback(tmp_path):
    command = '"$0" -m launch.train data.responses=none.jsonl train.output=run <&- >&- 2>err; echo $? >code'
    subprocess.run(["bash", "-c", command, sys.executable], cwd=tmp_path, env=environment(), check=True)
    assert (tmp_path / "code").read_text() == "2\n"
    assert (tmp_path / "err").read_text() == "error: data.responses=none.jsonl: no such file\n"


def test_an_output_that_is_closed_or_full_is_one_line(start, model_folder, tmp_path):
    command = f'"$0" -m launch.decode {model_folder} text=a max_new_tokens=2'
    for end, code, said in (
        ("| true; exit ${PIPESTATUS[0]}", 1, "error: standard output: closed by its reader\n"),
        (">/dev/full", 74, "error: writing: No space left on device\n"),
    ):
        words = ["bash", "-c", f"{command} {end}", sys.executable]
        done = subprocess.run(words, cwd=tmp_path, env=environment(), capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (code, said)
