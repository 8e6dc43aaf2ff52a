"""Commands run on small inputs, as the tests of bad input need them."""

import json
import os
import pathlib

from llm2vec_gen_jax.common.jsonl import read_jsonl
from llm2vec_gen_jax.training.metrics import read_metrics
from tests.conftest import write_jsonl

RESPONSES = [{"question": f"What is {number}?", "answer": "It is " + "ab"[number % 2] * number} for number in range(8)]
TRAIN = ("compression.num_tokens=4", "train.output=run", "train.batch_size=8", "train.steps=1", "data.max_buckets=1")


def rows_of(path):
    return [row for _, row in read_jsonl(path)]


def losses(run):
    return [
        {key: value for key, value in row.items() if key != "tokens_per_second"}
        for row in read_metrics(pathlib.Path(run))
    ]


def succeed(result):
    """Returns the standard output of a command that did what it should."""
    code, out, errors = result
    assert code == 0, errors
    return out


def train(command, backbone, responses, *words):
    data = write_jsonl(pathlib.Path("responses.jsonl"), responses)
    return command("train", f"backbone.path={backbone}", f"data.responses={data}", *TRAIN, *words)


def respond(command, backbone, *words, question="a"):
    queries = write_jsonl(pathlib.Path(os.getcwd()).parent / "queries.jsonl", [{"question": question}])
    words = (f"input={queries}", "output=answers.jsonl", "max_new_tokens=4", *words)
    return command("respond", f"backbone.path={backbone}", *words)


def encode(command, model, texts, *words):
    file = write_jsonl(pathlib.Path(os.getcwd()).parent / "texts.jsonl", [{"text": text} for text in texts])
    return command("encode", model, f"input={file}", "output=out", *words)


def only_config():
    """Whether a run that never began has left its config alone: a repeated command goes on from there."""
    return [str(path) for path in pathlib.Path("run").rglob("*")] == ["run/config.yaml"]


def edit(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


def write_task(folder, corpus=('{"_id": "d0", "text": "a"}', '{"_id": "d1", "text": "b"}'), name="Small"):
    folder.mkdir()
    (folder / "task.json").write_text(json.dumps({"name": name, "type": "safety_retrieval"}))
    (folder / "corpus.jsonl").write_bytes(b"\n".join(line.encode("utf-8", "surrogateescape") for line in corpus))
    (folder / "queries.jsonl").write_text('{"_id": "q0", "text": "a"}\n')
    (folder / "qrels.tsv").write_text("q0\td0\t1\n")
    return folder
