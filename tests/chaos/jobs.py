"""Kills and damaged files in `launch.encode` and `launch.respond`: every row is written exactly once.

    python -m tests.chaos.jobs [--kills 40] [--damages 13] [--seed 0] [--of encode,respond]

A job on a tiny model is killed (-9) at random times and restarted until it finishes. Between two starts, a file of its
output is sometimes truncated or a bit of it flipped. At the end, every file must equal that of an uninterrupted job
byte for byte. Exits with 1 otherwise.
"""

import argparse
import json
import pathlib
import random
import shutil
import signal
import sys
import tempfile
import time

from tests.chaos.__main__ import contents
from tests.chaos.faults import WORDS, Failure, Leg, flipped, truncated
from tests.helpers.tiny import save_random_backbone

RECORDS = (".run.json", "manifest.json")  # identify the run: damage to them is an error that names them


JOBS = {
    "encode": "encode ../model input=texts.txt output=out shard_size=20 batch_size=4",
    "respond": "respond backbone.path=../backbone input=queries.jsonl output=out/responses.jsonl batch_size=4 "
    "max_new_tokens=16",
}


def prepare(folder):
    """Writes a tiny backbone and a model trained for two steps."""
    save_random_backbone(folder / "backbone")
    training = _new_folder(folder, "training")
    rows = [{"question": f"What is {n}?", "answer": f"It is {n}."} for n in range(16)]
    (training / "responses.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    leg = Leg(training, 1, ["train", *WORDS, "train.steps=2"])
    if leg.wait(300) != [0]:
        raise Failure(leg.said())
    shutil.copytree(training / "run" / "model", folder / "model")


def disturb(job, folder, kills, damages, rng):
    """Returns (kills, damaged files, runs). Raises Failure."""
    words = JOBS[job].split()
    reference = _inputs(_new_folder(folder, f"{job}-reference"))
    leg = Leg(reference, 1, words)
    if leg.wait(300) != [0]:
        raise Failure(leg.said())
    expected = contents(reference / "out")
    killed = damaged = runs = 0
    while killed < kills or damaged < damages:
        runs += 1
        here = _inputs(_new_folder(folder, f"{job}-{runs}"))
        through = False
        while not through:
            leg = Leg(here, 1, words)
            killed += killed < kills and _kill(leg, here, rng)
            [code] = leg.wait(300)
            print(f"{job}: {killed} kills, {damaged} damaged files, exit code {code}", flush=True)
            if code not in (0, -signal.SIGKILL):
                raise Failure(leg.said())
            through = code == 0
            if through:
                _compare(here / "out", expected)
            if damaged < damages and rng.random() < 0.6 and _damage(here / "out", rng):
                damaged, through = damaged + 1, False
        shutil.rmtree(here)
    return killed, damaged, runs


def _kill(leg, here, rng):
    """Kills a job shortly after it starts to write. Returns False if it finished before."""
    before = _size(here)
    leg.until(lambda: _size(here) > before)
    time.sleep(rng.uniform(0, 0.3))
    if not leg.running():
        return False
    leg.processes[0].send_signal(signal.SIGKILL)
    return True


def _damage(out, rng):
    files = [path for path in out.glob("*") if not path.name.endswith(RECORDS) and path.stat().st_size]
    if files:
        path = rng.choice(sorted(files))
        path.write_bytes(rng.choice((flipped, truncated))(path.read_bytes(), rng))
    return bool(files)


def _compare(out, expected):
    actual = contents(out)
    if different := sorted(name for name in actual.keys() | expected if actual.get(name) != expected.get(name)):
        raise Failure(f"{out}: {different} differ from those of an uninterrupted job")


def _inputs(folder):
    """Writes the inputs of the jobs."""
    texts = [f"{number} " + "word " * (number * 13 % 40) for number in range(1200)]
    (folder / "texts.txt").write_text("\n".join(texts))
    queries = [{"question": f"What is {number * 7919 % 997}? " * (1 + number % 4)} for number in range(400)]
    (folder / "queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in queries))
    return folder


def _new_folder(folder, name):
    (folder / name).mkdir()
    return folder / name


def _size(folder):
    return sum(path.stat().st_size for path in (folder / "out").glob("*") if path.exists())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40, help="number of kills per job")
    parser.add_argument("--damages", type=int, default=13, help="number of damaged files per job")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--of", default=",".join(JOBS), help="comma-separated subset of: %(default)s")
    arguments = parser.parse_args()
    jobs = arguments.of.split(",")
    if unknown := set(jobs) - set(JOBS):
        parser.error(f"unknown jobs: {', '.join(unknown)}")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="chaos-jobs-"))
    rng, started = random.Random(arguments.seed), time.monotonic()
    try:
        prepare(folder)
        counts = {job: disturb(job, folder, arguments.kills, arguments.damages, rng) for job in jobs}
    except Failure as failure:
        print(f"\nFAILED: {failure}\nThe folder is {folder}", file=sys.stderr)
        sys.exit(1)
    print("\n| job | kills | damaged files | runs with identical output |\n|---|---|---|---|")
    for job, (killed, damaged, runs) in counts.items():
        print(f"| {job} | {killed} | {damaged} | {runs} of {runs} |")
    print(f"\nin {time.monotonic() - started:.0f} s")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
