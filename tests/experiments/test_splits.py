"""The splits of a study: development and test apart, sampled corpora with all judged documents."""

import json

from llm2vec_gen_jax.evaluation import tasks
from llm2vec_gen_jax.experiments import splits
from tests.helpers.tasks import TYPES, write_task


def test_development_and_test_are_disjoint(task_folders, tmp_path):
    result = splits.split(task_folders, tmp_path)
    assert result["development"] == {
        "Small-classificationDevelopment": "classification",
        "SmallDevelopment": "sts",
        "Small-retrievalDevelopment": "retrieval",
    }
    assert set(result["test"].values()) == set(TYPES) and len(result["test"]) == 5
    assert splits.types(tmp_path / "test") == result["test"]
    development, test = ({task.name: task for task in _read(tmp_path / part)} for part in result)
    query_ids = [
        {row["id"] for row in view.data["queries"]}
        for view in (development["Small-retrievalDevelopment"], test["Small-retrieval"])
    ]
    assert not query_ids[0] & query_ids[1] and query_ids[0] | query_ids[1] == {f"q{number}" for number in range(8)}
    labelled = development["Small-classificationDevelopment"].data
    original = tasks.read(task_folders / "classification").data
    both = [*labelled["train"], *labelled["test"]]
    assert sorted(row["text"] for row in both) == sorted(row["text"] for row in original["train"])
    assert {row["label"] for row in labelled["train"]} == {row["label"] for row in labelled["test"]}
    key = json.dumps
    assert sorted(map(key, test["Small-classification"].data["test"])) == sorted(map(key, original["test"]))
    assert test["Small-classification"].data["test"] != original["test"], "shuffled, so that the first are a sample"


def test_a_sampled_corpus_includes_the_judged_documents(task_folders, tmp_path):
    splits.split(task_folders, tmp_path, documents=3, queries=2)
    views = {task.name: task for part in ("development", "test") for task in _read(tmp_path / part)}
    originals = {task.name: task for task in _read(task_folders)}
    for name in ("Small-retrievalDevelopment", "Small-retrieval", "Small-safety_retrieval"):
        original, cut = originals[name.removesuffix("Development")].data, views[name].data
        corpus_ids = {row["id"] for row in cut["corpus"]}
        query_ids = [row["id"] for row in cut["queries"]][:2]
        judged = {document for query in query_ids for document in original["qrels"][query]}
        assert len(query_ids) == 2 and judged <= corpus_ids < {row["id"] for row in original["corpus"]}
        assert len(corpus_ids) == max(3, len(judged))
        assert views[name].data["qrels"][query_ids[0]] == original["qrels"][query_ids[0]]
    for name in ("corpus", "queries"):
        assert (tmp_path / f"test/safety_retrieval/{name}.jsonl").is_symlink(), "no text of a safety task is copied"
    for name in ("Small-classificationDevelopment", "Small-classification"):
        labels = [row["label"] for row in views[name].data["train"]]
        assert len(labels) == 3 and len(set(labels)) == min(3, len({row["label"] for row in views[name].data["test"]}))


def test_task_folders_of_the_same_name_are_kept_apart(tmp_path):
    for language in ("de", "en"):
        write_task(tmp_path / "tasks" / language / "sts", "sts", f"STS-{language}")
    splits.split(tmp_path / "tasks", tmp_path / "splits")
    assert splits.types(tmp_path / "splits" / "test") == {"STS-de": "sts", "STS-en": "sts"}


def _read(folder):
    return [tasks.read(place) for place in tasks.find(folder)]
