"""Development and test splits of task folders: settings are chosen on one and results are reported on the other.

A split of a task is itself a task folder; files whose rows are unchanged are symlinks to the original. A sample of a
corpus is a list of ids in task.json, so that no text of a corpus is copied.
"""

import collections
import pathlib
import random
import shutil
from collections.abc import Callable, Iterable
from typing import Any

from llm2vec_gen_jax.common.files import atomic_directory, read_json, visible, write_json, write_text
from llm2vec_gen_jax.common.jsonl import write_jsonl
from llm2vec_gen_jax.data.texts import comparison_key
from llm2vec_gen_jax.evaluation import tasks

_Row = dict[str, Any]
_TEXT_COLUMNS = ("text", "sentence1", "sentence2")


def split(
    folder: str | pathlib.Path, output: str | pathlib.Path, documents: int = 0, queries: int = 0
) -> dict[str, dict[str, str]]:
    """Writes OUTPUT/development/NAME and OUTPUT/test/NAME for the task folders at or below `folder`.

    STS: a task whose name ends in Dev is a development task, any other is a test task. Classification: the training
    rows of each label alternate between the train and test rows of the development task; the test task keeps its rows.
    Retrieval: queries alternate between the two, with the same corpus. Clustering and safety: test only. Test rows are
    shuffled, so that the first ones are a random sample.

    documents: the largest corpus, a random sample that includes all documents judged for the first `queries` queries;
    also the largest number of training rows of a classification task, balanced over its labels. 0: all, for both.
    No text of a safety task is copied.
    Returns {"development": {name: type}, "test": {name: type}}. Raises InputError for an invalid task folder.
    """
    names: dict[str, dict[str, str]] = {"development": {}, "test": {}}
    written: set[pathlib.Path] = set()
    for number, source in enumerate(tasks.find(folder)):
        task = tasks.read(source)
        for part, write in _writers(task, source.resolve(), documents, queries).items():
            target = pathlib.Path(output) / part / source.name
            if target in written:  # of a task folder with the same name elsewhere
                target = target.with_name(f"{source.name}-{number}")
            written.add(target)
            shutil.rmtree(target, ignore_errors=True)
            with atomic_directory(target) as temporary:
                name = task.name if part == "test" else f"{task.name.removesuffix('Dev')}Development"
                write_json(temporary / "task.json", task.settings | {"name": name} | (write(temporary) or {}))
            names[part][name] = task.type
    return names


def evaluation_texts(folder: str | pathlib.Path) -> set[str]:
    """Returns the queries and labeled texts of the task folders at or below `folder`, as `comparison_key`s.

    They are excluded from the training queries.
    """
    texts = set()
    for source in tasks.find(folder):
        for file in (tasks.table(source, "queries"), tasks.table(source, "test")):
            for row in _rows(file) if file.exists() else ():
                texts |= {comparison_key(row[column]) for column in _TEXT_COLUMNS if isinstance(row.get(column), str)}
    return texts


def types(folder: str | pathlib.Path) -> dict[str, str]:
    """Returns {name: type} of the tasks that `split` wrote to a folder; {} if there are none."""
    settings = [read_json(file) for file in visible(folder, "task.json")]
    return {values["name"]: values["type"] for values in settings}


def _writers(
    task: tasks.EvaluationTask, source: pathlib.Path, documents: int, queries: int
) -> dict[str, Callable[[pathlib.Path], dict[str, Any] | None]]:
    """Returns {part: function that writes the files of this part to a folder and returns changed settings, if any}."""

    def write_shuffled(folder):
        rows = _rows(tasks.table(source, "test"))
        random.Random(0).shuffle(rows)
        write_jsonl(folder / "test.jsonl", rows)
        if task.type == "classification":
            _write_balanced(folder, tasks.table(source, "train"), documents)

    def write_training_halves(folder):
        train, test = _halve(_rows(tasks.table(source, "train")))
        random.Random(0).shuffle(test)
        write_jsonl(folder / "train.jsonl", _balanced(train, documents))
        write_jsonl(folder / "test.jsonl", test)

    def every_other_query(first):
        def write(folder):
            qrels = {query: task.data["qrels"][query] for query in list(task.data["qrels"])[first::2]}
            lines = ["query-id\tcorpus-id\tscore"]
            for query, grades in qrels.items():
                lines += [f"{query}\t{name}\t{grade}" for name, grade in grades.items()]
            write_text(folder / "qrels.tsv", "\n".join(lines) + "\n")
            return link_texts(folder, qrels)

        return write

    def link_texts(folder, qrels):
        _link(folder, tasks.table(source, "queries"), tasks.table(source, "corpus"))
        leading = [row["id"] for row in task.data["queries"] if row["id"] in qrels][: queries or None]
        judged = {name for query in leading for name in qrels[query]}
        return _sample([row["id"] for row in task.data["corpus"]], documents, judged)

    def link_all(folder):
        _link(folder, source / "qrels.tsv")
        return link_texts(folder, task.data["qrels"])

    if task.type == "sts":
        return {"development" if task.name.endswith("Dev") else "test": write_shuffled}
    if task.type == "classification":
        return {"development": write_training_halves, "test": write_shuffled}
    if task.type == "retrieval":
        return {"development": every_other_query(0), "test": every_other_query(1)}
    if task.type == "clustering":
        return {"test": write_shuffled}
    return {"test": link_all}


def _halve(rows: Iterable[_Row]) -> tuple[list[_Row], list[_Row]]:
    """Returns two halves of rows; the rows of each label alternate between them."""
    halves: tuple[list[_Row], list[_Row]] = ([], [])
    for rank, row in _ranks_within_label(rows):
        halves[rank % 2].append(row)
    return halves


def _balanced(rows: list[_Row], limit: int) -> list[_Row]:
    """Returns at most `limit` rows (0: all), the first row of each label, then the second of each, and so on."""
    ranked = sorted(_ranks_within_label(rows), key=lambda pair: pair[0])
    return [row for _, row in ranked][:limit] if limit else rows


def _ranks_within_label(rows: Iterable[_Row]) -> list[tuple[int, _Row]]:
    """Returns [(number of earlier rows with the same label, row)]."""
    seen: collections.Counter = collections.Counter()
    ranked = []
    for row in rows:
        ranked.append((seen[row["label"]], row))
        seen[row["label"]] += 1
    return ranked


def _sample(names: list[str], limit: int, judged: set[str]) -> dict[str, list[str]]:
    """Returns {"documents": the judged ids and a random sample of the others, `limit` in total}, {} for all ids."""
    others = [name for name in names if name not in judged]
    count = max(limit - len(judged), 0)
    if not limit or count >= len(others):
        return {}
    chosen = judged.union(random.Random(0).sample(others, count))
    return {"documents": [name for name in names if name in chosen]}


def _link(folder: pathlib.Path, *files: pathlib.Path) -> None:
    for file in files:
        (folder / file.name).symlink_to(file)


def _write_balanced(folder: pathlib.Path, source: pathlib.Path, limit: int) -> None:
    """Writes _balanced(rows, limit) of a file to `folder`, or a symlink to the file if that is all rows."""
    rows = _rows(source)
    if limit and limit < len(rows):
        write_jsonl(folder / f"{source.name.split('.')[0]}.jsonl", _balanced(rows, limit))
    else:
        _link(folder, source)


def _rows(file: pathlib.Path) -> list[_Row]:
    return [row for _, row in tasks.rows(file)]
