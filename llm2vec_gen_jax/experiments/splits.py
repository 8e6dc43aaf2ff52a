"""Development and test views of task folders: what settings are chosen on is never what the final table is of.

A view is a task folder of its own; files of which it keeps all rows in their order are links to the task's.
"""

import collections
import pathlib
import random
import shutil

from llm2vec_gen_jax.common.files import atomic_directory, read_json, visible, write_json, write_text
from llm2vec_gen_jax.common.jsonl import read_jsonl, write_jsonl
from llm2vec_gen_jax.evaluation import tasks

_TEXTS = {"queries.jsonl": ("text",), "test.jsonl": ("text", "sentence1", "sentence2")}


def split(folder, output, documents=0, queries=0):
    """Writes OUTPUT/development/NAME and OUTPUT/test/NAME for the task folders at or below `folder`.

    STS: a task whose name ends in Dev is for development, others are for the test. Classification: each label's
    training rows in turn train and test a development task; the test is as it was. Retrieval: queries in turn are of
    the one and of the other, of the same corpus. Clustering and safety: test only. Rows of a test are shuffled, so that
    the first ones are a sample.

    documents: the most that a corpus keeps, by chance beside all that is judged for the first `queries` questions, and
    the most training rows of a classification, its labels in turn; 0: all, for each of both. A safety task is never
    cut: no text of it is copied.
    Returns {"development": {name: type}, "test": {name: type}}. Raises InputError for a folder that is no task.
    """
    found = {"development": {}, "test": {}}
    for place in tasks.find(folder):
        task = tasks.read(place)
        for part, write in _views(task, place.resolve(), documents, queries).items():
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
    settings = [read_json(file) for file in visible(folder, "task.json")]
    return {values["name"]: values["type"] for values in settings}


def _views(task, place, documents, queries):
    """Returns {part: what writes its files into a folder}."""

    def shuffled(folder):
        rows = _rows(place / "test.jsonl")
        random.Random(0).shuffle(rows)
        write_jsonl(folder / "test.jsonl", rows)
        if task.type == "classification":
            _keep(folder, place / "train.jsonl", lambda rows: _in_turn(rows, documents))

    def halved(folder):
        train, test = _halve(_rows(place / "train.jsonl"))
        random.Random(0).shuffle(test)
        write_jsonl(folder / "train.jsonl", _in_turn(train, documents))
        write_jsonl(folder / "test.jsonl", test)

    def asked(first):
        def write(folder):
            qrels = {query: task.data["qrels"][query] for query in list(task.data["qrels"])[first::2]}
            leading = [row["id"] for row in task.data["queries"] if row["id"] in qrels][: queries or None]
            judged = {name for query in leading for name in qrels[query]}
            corpus = _keep(folder, place / "corpus.jsonl", lambda rows: _sample(rows, documents, judged))
            known = {row["_id"] for row in corpus}
            lines = ["query-id\tcorpus-id\tscore"]
            for query, grades in qrels.items():
                lines += [f"{query}\t{name}\t{grade}" for name, grade in grades.items() if name in known]
            _link(folder, place, "queries.jsonl")
            write_text(folder / "qrels.tsv", "\n".join(lines) + "\n")

        return write

    if task.type == "sts":
        return {"development" if task.name.endswith("Dev") else "test": shuffled}
    if task.type == "classification":
        return {"development": halved, "test": shuffled}
    if task.type == "retrieval":
        return {"development": asked(0), "test": asked(1)}
    if task.type == "clustering":
        return {"test": shuffled}
    return {"test": lambda folder: _link(folder, place, "corpus.jsonl", "queries.jsonl", "qrels.tsv")}


def _halve(rows):
    """Returns two halves of rows, of each label in turn."""
    halves = ([], [])
    for turn, row in _turns(rows):
        halves[turn % 2].append(row)
    return halves


def _in_turn(rows, most):
    """Returns at most so many rows (0: all as they are), each label's first, then each one's second."""
    return [row for _, row in sorted(_turns(rows), key=lambda pair: pair[0])][:most] if most else rows


def _turns(rows):
    """Returns [(how many rows of its label came before, row)]."""
    seen, turns = collections.Counter(), []
    for row in rows:
        turns.append((seen[row["label"]], row))
        seen[row["label"]] += 1
    return turns


def _sample(rows, most, judged):
    """Returns, in their order, the rows whose _id is judged and others by chance, `most` in all (0: all rows)."""
    others = [row["_id"] for row in rows if row["_id"] not in judged]
    wanted = max(most - len(judged), 0)
    if not most or wanted >= len(others):
        return rows
    chosen = judged.union(random.Random(0).sample(others, wanted))
    return [row for row in rows if row["_id"] in chosen]


def _link(folder, place, *names):
    for name in names:
        (folder / name).symlink_to(place / name)


def _keep(folder, source, choose):
    """Links a file of rows into a folder, or writes there the fewer rows that choose(rows) returns. Returns those."""
    rows = _rows(source)
    kept = choose(rows)
    if len(kept) == len(rows):
        (folder / source.name).symlink_to(source)
    else:
        write_jsonl(folder / source.name, kept)
    return kept


def _rows(file):
    return [row for _, row in read_jsonl(file)]
