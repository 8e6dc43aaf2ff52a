"""Small task folders and their evaluation."""

import dataclasses
import importlib.util
import random

import pytest

from llm2vec_gen_jax.common import files
from llm2vec_gen_jax.config import EvaluateConfig, options
from llm2vec_gen_jax.evaluation import evaluate
from tests.conftest import write_jsonl

needs_mteb = pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="needs requirements-eval.txt")
WORDS = "cat dog bird fish tree leaf root seed rain snow wind fog king duke earl lord".split()
GROUPS = [WORDS[start : start + 4] for start in range(0, 16, 4)]
TYPES = ("retrieval", "sts", "classification", "clustering", "safety_retrieval")


def sentence(number, group):
    """Returns a text of three words of a group, unique for each number."""
    draw = random.Random(number)
    return " ".join(draw.choice(GROUPS[group]) for _ in range(3)) + f" {number}"


def write_task(folder, kind, name=None, **changes):
    """Writes a small task folder with instructions. Returns its path."""
    folder.mkdir(parents=True)
    settings = {"name": name or f"Small-{kind}", "type": kind, "query_instruction": "Answer:", "licence": "none"}
    if kind in ("retrieval", "safety_retrieval"):
        settings["document_instruction"] = "Sum up:"
        corpus = [
            {"_id": f"d{n}", "title": f"title {n}" if n % 2 else "", "text": f" {sentence(n, n % 4)}"}
            for n in range(30)
        ]
        queries = [{"_id": f"q{n}", "text": f"{sentence(100 + n, n % 4)} "} for n in range(9)]
        write_jsonl(folder / "corpus.jsonl", corpus)
        write_jsonl(folder / "queries.jsonl", queries)
        pairs = [(f"q{n}", f"d{(5 * n + step) % 24}", 1 + step % 2) for n in range(8) for step in (0, 4, 9)]
        lines = ["query-id\tcorpus-id\tscore", *(f"{q}\t{d}\t{grade}" for q, d, grade in pairs), "q8\td0\t0"]
        (folder / "qrels.tsv").write_text("\n".join(lines) + "\n")
    elif kind == "sts":
        pairs = [(sentence(n, n % 4), sentence(50 + n, n % 3), float(n % 6)) for n in range(20)]
        rows = [{"sentence1": first, "sentence2": second, "score": value} for first, second, value in pairs]
        write_jsonl(folder / "test.jsonl", rows)
    else:
        for split, count, offset in (("train", 24, 0), ("test", 40, 200)):
            labels = ["a", "b", "c", "d"] if kind == "classification" else [0, 1, 2, 3]
            rows = [{"text": sentence(offset + n, n * n % 4), "label": labels[n * n % 4]} for n in range(count)]
            write_jsonl(folder / f"{split}.jsonl", rows)
    files.write_json(folder / "task.json", settings | changes)
    return folder


def run(model, tasks, output, *arguments):
    loaded = options.load(EvaluateConfig, None, [f"tasks={tasks}", f"output={output}", "dtype=float32", *arguments])
    return evaluate.evaluate(str(model), loaded)


def settings(kind, **changes):
    return dataclasses.replace(EvaluateConfig(), kind=kind, tasks="x", output="y", dtype="float32", **changes)
