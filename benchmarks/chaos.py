"""Faults, drawn at random, against real runs of `launch.train`: what survives, how fast every process is out.

    python -m benchmarks.chaos [--faults 50] [--seed 0] [--kinds kill,flip] [--folder DIR]

A tiny model trains for some hundred steps, over and over interrupted and started again, now as two processes with a
device each, now as one with two devices. A fault is survived when every process ends in time with an exit code that
names what happened, nothing of it is left running, and the run goes on: in the end every loss of every step, and the
model, must be those of an undisturbed run, bit for bit. Prints a row for each kind; exits with 1 when anything is not
as it must be, and keeps the folder then. `disk full` needs a small disk of its own, which only root can mount.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

from tests.tiny import save_random_backbone

ROOT = pathlib.Path(__file__).parent.parent
HEARTBEAT, WATCHDOG, GRACE, JOIN = 10, 12, 5, 20  # seconds
EVERY = 4  # steps between checkpoints
DISK = 96 * 2**20  # bytes of the disk that gets full
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
LOST = {75, -signal.SIGABRT}  # the processes that a fault of another one ends; JAX itself may be faster, and aborts


class Failure(Exception):
    """The run did not do what it must."""


class Leg:
    """A command from one start to its end, as `count` processes with 2 / count devices each."""

    def __init__(self, folder, count, words):
        """words: the command's name and what follows."""
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
            command = [sys.executable, "-m", "benchmarks.chaos_child", *words, *joined]
            output = open(folder.parent / f"output-{index}.txt", "w+", encoding="utf-8")
            self.outputs.append(output)
            streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
            # A session of its own: whatever a process leaves behind can be found by it.
            self.processes.append(
                subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **streams)
            )

    def running(self):
        return all(process.poll() is None for process in self.processes)

    def until(self, condition, seconds=120):
        """Returns whether `condition()` came true while all processes ran."""
        end = time.monotonic() + seconds
        while not condition():
            if not self.running():
                return False
            if time.monotonic() > end:
                raise Failure(f"nothing happened for {seconds} seconds")
            time.sleep(0.005)
        return True

    def wait(self, limit, but=None):
        """Returns the exit codes when all are out. Raises Failure for one that is not within `limit` seconds.

        but: a process that is not waited for.
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
        """Returns what all processes printed."""
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
    """One folder in which a run is interrupted until it is through."""

    def __init__(self, folder, steps, rng):
        self.folder, self.run, self.rng = folder, folder / "run", rng
        self.words = ("train", *WORDS, f"train.steps={steps}", f"train.watchdog={WATCHDOG}")

    def done(self):
        return (self.run / "model").exists()

    def steps(self):
        """Returns the checkpoints that are whole as far as their names tell, oldest first."""
        folder = self.run / "checkpoints"
        return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())

    def logged(self):
        """Returns (the metrics file's number, its records): a run that goes on begins a new file."""
        path = self.run / "metrics.jsonl"
        return (path.stat().st_ino, path.read_bytes().count(b"\n")) if path.exists() else (None, 0)

    @contextlib.contextmanager
    def leg(self, count=None):
        """A Leg, ended whatever happens."""
        self.old_file, _ = self.logged()
        leg = Leg(self.folder, count or self.rng.choice((1, 2)), self.words)
        try:
            yield leg
        finally:
            leg.end()

    def at_step(self, leg):
        """Waits until the leg is some steps on. Returns False when the run ended first."""
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
    time.sleep(chaos.rng.uniform(0.7, 6))  # before that, Python itself is starting
    return _send(chaos, leg, signal.SIGTERM, {3}, {3})


def freeze(chaos, leg):
    if not chaos.at_step(leg):
        return None
    frozen = chaos.rng.choice(leg.processes)
    frozen.send_signal(signal.SIGSTOP)
    started = time.monotonic()
    _check(leg.wait(_limit(), but=frozen), LOST)
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
    # 76 where each process waits for the part of a checkpoint that another one could not write.
    if not {74, 76} & set(codes):
        raise Failure(f"exit codes {codes}, expected 74")
    _check(codes, {74, 76} | LOST)
    return time.monotonic() - started


# While nothing runs: what returns True has done its damage.


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
        _check(refused.wait(60), {2})
        if "config.yaml" not in refused.said():
            raise Failure("config.yaml is damaged and the error does not name it")
    path.write_bytes(whole)
    return True


FAULTS = {
    "kill -9": (kill, 6),
    "kill -9 inside a save": (kill_in_a_save, 6),
    "kill -9 at the start": (kill_at_the_start, 5),
    "SIGTERM": (term, 6),
    "SIGTERM at the start": (term_at_the_start, 8),
    "SIGSTOP": (freeze, 2),
    "stall": (stall, 2),
    "reader lost": (lose_the_reader, 4),
    "disk full": (fill_the_disk, 3),
}  # of a run: what it does, and how often it is drawn
DAMAGES = {
    "bit flipped": (flip, 4),
    "file truncated": (truncate, 4),
    "config damaged": (corrupt_the_config, 1),
    None: (lambda chaos: False, 10),
}  # between two starts


def _limit():
    return max(HEARTBEAT, WATCHDOG) + GRACE


def _send(chaos, leg, number, victim_codes, other_codes):
    """Sends a signal to one process; returns the seconds until all are out."""
    victim = chaos.rng.randrange(len(leg.processes))
    if leg.processes[victim].poll() is not None:
        return None  # the run was through
    leg.processes[victim].send_signal(number)
    started = time.monotonic()
    # Before they have joined, the others wait for as long as they were told to.
    codes = leg.wait(_limit() + (0 if leg.trains else JOIN))
    if codes == [0] * len(codes) and chaos.done():
        return None
    _check(codes[victim : victim + 1], victim_codes)
    _check(codes[:victim] + codes[victim + 1 :], other_codes)
    return time.monotonic() - started


def _check(codes, expected):
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


def _losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _compare(run, reference):
    """Returns the number of steps. Raises Failure where a run is not the undisturbed one."""
    found, expected = _losses(run), _losses(reference)
    if different := [step for step in expected if found.get(step) != expected[step]]:
        raise Failure(f"{len(different)} of {len(expected)} steps differ from the undisturbed run's: {different[:5]}")
    if contents(run / "model") != contents(reference / "model"):
        raise Failure("the model differs from the undisturbed run's")
    left = [path for path in run.rglob("*") if ".orbax-checkpoint-tmp" in path.name or path.name == "_deleted"]
    if left := left + [path for path in run.iterdir() if path.name.startswith(".")]:
        raise Failure(f"left behind: {left[0]}")
    return len(expected)


@contextlib.contextmanager
def _disk(folder):
    """A folder on a small disk of its own where that is allowed. Yields whether it is one."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", folder], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)


class Tally:
    """What was injected so far. seconds: {kind: until every process was out}."""

    def __init__(self, wanted, kinds, rng):
        self.wanted, self.kinds, self.rng = wanted, kinds, rng
        self.seconds = collections.defaultdict(list)
        self.starts = self.compared = 0

    def draw(self, table, *without):
        """Returns a kind: one that was not drawn yet, if there is any; None when it is enough."""
        if self.enough():
            return None
        kinds = [kind for kind in table if kind not in without and (kind is None or kind in self.kinds)]
        missing = [kind for kind in kinds if kind and kind not in self.seconds]
        return self.rng.choice(missing) if missing else self.rng.choices(kinds, [table[kind][1] for kind in kinds])[0]

    def count(self, kind, seconds):
        self.seconds[kind].append(seconds)
        print(f"{self.total():>4}  {kind:<24} {seconds:5.1f} s", flush=True)

    def total(self):
        return sum(map(len, self.seconds.values()))

    def enough(self):
        return self.total() >= self.wanted


def inject(folder, tally):
    """Interrupts runs until there were faults enough, then lets the last one end. Raises Failure."""
    save_random_backbone(folder / "backbone")
    steps = 10 * min(tally.wanted, 50)
    undisturbed = _new_run(folder, "undisturbed", steps, tally.rng)
    with undisturbed.leg(1) as leg:
        if leg.wait(600) != [0]:
            raise Failure(leg.said())
    number = 0
    while not tally.enough():
        number += 1
        with _disk(folder / f"run-{number}") as small:
            chaos = _new_run(folder, f"run-{number}", steps, tally.rng)
            while not chaos.done():
                _start(chaos, tally, small)
            tally.compared += _compare(chaos.run, undisturbed.run)


def _start(chaos, tally, small):
    """Damages what is there, or not; starts the run; interrupts it, or lets it end when there were faults enough."""
    damage = tally.draw(DAMAGES) if chaos.steps() else None
    if DAMAGES[damage][0](chaos):
        tally.count(damage, 0.0)
    kind = tally.draw(FAULTS, None if small else "disk full")
    tally.starts += 1
    with chaos.leg(2 if kind == "SIGSTOP" else None) as leg:
        try:
            if kind is None:
                _check(leg.wait(600), {0})
            elif (seconds := FAULTS[kind][0](chaos, leg)) is not None and seconds is not False:
                tally.count(kind, seconds)
        except Failure as failure:
            started = f"{len(leg.processes)} processes, start {tally.starts}, before it: {damage}"
            raise Failure(f"{kind or 'end'} ({started}): {failure}\n{leg.said()}") from None


def _new_run(folder, name, steps, rng):
    chaos = Chaos(folder / name, steps, rng)
    chaos.folder.mkdir(exist_ok=True)
    rows = [{"question": f"What is {n}?", "answer": f"It is {'abcdefgh'[n % 8] * (1 + n % 6)}."} for n in range(48)]
    (chaos.folder / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return chaos


def main():
    known = [*FAULTS, *(kind for kind in DAMAGES if kind)]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(known), help="of: %(default)s")
    parser.add_argument("--folder", type=pathlib.Path, help="a new folder to work in, which is kept")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if unknown := set(kinds) - set(known):
        parser.error(f"unknown kinds: {', '.join(unknown)}")
    if not set(kinds) & set(FAULTS):
        parser.error("one kind at least must be of a run: damage alone ends none")
    folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    tally, started = Tally(arguments.faults, kinds, random.Random(arguments.seed)), time.monotonic()
    try:
        inject(folder, tally)
    except Failure as failure:
        print(f"\nFAILED: {failure}\nThe folder is {folder}", file=sys.stderr)
        sys.exit(1)
    print(f"\n| fault | survived | every process out after (s, median, most) |\n|{'---|' * 3}")
    for kind in kinds:
        times = sorted(tally.seconds[kind])
        took = f"{times[len(times) // 2]:.1f}, {times[-1]:.1f}" if times and kind in FAULTS else ""
        print(f"| {kind} | {len(times)} of {len(times)} | {took} |")
    print(
        f"\n{tally.total()} of {tally.total()} survived in {time.monotonic() - started:.0f} s; {tally.starts} starts; "
        f"all {tally.compared} steps and the models are those of an undisturbed run, bit for bit"
    )
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
