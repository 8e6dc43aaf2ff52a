"""Tasks: invalid task folders, formats of their files, and benchmarks of the hub without network access."""

import dataclasses

import pytest

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.jsonl import read_jsonl
from llm2vec_gen_jax.evaluation import evaluate, tasks
from llm2vec_gen_jax.experiments import splits
from tests.helpers.table_files import write_table
from tests.helpers.tasks import needs_mteb, run, settings, write_task

# Invalid task folders


@pytest.mark.parametrize(
    ("kind", "file", "text", "message"),
    [
        ("sts", "task.json", '{"name": "x", "type": "stss"}', "type 'stss' is unknown, did you mean 'sts'"),
        ("sts", "task.json", '{"type": "sts"}', "'name' must be a string"),
        (
            "sts",
            "test.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": "1"}\n',
            "line 1: 'score' must be a number",
        ),
        ("sts", "test.jsonl", '{"sentence1": "a", "score": 1}\n', "line 1: no column 'sentence2'"),
        ("sts", "test.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n', "at least two pairs"),
        ("classification", "test.jsonl", '{"text": "a", "label": 1.5}\n', "'label' must be a string or a whole number"),
        ("classification", "train.jsonl", '{"text": "a", "label": 1}\n', "all rows have one label"),
        ("clustering", "test.jsonl", "\n", "no rows"),
        ("retrieval", "qrels.tsv", "q0\td0\n", "line 1: expected query-id, corpus-id"),
        ("retrieval", "qrels.tsv", "q0\td99\t1\n", "line 1: corpus.jsonl has no 'd99'"),
        ("retrieval", "qrels.tsv", "q99\td0\t1\n", "line 1: queries.jsonl has no 'q99'"),
        ("retrieval", "qrels.tsv", "q0\td0\t0\n", "no query has a relevant document"),
        (
            "retrieval",
            "corpus.jsonl",
            '{"_id": "d0", "text": "a"}\n{"_id": "d0", "text": "b"}\n',
            "line 2: the _id 'd0' is also in .*line 1",
        ),
        (
            "safety_retrieval",
            "task.json",
            '{"name": "x", "type": "safety_retrieval", "main_metric": "top_5"}',
            "top_5_acc",
        ),
        (
            "retrieval",
            "task.json",
            '{"name": "x", "type": "retrieval", "documents": ["d0", "d99"]}',
            "'documents': corpus.jsonl has no 'd99'",
        ),
        (
            "retrieval",
            "task.json",
            '{"name": "x", "type": "retrieval", "documents": "d0"}',
            "'documents' must be a list of ids of the corpus",
        ),
    ],
)
def test_errors_in_task_folders(tmp_path, kind, file, text, message):
    folder = write_task(tmp_path / "task", kind)
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=message) as error:
        tasks.read(folder)
    assert str(folder / file) in str(error.value)


@pytest.mark.parametrize("kind", tasks.MAIN_METRIC)
@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv", ".parquet", ".arrow"])
def test_tables_of_a_task_in_any_format(tmp_path, kind, suffix):
    folder = write_task(tmp_path / "tasks" / "task", kind)

    def read():
        """Returns all that is read from the folder: the task, its texts, and its splits."""
        parts = splits.split(tmp_path / "tasks", tmp_path / "splits")
        tables = {part: tasks.read(tmp_path / "splits" / part / "task").data for part in parts if parts[part]}
        return tasks.read(folder).data, splits.evaluation_texts(folder), parts, tables

    expected = read()
    for file in list(folder.glob("*.jsonl")):
        write_table(file.with_suffix(suffix), [row for _, row in read_jsonl(file)])
        file.unlink()
    if kind == "clustering" and suffix == ".csv":  # all values are text
        for row in [*expected[0]["test"], *expected[3]["test"]["test"]]:
            row["label"] = str(row["label"])
    assert read() == expected


