"""Training step against the published PyTorch package, side by side on this machine's CPU.

    python -m benchmarks.train_step [--rounds 5] [--steps 4] [--peers float32:off,...]

SmolLM2-135M, batch 8, queries of 32-256 and answers of 64-256 tokens, mixed as real batches are. Every side is a
process of its own; in each round each runs its steps in turn, so that a slow spell of the machine meets all. The
peer runs its teacher's forward pass in every step, as it always does; we compute each target once, before training,
and its cost is printed apart. Prints medians over the rounds; the first run of every side (compilation, first
touch of memory) is not counted.
"""

import argparse
import json
import pathlib
import random
import statistics
import subprocess
import sys
import tempfile

from llm2vec_gen_jax import config, export, sharding
from llm2vec_gen_jax.loading import load_backbone
from tests import peer

HERE = pathlib.Path(__file__).parent
SENTENCES = (
    "The river rises in the hills and reaches the sea after two hundred miles.",
    "Most people who try this recipe add a little salt at the end.",
    "In 1912 the company opened its second factory near the harbour.",
    "A function that returns nothing is called for its side effects.",
    "She asked whether the train would still leave before midnight.",
    "Plants take up water through their roots and lose it through their leaves.",
    "If the first answer is wrong, read the question again and start from the units.",
    "The museum is open every day except Monday, and children enter free.",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default="float32:off,float32:on,bfloat16:off")
    parser.add_argument("--pairs", type=int, default=2048)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        backbone = load_backbone("smollm2-135m", "float32", sharding.make_mesh(config.MeshConfig()))
        write_pairs(folder / "pairs.jsonl", backbone.tokenizer, arguments.pairs)
        export.save_backbone(backbone, folder / "backbone")
        del backbone
        files = [str(folder / "backbone"), str(folder / "pairs.jsonl")]
        print(f"batch 8, medians of {arguments.rounds} rounds of {arguments.steps} steps, in turn")
        print(f"{'':<34} {'samples/s':>10} {'tokens/s':>9} {'padding':>8} {'peak MB':>8} {'ours is':>8}", flush=True)
        for setting in arguments.peers.split(","):
            compare(setting, files, arguments)


def compare(setting, files, arguments):
    """Runs ours and the peer in one setting in turn, and prints a row of each."""
    dtype, checkpointing = setting.split(":")
    ours = Side([sys.executable, "-m", "benchmarks.our_step", *files])
    command = [peer.python(), str(HERE / "peer_step.py"), *files, "--batch-size", "8", "--dtype", dtype]
    theirs = Side([*command, "--checkpointing", checkpointing, "--threads", str(arguments.threads)])
    ours.run(1)
    theirs.run(1)
    for _ in range(arguments.rounds):
        for side in (theirs, ours):
            side.results.append(side.run(arguments.steps))
    ratio = statistics.median(rate(a) / rate(b) for a, b in zip(ours.results, theirs.results))
    print_row(f"peer {dtype}, checkpointing {checkpointing}", theirs, f"{ratio:.2f}x")
    print_row("ours float32", ours, "")
    ready = ours.ready
    target = ready["target_seconds_per_sample"]
    ratio = statistics.median(rate(a, target) / rate(b) for a, b in zip(ours.results, theirs.results))
    print(
        f"  targets once: {target:.3f} s a sample; counted into every step, ours is {ratio:.2f}x\n"
        f"  padded lengths: queries {ready['query']}, answers {ready['answer']}",
        flush=True,
    )
    for side in (ours, theirs):
        side.quit()


def rate(row, more=0.0):
    """Real tokens per second of a worker's report; `more` seconds are added for each sample."""
    return row["real_tokens"] / (row["seconds"] + more * row["samples"])


def print_row(name, side, ratio):
    """Prints medians of a side's rounds."""
    samples = statistics.median(row["samples"] / row["seconds"] for row in side.results)
    tokens = statistics.median(map(rate, side.results))
    padding = 1 - sum(row["real_tokens"] for row in side.results) / sum(row["computed_tokens"] for row in side.results)
    peak = max(row["peak_rss_mb"] for row in side.results)
    print(f"{name:<34} {samples:>10.2f} {tokens:>9.0f} {padding:>7.1%} {peak:>8.0f} {ratio:>8}", flush=True)


class Side:
    """A worker process that runs steps on command."""

    def __init__(self, command):
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.ready = self._answer()
        self.results = []

    def run(self, steps):
        """Runs steps; returns the worker's report."""
        self.process.stdin.write(f"run {steps}\n")
        self.process.stdin.flush()
        return self._answer()

    def quit(self):
        """Ends the worker."""
        self.process.stdin.write("quit\n")
        self.process.stdin.close()
        self.process.wait()

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.process.args}: ended with {self.process.wait()}")
        return json.loads(line)


def write_pairs(path, tokenizer, count):
    """Writes pairs of sentences, their lengths in tokens drawn uniformly from 32-256 and 64-256."""
    random_ = random.Random(0)

    def text(low, high):
        words = " ".join(random_.choice(SENTENCES) for _ in range(40)).split()
        ids = tokenizer.encode([" ".join(words)], random_.randint(low, high))[0]
        return tokenizer.decode(ids)

    with open(path, "w") as file:
        for _ in range(count):
            file.write(json.dumps({"question": text(32, 256), "answer": text(64, 256)}) + "\n")


if __name__ == "__main__":
    main()
