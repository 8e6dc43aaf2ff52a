"""Reads and validates evaluation task folders: task.json and files with BEIR's names."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from llm2vec_gen_jax.common.errors import InputError, nearest
from llm2vec_gen_jax.common.files import fingerprint, has_lone_surrogate, read_json, sha256_file, visible, whole_number
from llm2vec_gen_jax.common.jsonl import read_lines
from llm2vec_gen_jax.data import tables
from llm2vec_gen_jax.evaluation import safety

MAIN_METRIC = {
    "retrieval": "ndcg_at_10",
    "sts": "cosine_spearman",
    "classification": "accuracy",
    "clustering": "v_measure",
    "safety_retrieval": "top_5_acc",
}
_COLUMNS = ("_id", "title", "text", "label", "sentence1", "sentence2", "score")


@dataclasses.dataclass
class EvaluationTask:
    """One task folder.

    settings: the contents of task.json. data, by type: retrieval and safety_retrieval have corpus [{id, title, text}],
    queries [{id, text}] and qrels {query id: {document id: grade}}; the others have test, and classification also
    train, as lists of {text, label} or {sentence1, sentence2, score}. digest: 16 hex digits that identify the files.
    """

    name: str
    type: str
    main_metric: str
    query_instruction: str
    document_instruction: str
    settings: dict[str, Any]
    data: dict[str, Any]
    digest: str


def find(folder: str | pathlib.Path) -> list[pathlib.Path]:
    """Returns the task folders at or below a folder, sorted by path."""
    folders = [file.parent for file in visible(folder, "task.json")]
    if not folders:
        raise InputError(f"{folder}: no task.json at or below this folder")
    return folders


def read(folder: str | pathlib.Path, limit: int | None = None) -> EvaluationTask:
    """Returns the task of a folder, with only the first `limit` of its queries or test rows.

    Raises InputError naming file, line and key for missing values, wrong types and unknown ids.
    """
    folder = pathlib.Path(folder)
    file = folder / "task.json"
    settings = read_json(file)
    for key in ("name", "type"):
        if not isinstance(settings.get(key), str):
            raise InputError(f"{file}: {key!r} must be a string, found {settings.get(key)!r}")
    for key in ("main_metric", "query_instruction", "document_instruction"):
        if not isinstance(settings.get(key, ""), str):
            raise InputError(f"{file}: {key!r} must be a string, found {settings[key]!r}")
    kind = settings["type"]
    if kind not in MAIN_METRIC:
        raise InputError(f"{file}: type {kind!r} is unknown{nearest(kind, MAIN_METRIC)}")
    metric = settings.get("main_metric", MAIN_METRIC[kind])
    if kind == "safety_retrieval" and metric not in safety.METRICS:
        raise InputError(f"{file}: main_metric {metric!r} is unknown{nearest(metric, safety.METRICS)}")
    for key in ("samples_per_label", "n_experiments"):
        if not isinstance(settings.get(key, 1), int) or settings.get(key, 1) < 1:
            raise InputError(f"{file}: {key!r} must be a positive whole number, found {settings[key]!r}")
    if kind in ("retrieval", "safety_retrieval"):
        data = _read_retrieval(folder, limit, settings.get("documents"))
        files = [table(folder, "corpus"), table(folder, "queries"), folder / "qrels.tsv"]
    else:
        files = [table(folder, "test")]
        data = {"test": _read_rows(files[0], kind)[:limit]}
        if kind == "sts" and len(data["test"]) < 2:
            raise InputError(f"{files[0]}: a correlation needs at least two pairs")
        if kind == "classification":
            files.append(table(folder, "train"))
            data["train"] = _read_rows(files[1], kind)
            if len({row["label"] for row in data["train"]}) < 2:
                raise InputError(f"{files[1]}: all rows have one label; a classifier needs two")
    return EvaluationTask(
        settings["name"],
        kind,
        metric,
        settings.get("query_instruction", ""),
        settings.get("document_instruction", ""),
        settings,
        data,
        fingerprint([sha256_file(path) for path in (file, *files)]),
    )


def table(folder: pathlib.Path, name: str) -> pathlib.Path:
    """Returns the file NAME.jsonl of a task folder, or the one with another suffix of `tables` if only that exists."""
    files = [folder / f"{name}{suffix}" for suffix in (".jsonl", *tables.SUFFIXES) if not suffix.startswith(".txt")]
    return next((file for file in files if file.exists()), files[0])


def rows(file: pathlib.Path, *needed: str) -> Iterator[tables.Row]:
    """Yields (place, row) of a file of a task folder. Raises InputError if a column of `needed` is missing."""
    for _, read in tables.chunks(file, dict.fromkeys(needed, ""), _COLUMNS):
        for place, row in read():
            if "score" in row and tables.format_of(file) == ".csv":
                row["score"] = _number(row["score"])
            yield place, row


def _read_retrieval(folder: pathlib.Path, limit: int | None, documents: Any) -> dict[str, Any]:
    """documents: ids of the rows of the corpus to use, None for all; judgments of others are ignored."""
    corpus = [
        {"id": row["_id"], "title": row.get("title") or "", "text": row["text"]}
        for row in _read_texts(table(folder, "corpus"))
    ]
    queries = [{"id": row["_id"], "text": row["text"]} for row in _read_texts(table(folder, "queries"))]
    file = folder / "qrels.tsv"
    document_ids, query_ids = {row["id"] for row in corpus}, {row["id"] for row in queries}
    qrels: dict[str, dict[str, int]] = {}
    for number, line in read_lines(file):
        fields = line.split("\t")
        if (number == 1 and fields[-1] == "score") or not line.strip():
            continue
        if len(fields) != 3 or (grade := whole_number(fields[2].strip())) is None:
            raise InputError(f"{file}, line {number}: expected query-id, corpus-id and a whole number, tab-separated")
        query, document, _ = fields
        if query not in query_ids:
            raise InputError(f"{file}, line {number}: {table(folder, 'queries').name} has no {query!r}")
        if document not in document_ids:
            raise InputError(f"{file}, line {number}: {table(folder, 'corpus').name} has no {document!r}")
        qrels.setdefault(query, {})[document] = grade
    if documents is not None:
        chosen = _document_ids(folder / "task.json", documents)
        if unknown := sorted(chosen - document_ids):
            raise InputError(
                f"{folder / 'task.json'}: 'documents': {table(folder, 'corpus').name} has no {unknown[0]!r}"
            )
        corpus = [row for row in corpus if row["id"] in chosen]
        qrels = {query: {name: grades[name] for name in grades if name in chosen} for query, grades in qrels.items()}
    # As in BEIR, queries without a relevant document are skipped.
    queries = [row for row in queries if any(qrels.get(row["id"], {}).values())][:limit]
    if not queries:
        raise InputError(f"{file}: no query has a relevant document")
    return {"corpus": corpus, "queries": queries, "qrels": qrels}


def _document_ids(file: pathlib.Path, documents: Any) -> set[str]:
    if not isinstance(documents, list) or not documents or not all(isinstance(name, str) for name in documents):
        raise InputError(f"{file}: 'documents' must be a list of ids of the corpus")
    return set(documents)


def _read_texts(file: pathlib.Path) -> list[dict[str, Any]]:
    texts: list[dict[str, Any]] = []
    seen: dict[str, str] = {}
    for place, row in rows(file, "_id", "text"):
        _check_strings(place, {"_id": row["_id"], "text": row["text"], "title": row.get("title") or ""})
        if row["_id"] in seen:
            raise InputError(f"{place}: the _id {row['_id']!r} is also in {seen[row['_id']]}")
        seen[row["_id"]] = place
        texts.append(row)
    if not texts:
        raise InputError(f"{file}: no rows")
    return texts


def _read_rows(file: pathlib.Path, kind: str) -> list[dict[str, Any]]:
    texts, value = (("sentence1", "sentence2"), "score") if kind == "sts" else (("text",), "label")
    examples = []
    for place, row in rows(file, *texts, value):
        _check_strings(place, {key: row[key] for key in texts})
        label: Any = row[value]
        expected = "a number" if kind == "sts" else "a string or a whole number"
        label_types = (int, float) if kind == "sts" else (int, str)
        valid = isinstance(label, label_types) and not isinstance(label, bool)
        if not valid or (kind == "sts" and not math.isfinite(label)):
            raise InputError(f"{place}: {value!r} must be {expected}, found {label!r}")
        examples.append({key: row[key] for key in texts} | {value: label})
    if not examples:
        raise InputError(f"{file}: no rows")
    return examples


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _check_strings(place: str, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        if not isinstance(value, str):
            raise InputError(f"{place}: {key!r} must be a string, found {type(value).__name__}")
        if has_lone_surrogate(value):
            raise InputError(f"{place}: {key!r} has an unpaired surrogate (not valid Unicode)")