def test_unknown_and_duplicate_tasks_are_rejected(tmp_path, task_folders):
    def resolve(text, **changes):
        return evaluate.resolve(dataclasses.replace(settings("student", **changes), tasks=text))

    with pytest.raises(InputError, match="no task.json at or below"):
        resolve(str(tmp_path))
    with pytest.raises(InputError, match="no such folder"):
        resolve("./nowhere")
    with pytest.raises(InputError, match="limit=3 is for task folders"):
        resolve("mteb-lite", limit=3)
    folder = str(task_folders / "safety_retrieval")
    with pytest.raises(InputError, match="two tasks are named Small-safety_retrieval"):
        resolve(f"{folder},{folder}")


@needs_mteb
def test_an_unknown_main_metric_is_an_input_error(model_folder, tmp_path):
    folder = write_task(tmp_path / "task", "sts", main_metric="cosine_spearmann")
    with pytest.raises(InputError, match="main_metric 'cosine_spearmann' is not a metric"):
        run(model_folder, folder, tmp_path / "out")


# Benchmarks of the hub: names and instructions, which need no network


@needs_mteb
@pytest.mark.parametrize(("name", "count"), [("mteb-eng-v2", 41), ("mteb-lite", 10), ("bright", 20), ("NFCorpus", 1)])
def test_hub_names_resolve_with_the_published_instructions(name, count):
    jobs = evaluate.resolve(dataclasses.replace(settings("student"), tasks=name))
    by_name = {job.name: job for job in jobs}
    assert len(by_name) == count
    assert all(job.query_instruction and not job.query_instruction.endswith(" ") for job in jobs)
    assert {job.document_instruction for job in jobs} == {"Summarize the following passage:"}
    assert {job.max_length for job in jobs} == {4096 if name == "bright" else 512}
    if name == "mteb-lite":
        assert {"BIOSSES", "STS17"} <= by_name.keys()
        assert by_name["STS17"].task.hf_subsets == ["en-en"], "the language of the benchmark"
    if name == "bright":
        assert sum("Long" in title for title in by_name) == 8
        long = by_name["BrightEarthScienceLongRetrieval"].query_instruction
        assert long == "Given a earth_science post, generate relevant documents that help answer the post:"


@needs_mteb
def test_bright_leaves_excluded_documents_out(monkeypatch):
    """mteb's loader of BRIGHT, on rows of its format: documents excluded by a query are not candidates for it."""
    import datasets

    from llm2vec_gen_jax.evaluation import mteb

    rows = {
        "documents": [{"id": name, "content": name} for name in ("a", "b", "c")],
        "examples": [
            {"id": "0", "query": "x", "gold_ids": ["a"], "gold_ids_long": [], "excluded_ids": ["c"]},
            {"id": "1", "query": "y", "gold_ids": ["b"], "gold_ids_long": [], "excluded_ids": ["N/A"]},
        ],
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **_: rows[name])
    task = next(task for task in mteb.hub_tasks("BRIGHT(v1.1)") if task.metadata.name == "BrightBiologyRetrieval")
    task.load_data()
    assert task.top_ranked["standard"] == {"0": ["a", "b"], "1": ["a", "b", "c"]}


@needs_mteb
def test_errors_of_hub_tasks(model_folder, tmp_path):
    with pytest.raises(InputError, match="tasks=NFCorpuss: .*NFCorpus"):
        run(model_folder, "NFCorpuss", tmp_path / "out")
    with pytest.raises(InputError, match="NFCorpus: its data cannot be fetched from the hub"):
        run(model_folder, "NFCorpus", tmp_path / "out")
    with pytest.raises(InputError, match="task SciDocsRR has no published instruction"):
        run(model_folder, "SciDocsRR", tmp_path / "out")


def test_task_folders_in_hidden_folders_are_skipped(tmp_path):
    write_task(tmp_path / "a", "sts")
    for hidden in (".ipynb_checkpoints", ".trash/b"):
        write_task(tmp_path / hidden, "sts")
    assert tasks.find(tmp_path) == [tmp_path / "a"]
