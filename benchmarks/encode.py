"""Encoding against the published PyTorch package, side by side on this machine's CPU.

    python -m benchmarks.encode TASK_FOLDER [--questions 200] [--paragraphs 100] [--rounds 5] [--dtypes float32]

TASK_FOLDER holds queries.jsonl and corpus.jsonl with a `text` each (BEIR's layout), for example SQuAD's development
set: questions of a dozen words mixed with paragraphs of a hundred; the whole corpus is --questions 2000 --paragraphs
1000. The model is SmolLM2-135M with ten compression tokens as they are before training. The peer encodes batches of
32 texts sorted by length, as its evaluation does. Every side is a process of its own; in each round each encodes all
texts in turn, so that a slow spell of the machine meets all. Prints medians over the rounds; the first run of every
side (compilation, first touch of memory) is not counted. Vectors are compared too.
"""

import argparse
import json
import pathlib
import statistics
import sys
import tempfile

import jax
import numpy as np

from benchmarks.train_step import Side, print_row
from llm2vec_gen_jax import config, directory, export, sharding
from llm2vec_gen_jax.files import read_jsonl
from llm2vec_gen_jax.loading import load_backbone
from llm2vec_gen_jax.model import Model
from tests import peer

HERE = pathlib.Path(__file__).parent


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", type=pathlib.Path)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--paragraphs", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtypes", default="float32,bfloat16", help="of both sides")
    parser.add_argument("--batch-size", type=int, default=32, help="of ours; the peer's is 32")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts = read_texts(arguments)
        (folder / "texts.json").write_text(json.dumps(texts))
        write_model(folder)
        print(f"{len(texts)} texts, medians of {arguments.rounds} rounds, in turn")
        print(f"{'':<34} {'texts/s':>10} {'tokens/s':>9} {'padding':>8} {'peak MB':>8} {'ours is':>8}", flush=True)
        for dtype in arguments.dtypes.split(","):
            compare(dtype, folder, arguments)


def read_texts(arguments):
    """The first questions and paragraphs of the task, a question or two after every paragraph."""
    questions = [row["text"] for _, row in read_jsonl(arguments.task / "queries.jsonl")][: arguments.questions]
    paragraphs = [row["text"] for _, row in read_jsonl(arguments.task / "corpus.jsonl")][: arguments.paragraphs]
    order = np.random.default_rng(0).permutation(len(questions) + len(paragraphs))
    return [(questions + paragraphs)[row] for row in order]


def write_model(folder):
    """Writes folder/backbone and folder/model, which both packages read."""
    mesh = sharding.make_mesh(config.MeshConfig())
    export.save_backbone(load_backbone("smollm2-135m", "float32", mesh), folder / "backbone")
    backbone = load_backbone(str(folder / "backbone"), "float32", mesh)
    model = Model(backbone.architecture, 10, 0, backbone.architecture.hidden_size)
    trainable = model.init(jax.random.key(0), backbone.frozen)
    directory.save(folder / "model", model, trainable, backbone, {})


def compare(dtype, folder, arguments):
    """Runs ours and the peer in turn, both in one dtype, and prints a row of each."""
    files = [str(folder / "model"), str(folder / "texts.json")]
    ours_out, theirs_out = folder / "ours.npy", folder / "theirs.npy"
    batch = ["--dtype", dtype, "--batch-size", str(arguments.batch_size)]
    ours = Side([sys.executable, "-m", "benchmarks.our_encode", *files, "--output", str(ours_out), *batch])
    command = [peer.python(), str(HERE / "peer_encode.py"), *files, "--output", str(theirs_out), "--dtype", dtype]
    theirs = Side([*command, "--threads", str(arguments.threads)])
    ours.run(1)
    theirs.run(1)
    for _ in range(arguments.rounds):
        for side in (theirs, ours):
            side.results.append(side.run(1))
    ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(ours.results, theirs.results))
    print_row(f"peer {dtype}", theirs, f"{ratio:.2f}x")
    print_row(f"ours {dtype}", ours, "")
    a, b = np.load(ours_out), np.load(theirs_out)
    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    print(f"  vectors: least cosine {cosine.min():.6f}, largest difference {np.abs(a - b).max():.1e}", flush=True)
    for side in (ours, theirs):
        side.quit()


if __name__ == "__main__":
    main()
