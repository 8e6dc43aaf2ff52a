"""The faults of tests.chaos: interruptions of a run, and damage to its files."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
HEARTBEAT, WATCHDOG, GRACE, JOIN = 10, 12, 5, 20  # seconds
EVERY = 4  # steps between checkpoints
WORDS = (
    "backbone.path=../backbone",
    "data.responses=responses.jsonl",
    "data.max_buckets=1",
    "compression.num_tokens=4",
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_steps=2",
    "train.output=run",
    "train.batch_size=8",
    "train.log_every=1",
    f"train.checkpoint_every={EVERY}",
    f"heartbeat_timeout={HEARTBEAT}",
    f"join_timeout={JOIN}",
)
LOST = {75, -signal.SIGABRT}  # exit codes after a fault of another process; JAX itself may abort first


class Failure(Exception):
    """The run did not behave as required."""


class Leg:
    """One execution of a command, as `count` processes with 2 / count devices each."""

    def __init__(self, folder, count, words, name="output"):
        """words: the command's name and arguments. name: prefix of the files with its output."""
        self.folder, self.trains = folder, False
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={2 // count}",
            "JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        address = _free_address()
        self.processes, self.outputs = [], []
        for index in range(count):
            joined = [f"distributed={address}", f"num_processes={count}", f"process_id={index}"] if count > 1 else []
            command = [sys.executable, "-m", "tests.chaos.child", *words, *joined]
            output = open(folder.parent / f"{name}-{index}.txt", "w+", encoding="utf-8")
            self.outputs.append(output)
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            # In a new session, by which remaining child processes are found.
            self.processes.append(
                subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
            )

    def running(self):
        return all(process.poll() is None for process in self.processes)

    def until(self, condition, seconds=120):
        """Returns whether `condition()` became true while all processes ran."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.running():
                return False
            if time.monotonic() > end:
                raise Failure(f"nothing happened for {seconds} seconds")
            time.sleep(0.005)
        return True

    def wait(self, limit, but=None):
        """Returns the exit codes of all processes. Raises Failure if one does not exit within `limit` seconds.

        but: a process that is ignored.
        """
        end, waited_for = time.monotonic() + limit, [process for process in self.processes if process is not but]
        for index, process in enumerate(waited_for):
            try:
                process.wait(max(end - time.monotonic(), 0.01))
            except subprocess.TimeoutExpired:
                raise Failure(f"process {index} of {len(self.processes)} still runs after {limit:.0f} s") from None
        for process in waited_for:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, 0)
                raise Failure("left a process running")
        return [process.returncode for process in waited_for]

    def said(self):
        """Returns the output of all processes."""
        texts = []
        for output in self.outputs:
            output.seek(0)
            texts.append(output.read())
        return "\n".join(texts)

    def end(self):
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Chaos:
    """A folder in which a run is interrupted until it finishes."""

    def __init__(self, folder, steps, rng):
        self.folder, self.run, self.rng = folder, folder / "run", rng
        self.words = ("train", *WORDS, f"train.steps={steps}", f"train.watchdog={WATCHDOG}")

    def done(self):
        return (self.run / "model").exists()

    def steps(self):
        """Returns the checkpoints that are complete according to their names, oldest first."""
        folder = self.run / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())

    def logged(self):
        """Returns (inode of the metrics file, number of records): a resumed run starts a new file."""
        path = self.run / "metrics.jsonl"
        return (path.stat().st_ino, path.read_bytes().count(b"\n")) if path.exists() else (None, 0)

    @contextlib.contextmanager
    def leg(self, count=None):
        """Yields a Leg, which is always ended."""
        self.old_file, _ = self.logged()
        leg = Leg(self.folder, count or self.rng.choice((1, 2)), self.words)
        try:
            yield leg
        finally:
            leg.end()

    def at_step(self, leg):
        """Waits for a few steps. Returns False if the run ended first."""
        goal = (self.steps() or [0])[-1] + self.rng.randint(2, 3 * EVERY)

        def there():
            file, records = self.logged()
            return file != self.old_file and records >= goal

        leg.trains = leg.until(there)
        return leg.trains


def kill(chaos, leg):
    return chaos.at_step(leg) and _send(chaos, leg, signal.SIGKILL, {-signal.SIGKILL}, LOST)


def kill_in_a_save(chaos, leg):
    def saving():
        return any(chaos.run.glob("checkpoints/*.orbax-checkpoint-tmp"))

    return chaos.at_step(leg) and leg.until(saving) and _send(chaos, leg, signal.SIGKILL, {-signal.SIGKILL}, LOST)


def kill_at_the_start(chaos, leg):
    time.sleep(chaos.rng.uniform(0, 6))
    return _send(chaos, leg, signal.SIGKILL, {-signal.SIGKILL}, LOST)


def term(chaos, leg):
    return chaos.at_step(leg) and _send(chaos, leg, signal.SIGTERM, {3}, {3})


def term_at_the_start(chaos, leg):
    deadline = time.monotonic() + 60
    while not all(_handles_sigterm(process) for process in leg.processes) and time.monotonic() < deadline:
        time.sleep(0.05)  # Python itself is starting, which ends by the default action
    time.sleep(chaos.rng.uniform(0, 5))
    return _send(chaos, leg, signal.SIGTERM, {3}, {3})


def _handles_sigterm(process):
    """Whether a process has a handler for SIGTERM, or has ended."""
    try:
        status = pathlib.Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return True
    caught = re.search(r"SigCgt:\s*([0-9a-f]+)", status)
    return process.poll() is not None or bool(int(caught[1], 16) >> (signal.SIGTERM - 1) & 1)


def interrupt(chaos, leg):
    return chaos.at_step(leg) and _send(chaos, leg, signal.SIGINT, {3}, {3})


def freeze(chaos, leg):
    if not chaos.at_step(leg):
        return None
    frozen = chaos.rng.choice(leg.processes)
    frozen.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    check(leg.wait(_limit(), but=frozen), LOST)
    seconds = time.monotonic() - started
    frozen.kill()
    leg.wait(5)
    return seconds


def stall(chaos, leg):
    return chaos.at_step(leg) and _send(chaos, leg, signal.SIGUSR1, {76, *LOST}, {76, *LOST})


def lose_the_reader(chaos, leg):
    return chaos.at_step(leg) and _send(chaos, leg, signal.SIGUSR2, {1}, LOST)


def fill_the_disk(chaos, leg):
    if not chaos.at_step(leg):
        return None
    started = time.monotonic()
    ballast = chaos.folder / "ballast"
    try:
        with open(ballast, "wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(2**16))
        codes = leg.wait(_limit())
    finally:
        ballast.unlink()
    # 76 if each process waits for a part of a checkpoint that another one could not write.
    if not {74, 76} & set(codes):
        raise Failure(f"exit codes {codes}, expected 74")
    check(codes, {74, 76} | LOST)
    return time.monotonic() - started


def start_twice(chaos, leg):
    """As after requeuing a job: of two runs with one output, the later one is rejected and the other continues."""
    more = chaos.rng.choice(((), ("train.overwrite=true",)))
    second = Leg(chaos.folder, 1, (*chaos.words, *more), "second")
    try:
        leg.until(lambda: not second.running())
        refused, other = (leg, second) if second.running() else (second, leg)
        started = time.monotonic()
        codes = refused.wait(_limit())
        if chaos.done() or not other.running():
            return None  # they did not run at the same time
        if 2 not in codes or "another process is writing to it" not in refused.said():
            raise Failure(f"two runs of one output: exit codes {codes}, expected 2\n{refused.said()}")
        check(codes, {2} | LOST)
        seconds = time.monotonic() - started
        if chaos.at_step(other):
            _send(chaos, other, signal.SIGTERM, {3}, {3})
        else:
            check(other.wait(_limit()), {0})
        return seconds
    finally:
        second.end()


def remove_the_output(chaos, leg):
    if not chaos.at_step(leg):
        return None
    gone = chaos.run.with_name("gone")
    chaos.run.rename(gone)  # atomic, because the run keeps writing files
    shutil.rmtree(gone)
    started = time.monotonic()
    codes = leg.wait(_limit())
    if codes == [0] * len(codes) and chaos.done():
        return None
    # 74 if a checkpoint could not be written.
    if not {1, 74} & set(codes):
        raise Failure(f"exit codes {codes}, expected 1")
    check(codes, {1, 74} | LOST)
    shutil.rmtree(chaos.run, ignore_errors=True)  # files written after the removal
    return time.monotonic() - started


# Damage to files while nothing runs. Each function returns whether it damaged a file.


def flip(chaos):
    return _damage(chaos, flipped)


def truncate(chaos):
    return _damage(chaos, truncated)


def corrupt_the_config(chaos):
    path = chaos.run / "config.yaml"
    whole = path.read_bytes()
    damaged = bytearray(whole)
    place = chaos.rng.randrange(len(damaged))
    damaged[place : place + 1] = chaos.rng.choice([b"\x00", b"\xff", b"{", b"\t- ["])
    path.write_bytes(damaged)
    with chaos.leg(1) as refused:
        check(refused.wait(60), {2})
        if "config.yaml" not in refused.said():
            raise Failure("config.yaml is damaged and the error does not name it")
    path.write_bytes(whole)
    return True


def damage_the_targets(chaos):
    files = sorted(chaos.folder.glob("responses.jsonl.targets/*.npy"))
    for path in files[:1]:
        path.write_bytes(chaos.rng.choice((flipped, truncated))(path.read_bytes(), chaos.rng))
    return bool(files)


FAULTS = {
    "kill -9": (kill, 6),
    "kill -9 inside a save": (kill_in_a_save, 6),
    "kill -9 at the start": (kill_at_the_start, 5),
    "SIGTERM": (term, 6),
    "SIGTERM at the start": (term_at_the_start, 8),
    "Ctrl-C": (interrupt, 4),
    "SIGSTOP": (freeze, 2),
    "stall": (stall, 2),
    "reader lost": (lose_the_reader, 4),
    "disk full": (fill_the_disk, 3),
    "two runs of one output": (start_twice, 4),
    "output removed": (remove_the_output, 3),
}  # of a run: {name: (function, weight)}
DAMAGES = {
    "bit flipped": (flip, 4),
    "file truncated": (truncate, 4),
    "config damaged": (corrupt_the_config, 1),
    "targets damaged": (damage_the_targets, 3),
    None: (lambda chaos: False, 10),
}  # between two starts: {name: (function, weight)}


def _limit():
    return max(HEARTBEAT, WATCHDOG) + GRACE


def _send(chaos, leg, number, victim_codes, other_codes):
    """Sends a signal to one process. Returns the seconds until all exited."""
    victim = chaos.rng.randrange(len(leg.processes))
    if leg.processes[victim].poll() is not None:
        return None  # the run had finished
    leg.processes[victim].send_signal(number)
    started = time.monotonic()
    # Before the processes have joined, the others wait for join_timeout.
    codes = leg.wait(_limit() + (0 if leg.trains else JOIN))
    if codes == [0] * len(codes) and chaos.done():
        return None
    check(codes[victim : victim + 1], victim_codes)
    check(codes[:victim] + codes[victim + 1 :], other_codes)
    return time.monotonic() - started


def check(codes, expected):
    if not set(codes) <= set(expected):
        raise Failure(f"exit codes {codes}, expected {sorted(expected)}")


def _damage(chaos, how):
    """Damages a file of the newest of at least two checkpoints."""
    steps = chaos.steps()
    if len(steps) < 2:
        return False
    files = [path for path in (chaos.run / "checkpoints" / str(steps[-1])).rglob("*") if path.is_file()]
    path = chaos.rng.choice(sorted(path for path in files if path.stat().st_size))
    path.write_bytes(how(path.read_bytes(), chaos.rng))
    return True


def flipped(content, rng):
    content = bytearray(content)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return content


def truncated(content, rng):
    return content[: rng.randrange(len(content))]


def _free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"
