"""Random fault injection into real runs of `launch.train`: recovery, and time until all processes exit.

    python -m tests.chaos [--faults 50] [--seed 0] [--kinds kill,flip] [--folder DIR]

A tiny model trains for a few hundred steps and is repeatedly interrupted and restarted, either as two processes with
one device each or as one process with two devices. A fault is survived if every process exits in time with an exit
code that names the cause, no child process remains, and the run can be resumed. At the end, the losses of all steps
and the model must equal those of an uninterrupted run, bit for bit. Prints one row per kind of fault. On failure,
exits with 1 and keeps the folder. `disk full` needs a small separate disk, which only root can mount.
"""

import argparse
import collections
import contextlib
import json
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time

from tests.chaos.faults import DAMAGES, FAULTS, Chaos, Failure, check
from tests.helpers.tiny import save_random_backbone

DISK = 96 * 2**20  # bytes of the disk that is filled


def _losses(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _compare(run, reference):
    """Returns the number of steps compared. Raises Failure if a run differs from the reference."""
    losses, expected = _losses(run), _losses(reference)
    if different := [step for step in expected if losses.get(step) != expected[step]]:
        raise Failure(f"{len(different)} of {len(expected)} steps differ from the reference run: {different[:5]}")
    if contents(run / "model") != contents(reference / "model"):
        raise Failure("the model differs from that of the reference run")
    left = [path for path in run.rglob("*") if ".orbax-checkpoint-tmp" in path.name or path.name == "_deleted"]
    if left := left + [path for folder in (run, run.parent) for path in folder.glob(".*")]:
        raise Failure(f"left behind: {left[0]}")
    return len(expected)


@contextlib.contextmanager
def _disk(folder):
    """Mounts a small disk at a new folder, if permitted. Yields whether it is mounted."""
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK}", "chaos", folder], capture_output=True)
    try:
        yield mounted.returncode == 0
    finally:
        if mounted.returncode == 0:
            subprocess.run(["umount", "-l", folder], check=True)


class Tally:
    """The faults injected so far. seconds: {kind: seconds until all processes exited}."""

    def __init__(self, wanted, kinds, rng):
        self.wanted, self.kinds, self.rng = wanted, kinds, rng
        self.seconds = collections.defaultdict(list)
        self.starts = self.compared = 0

    def draw(self, table, *without):
        """Returns a kind, preferring those not drawn yet; None when enough faults were injected."""
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
    """Interrupts runs until enough faults were injected, then lets the last one finish. Raises Failure."""
    save_random_backbone(folder / "backbone")
    steps = 10 * min(tally.wanted, 50)
    reference = _new_run(folder, "reference", steps, tally.rng)
    with reference.leg(1) as leg:
        if leg.wait(600) != [0]:
            raise Failure(leg.said())
    number = 0
    while not tally.enough():
        number += 1
        with _disk(folder / f"run-{number}") as small:
            chaos = _new_run(folder, f"run-{number}", steps, tally.rng)
            while not chaos.done():
                _start(chaos, tally, small)
            tally.compared += _compare(chaos.run, reference.run)


def _start(chaos, tally, small):
    """Optionally damages files, then starts the run and interrupts it, unless enough faults were injected."""
    damage = tally.draw(DAMAGES) if chaos.steps() else None
    if DAMAGES[damage][0](chaos):
        tally.count(damage, 0.0)
    kind = tally.draw(FAULTS, None if small else "disk full")
    tally.starts += 1
    with chaos.leg(2 if kind == "SIGSTOP" else None) as leg:
        try:
            if kind is None:
                check(leg.wait(600), {0})
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
    parser.add_argument("--faults", type=int, default=50, help="number of faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(known), help="comma-separated subset of: %(default)s")
    parser.add_argument("--folder", type=pathlib.Path, help="new working folder, which is kept")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if unknown := set(kinds) - set(known):
        parser.error(f"unknown kinds: {', '.join(unknown)}")
    if not set(kinds) & set(FAULTS):
        parser.error(f"--kinds needs at least one of: {', '.join(FAULTS)}")
    folder = arguments.folder or pathlib.Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    tally, started = Tally(arguments.faults, kinds, random.Random(arguments.seed)), time.monotonic()
    try:
        inject(folder, tally)
    except Failure as failure:
        print(f"\nFAILED: {failure}\nThe folder is {folder}", file=sys.stderr)
        sys.exit(1)
    print(f"\n| fault | survived | seconds until all processes exited (median, maximum) |\n|{'---|' * 3}")
    for kind in kinds:
        times = sorted(tally.seconds[kind])
        took = f"{times[len(times) // 2]:.1f}, {times[-1]:.1f}" if times and kind in FAULTS else ""
        print(f"| {kind} | {len(times)} of {len(times)} | {took} |")
    print(
        f"\n{tally.total()} of {tally.total()} survived in {time.monotonic() - started:.0f} s; {tally.starts} starts; "
        f"all {tally.compared} steps and the models equal those of an uninterrupted run, bit for bit"
    )
    if arguments.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
