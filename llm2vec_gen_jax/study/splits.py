"""Development and test views of task folders: what settings are chosen on is never what the final table is of.

A view is a folder of its own; files that it does not change are links to the task's, so nothing is copied.
"""

import json
import pathlib
import random
import shutil

from llm2vec_gen_jax import tasks
from llm2vec_gen_jax.files import atomic_directory, read_json, read_jsonl, read_lines, write_json, write_text

_TEXTS = {"queries.jsonl": ("text",), "test.jsonl": ("text", "sentence1", "sentence2")}


def split(folder, output):
    """Writes OUTPUT/development/NAME and OUTPUT/test/NAME for the task folders at or below `folder`.

    STS: a task whose name ends in Dev is for development, others are for the test. Classification: each label's
    training rows in turn train and test a development task; the test is as it was. Retrieval: queries in turn are of
    the one and of the other, of the same corpus. Clustering and safety: test only. Rows of a test are shuffled, so that
    the first ones are a sample.
    Returns {"development": {name: type}, "test": {name: type}}. Raises InputError for a folder that is no task.
    """
    found = {"development": {}, "test": {}}
    for place in tasks.find(folder):
        task = tasks.read(place)
        for part, write in _views(task, place.resolve()).items():
            view = pathlib.Path(output) / part / place.name
            shutil.rmtree(view, ignore_errors=True)
            with atomic_directory(view) as temporary:
                name = task.name if part == "test" else f"{task.name.removesuffix('Dev')}Development"
                write_json(temporary / "task.json", task.settings | {"name": name})
                write(temporary)
            found[part][name] = task.type
    return found


def questions(folder):
    """Returns the texts that are asked or labelled in the task folders at or below `folder`, normalised (`key`).

    What is one of them is no training query.
    """
    texts = set()
    for place in tasks.find(folder):
        for name, columns in _TEXTS.items():
            if (place / name).exists():
                for _, row in read_jsonl(place / name):
                    texts |= {key(row[column]) for column in columns if isinstance(row.get(column), str)}
    return texts


def key(text):
    """A text as it is compared: lower case, one space between words."""
    return " ".join(text.lower().split())


def types(folder):
    """Returns {name: type} of the views that `split` wrote to a folder; {} where there are none."""
    settings = [read_json(file) for file in sorted(pathlib.Path(folder).rglob("task.json"))]
    return {values["name"]: values["type"] for values in settings}


def _views(task, place):
    """Returns {part: what writes its files into a folder}."""

    def shuffled(folder):
        rows = [row for _, row in read_jsonl(place / "test.jsonl")]
        random.Random(0).shuffle(rows)
        _write_rows(folder / "test.jsonl", rows)
        if task.type == "classification":
            (folder / "train.jsonl").symlink_to(place / "train.jsonl")

    def halved(folder):
        _halve(folder, [row for _, row in read_jsonl(place / "train.jsonl")])

    def queries(first):
        def write(folder):
            _link(folder, place, "corpus.jsonl", "queries.jsonl")
            order = list(task.data["qrels"])
            kept = set(order[first::2])
            lines = [line for number, line in read_lines(place / "qrels.tsv") if line.split("\t")[0] in kept]
            write_text(folder / "qrels.tsv", "\n".join(["query-id\tcorpus-id\tscore", *lines]) + "\n")

        return write

    if task.type == "sts":
        return {"development" if task.name.endswith("Dev") else "test": shuffled}
    if task.type == "classification":
        return {"development": halved, "test": shuffled}
    if task.type == "retrieval":
        return {"development": queries(0), "test": queries(1)}
    if task.type == "clustering":
        return {"test": shuffled}
    return {"test": lambda folder: _link(folder, place, "corpus.jsonl", "queries.jsonl", "qrels.tsv")}


def _halve(folder, rows):
    seen, halves = {}, ([], [])
    for row in rows:
        number = seen.get(row["label"], 0)
        seen[row["label"]] = number + 1
        halves[number % 2].append(row)
    random.Random(0).shuffle(halves[1])
    for name, half in zip(("train", "test"), halves):
        _write_rows(folder / f"{name}.jsonl", half)


def _write_rows(file, rows):
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _link(folder, place, *names):
    for name in names:
        (folder / name).symlink_to(place / name)
