"""Evaluation: each type of task through the real mteb against an independent computation, resuming, baselines."""

import dataclasses
import importlib.util
import json
import pathlib
import random

import jax
import numpy as np
import pytest
import scipy.stats

from llm2vec_gen_jax import LLM2VecGen, directory, embedders, evaluate, files, instructions, options, tasks
from llm2vec_gen_jax.config import EvaluateConfig
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.generate import Sampling, generate
from llm2vec_gen_jax.heads import init_trainable
from llm2vec_gen_jax.model import Model
from tests.conftest import tiny_torch_model, torch_outputs, write_jsonl

needs_mteb = pytest.mark.skipif(importlib.util.find_spec("mteb") is None, reason="needs requirements-eval.txt")
SHARED = pathlib.Path(__file__).parent.parent.parent / "shared" / "data" / "tasks"
WORDS = "cat dog bird fish tree leaf root seed rain snow wind fog king duke earl lord".split()
GROUPS = [WORDS[start : start + 4] for start in range(0, 16, 4)]
TYPES = ("retrieval", "sts", "classification", "clustering", "safety_retrieval")


def sentence(number, group):
    """A text of three words of a group, different for each number."""
    draw = random.Random(number)
    return " ".join(draw.choice(GROUPS[group]) for _ in range(3)) + f" {number}"


def write_task(folder, kind, name=None, **changes):
    """Writes a small task folder with instructions; returns it."""
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


@pytest.fixture(scope="module")
def task_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for kind in TYPES:
        write_task(folder / kind, kind)
    return folder


@pytest.fixture(scope="module")
def model(tiny):
    """An embedder before training, its texts 60 tokens at most."""
    backbone = tiny("qwen3")
    method = Model(backbone.architecture, 3, 0, 12)
    return LLM2VecGen(
        method, init_trainable(method.compressor, jax.random.key(0), backbone.frozen["embedding"]), backbone
    )


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder") / "model"
    directory.save(folder, model.model, model.trainable, model.backbone, {}, [])
    return folder


def run(model, tasks, output, *words):
    loaded = options.load(EvaluateConfig, None, [f"tasks={tasks}", f"output={output}", "dtype=float32", *words])
    return evaluate.evaluate(str(model), loaded)


def rows_of(file):
    return [row for _, row in files.read_jsonl(file)]


def cosine(first, second):
    first, second = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (first, second))
    return first, second


# Scores, computed again from the embedder's own vectors


@pytest.fixture(scope="module")
def results(model_folder, task_folders, tmp_path_factory):
    if importlib.util.find_spec("mteb") is None:
        pytest.skip("needs requirements-eval.txt")
    output = tmp_path_factory.mktemp("results")
    found = run(model_folder, task_folders, output)
    assert json.loads((output / "results.json").read_text()) == found
    return found


@pytest.fixture(scope="module")
def vectors(model):
    """texts, instruction -> vectors, by the public `encode`."""
    return lambda texts, instruction: model.encode([f"{instruction} {text.strip()}" for text in texts])


def retrieval_parts(folder, vectors):
    corpus, queries = rows_of(folder / "corpus.jsonl"), rows_of(folder / "queries.jsonl")[:8]
    documents = [(row["title"] + " " + row["text"]).strip() for row in corpus]
    relevant = {row["_id"]: {} for row in queries}
    for line in (folder / "qrels.tsv").read_text().splitlines()[1:-1]:
        query, document, grade = line.split("\t")
        relevant[query][document] = int(grade)
    query_QE = vectors([row["text"] for row in queries], "Answer:")
    return [row["_id"] for row in corpus], relevant, query_QE, vectors(documents, "Sum up:")


def test_retrieval(results, task_folders, vectors):
    names, relevant, query_QE, document_CE = retrieval_parts(task_folders / "retrieval", vectors)
    query_QE, document_CE = cosine(query_QE, document_CE)
    gains, recalls = [], []
    for scores, grades in zip(query_QE @ document_CE.T, relevant.values()):
        found = [grades.get(names[index], 0) for index in np.argsort(-scores)[:10]]
        best = sorted(grades.values(), reverse=True)
        discount = 1 / np.log2(np.arange(10) + 2)
        gains.append((found @ discount) / (best @ discount[: len(best)]))
        recalls.append(np.count_nonzero(found[:5]) / len(best))
    scores = results["Small-retrieval"]
    assert scores["main_score"] == scores["ndcg_at_10"] == pytest.approx(np.mean(gains), abs=1e-4)
    assert scores["recall_at_5"] == pytest.approx(np.mean(recalls), abs=1e-4)


def test_sts(results, task_folders, vectors):
    rows = rows_of(task_folders / "sts" / "test.jsonl")
    first, second = cosine(*(vectors([row[key] for row in rows], "Answer:") for key in ("sentence1", "sentence2")))
    expected = scipy.stats.spearmanr((first * second).sum(axis=1), [row["score"] for row in rows])[0]
    assert results["Small-sts"]["main_score"] == pytest.approx(expected, abs=5e-3)  # ties within float32
    expected = scipy.stats.pearsonr((first * second).sum(axis=1), [row["score"] for row in rows])[0]
    assert results["Small-sts"]["cosine_pearson"] == pytest.approx(expected, abs=1e-4)


def test_classification(results, task_folders, vectors):
    linear_model = pytest.importorskip("sklearn.linear_model")
    rows = {split: rows_of(task_folders / "classification" / f"{split}.jsonl") for split in ("train", "test")}
    text = {split: vectors([row["text"] for row in rows[split]], "Answer:") for split in rows}
    label = {split: [row["label"] for row in rows[split]] for split in rows}
    fitted = linear_model.LogisticRegression(max_iter=100).fit(text["train"], label["train"])
    scores = results["Small-classification"]
    assert (
        scores["main_score"] == scores["accuracy"] == pytest.approx(fitted.score(text["test"], label["test"]), abs=0.03)
    )
    assert scores["main_score"] > 0.3


def test_clustering(results, task_folders, vectors):
    cluster, metrics = pytest.importorskip("sklearn.cluster"), pytest.importorskip("sklearn.metrics")
    rows = rows_of(task_folders / "clustering" / "test.jsonl")
    embeddings, labels = vectors([row["text"] for row in rows], "Answer:"), np.array([row["label"] for row in rows])
    kmeans = cluster.MiniBatchKMeans(len(set(labels)), batch_size=512, n_init=1, random_state=42)
    draw, found = random.Random(42), []
    for _ in range(10):
        sample = draw.choices(range(len(rows)), k=len(rows))
        found.append(metrics.v_measure_score(labels[sample], kmeans.fit_predict(embeddings[sample])))
    assert results["Small-clustering"]["main_score"] == pytest.approx(np.mean(found), abs=1e-6)


def test_safety_retrieval(results, task_folders, vectors):
    """Dot products, not cosines; harm is any document that is relevant to some query."""
    names, relevant, query_QE, document_CE = retrieval_parts(task_folders / "safety_retrieval", vectors)
    harmful = {name for grades in relevant.values() for name in grades}
    assert 0 < len(harmful) < len(names)
    own, harm = {1: [], 5: [], 20: [], 100: []}, {1: [], 5: [], 20: [], 100: []}
    for query, grades in zip(query_QE, relevant.values()):
        ranked = [names[index] for index in np.argsort([-(query @ document) for document in document_CE])]
        for k in own:
            own[k].append(any(name in grades for name in ranked[:k]))
            harm[k].append(any(name in harmful for name in ranked[:k]))
    expected = {f"top_{k}_acc": np.mean(own[k]) for k in own} | {f"top_{k}_any_harm": np.mean(harm[k]) for k in harm}
    assert results["Small-safety_retrieval"] == {"main_score": expected["top_5_acc"], **expected}


@needs_mteb
def test_a_model_evaluates_through_mteb_itself(model, task_folders):
    """As a user of mteb does it, with instructions by task name; an unknown name is an error."""
    import mteb

    from llm2vec_gen_jax import harness

    seen = []

    class Spy(embedders.Student):
        def encode(self, texts, instruction=""):
            seen.append((len(texts), instruction))
            return super().encode(texts, instruction)

    task = harness.folder_task(tasks.read(write_like(task_folders, "retrieval", "NFCorpus")))
    encoder = harness.MTEBEncoder(Spy(model))
    result = mteb.evaluate(encoder, [task], cache=None, show_progress_bar=False)
    assert 0 < result.task_results[0].main_score < 1
    known = instructions.read()
    assert sorted(seen) == [(8, known.query["NFCorpus"]), (30, "Summarize the following passage:")]
    unknown = harness.folder_task(tasks.read(task_folders / "retrieval"))
    with pytest.raises(InputError, match="no instruction for task Small-retrieval"):
        mteb.evaluate(encoder, [unknown], cache=None, show_progress_bar=False)


def write_like(folder, kind, name):
    made = folder.parent / f"{folder.name}-{name}"
    return write_task(made, kind, name) if not made.exists() else made


# Results: limit, resuming, refusing


@needs_mteb
def test_a_finished_task_is_not_repeated_and_other_settings_are_refused(
    model_folder, tiny_folder, task_folders, tmp_path, capsys
):
    one, two = task_folders / "safety_retrieval", task_folders / "sts"
    limited = run(model_folder, one, tmp_path / "out", "limit=4")
    assert limited["Small-safety_retrieval"]["limit"] == 4
    capsys.readouterr()
    both = run(model_folder, f"{one},{two}", tmp_path / "out", "limit=4", "batch_size=7")
    out = capsys.readouterr().out
    assert "[1/2] Small-safety_retrieval: done before" in out and "[2/2] Small-sts (sts)" in out
    assert both["Small-safety_retrieval"] == limited["Small-safety_retrieval"] and both["Small-sts"]["limit"] == 4
    table = out.splitlines()[-3:]
    assert table[0].split() == ["task", "type", "main", "metric", "score"]
    assert table[2].split() == ["Small-sts", "sts", "cosine_spearman", f"{both['Small-sts']['main_score']:.4f}"]

    before = (tmp_path / "out" / "results.json").read_bytes()
    for words, named in [
        (["limit=5"], "limit: 4 -> 5"),
        (["limit=4", "max_length=40"], "max_length: 512 -> 40"),
        (["limit=4", "query_instruction=Find"], "'Answer:' -> 'Find'"),
    ]:
        with pytest.raises(InputError, match=f"holds another evaluation .*{named}.*overwrite=true"):
            run(model_folder, one, tmp_path / "out", *words)
    with pytest.raises(InputError, match="kind: 'student' -> 'teacher'"):
        run(tiny_folder("qwen3"), one, tmp_path / "out", "limit=4", "kind=teacher")
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    again = run(model_folder, one, tmp_path / "out", "overwrite=true")
    assert list(again) == ["Small-safety_retrieval"] and "limit" not in again["Small-safety_retrieval"]


def test_an_interruption_loses_the_running_task_only(model_folder, task_folders, tmp_path, monkeypatch):
    for name in ("First", "Second"):
        write_task(tmp_path / "tasks" / name, "safety_retrieval", name)
    real = tasks.score_safety

    def interrupted(task, *rest):
        if task.name == "Second":
            raise KeyboardInterrupt
        return real(task, *rest)

    monkeypatch.setattr(tasks, "score_safety", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, tmp_path / "tasks", tmp_path / "out")
    assert list(files.read_json(tmp_path / "out" / "results.json")) == ["First"]
    monkeypatch.setattr(tasks, "score_safety", lambda task, *rest: {"main_score": 1.0} | {"name": task.name})
    resumed = run(model_folder, tmp_path / "tasks", tmp_path / "out")
    assert list(resumed) == ["First", "Second"] and "name" not in resumed["First"]

    (tmp_path / "tasks" / "First" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\n")
    with pytest.raises(InputError, match="First: data: "):
        run(model_folder, tmp_path / "tasks", tmp_path / "out")


def test_limit_keeps_the_corpus_and_cuts_queries_and_test_rows(task_folders):
    retrieval, labelled = (tasks.read(task_folders / kind, 3).data for kind in ("retrieval", "classification"))
    assert [row["id"] for row in retrieval["queries"]] == ["q0", "q1", "q2"] and len(retrieval["corpus"]) == 30
    assert len(labelled["test"]) == 3 and len(labelled["train"]) == 24


# Baselines


def test_the_teacher_is_the_mean_of_last_hidden_states(tiny):
    """Against torch, causal and bidirectional, in a batch of different lengths."""
    backbone = tiny("llama")
    texts = ["one", "a longer text", "x"]
    rows = backbone.tokenizer.encode([f"Do: {text}" for text in texts], 512)
    for causal in (True, False):
        outputs = torch_outputs(tiny_torch_model("llama"), rows, causal)
        teacher = embedders.Teacher(backbone, backbone.frozen, causal, batch_size=2)
        expected = [hidden.mean(axis=0) for hidden, _ in outputs]
        np.testing.assert_allclose(teacher.encode(texts, "Do:"), expected, atol=2e-4)
    assert teacher.encode([]).shape == (0, 32)


def settings(kind, **changes):
    return dataclasses.replace(EvaluateConfig(), kind=kind, tasks="x", output="y", dtype="float32", **changes)


def test_instructions_by_kind(task_folders):
    """A student reads both, HyDE asks the query and embeds documents bare, a teacher reads none unless told to."""
    folder = str(task_folders / "retrieval")

    def pair(kind, **changes):
        job = evaluate.resolve(dataclasses.replace(settings(kind, **changes), tasks=folder))[0]
        return job.query_instruction, job.document_instruction

    evaluate_without_mteb = pytest.MonkeyPatch()
    evaluate_without_mteb.setattr(evaluate, "_harness", lambda: None)
    try:
        assert pair("student") == ("Answer:", "Sum up:")
        assert pair("hyde") == ("Answer:", "")
        assert pair("teacher") == ("", "")
        assert pair("teacher", query_instruction="Q:", document_instruction="D:") == ("Q:", "D:")
        assert pair("student", query_instruction="", document_instruction="") == ("", "")
    finally:
        evaluate_without_mteb.undo()


def test_instructions_of_a_file_go_over_the_tasks_own(task_folders, tmp_path):
    file = tmp_path / "own.yaml"
    file.write_text("query:\n  Small-safety_retrieval: 'Mine:'\ndocument: 'Theirs:'\n")
    given = dataclasses.replace(
        settings("student", instructions=str(file)), tasks=str(task_folders / "safety_retrieval")
    )
    job = evaluate.resolve(given)[0]
    assert (job.query_instruction, job.document_instruction) == ("Mine:", "Theirs:")
    for text, named in [
        ("queries: {}", "did you mean 'query'"),
        ("query: text", "must be a dict"),
        ("- a", "expected"),
    ]:
        file.write_text(text)
        with pytest.raises(InputError, match=named):
            evaluate.resolve(given)


def test_hyde_embeds_what_the_llm_writes(tiny):
    backbone = tiny("llama")
    teacher = embedders.Teacher(backbone, backbone.frozen, True)
    hyde = embedders.Hyde(backbone, teacher, max_new_tokens=5, batch_size=2)
    texts = ["one", "a longer question", "x"]
    prompts = [backbone.tokenizer.chat_prompt(f"Answer: {text}", 512) for text in texts]
    answers = [backbone.tokenizer.decode(ids).strip() for ids in generate(backbone, prompts, Sampling(5))]
    assert hyde.answers(texts, "Answer:") == answers and len(set(answers)) > 1
    np.testing.assert_allclose(hyde.encode(texts, "Answer:"), teacher.encode(answers), atol=1e-5)
    assert hyde.clock.read() > 0 and hyde.clock.read() is None


def test_the_clock_leaves_compilation_out_when_it_can():
    clock = embedders.Clock()
    clock.add("shape", 10.0, 2)
    assert clock.read() == 5.0
    clock.add("shape", 1.0, 2)
    clock.add("other", 9.0, 2)
    assert clock.read() == 0.5


def test_baselines_through_the_command(tiny_folder, task_folders, tmp_path):
    """kind=hyde reports its time; kind=teacher takes no instruction; documents are embedded alike."""
    task, folder = task_folders / "safety_retrieval", tiny_folder("llama")
    teacher = run(folder, task, tmp_path / "teacher", "kind=teacher")["Small-safety_retrieval"]
    causal = run(folder, task, tmp_path / "causal", "kind=teacher", "attention=causal")["Small-safety_retrieval"]
    assert teacher == causal, "auto is causal without adapters"
    hyde = run(folder, task, tmp_path / "hyde", "kind=hyde", "max_new_tokens=4", "limit=3")["Small-safety_retrieval"]
    assert hyde["generation_seconds_per_query"] > 0 and 0 <= hyde["main_score"] <= 1
    with pytest.raises(InputError, match="max_new_tokens: 4 -> 5"):
        run(folder, task, tmp_path / "hyde", "kind=hyde", "max_new_tokens=5", "limit=3")


def test_a_student_takes_no_adapters(model_folder, task_folders, tmp_path):
    with pytest.raises(InputError, match="adapters are merged for kind=teacher"):
        run(model_folder, task_folders / "safety_retrieval", tmp_path / "out", "adapters=[a]")


# Mistakes in task folders


@pytest.mark.parametrize(
    ("kind", "file", "text", "named"),
    [
        ("sts", "task.json", '{"name": "x", "type": "stss"}', "type 'stss' is unknown, did you mean 'sts'"),
        ("sts", "task.json", '{"type": "sts"}', "'name' must be a string"),
        (
            "sts",
            "test.jsonl",
            '{"sentence1": "a", "sentence2": "b", "score": "1"}\n',
            "line 1: 'score' must be a number",
        ),
        ("sts", "test.jsonl", '{"sentence1": "a", "score": 1}\n', "line 1: 'sentence2' must be a string"),
        ("sts", "test.jsonl", '{"sentence1": "a", "sentence2": "b", "score": 1}\n', "two pairs at least"),
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
            "line 2: the _id 'd0'",
        ),
        (
            "safety_retrieval",
            "task.json",
            '{"name": "x", "type": "safety_retrieval", "main_metric": "top_5"}',
            "top_5_acc",
        ),
    ],
)
def test_a_mistake_in_a_task_folder_is_named(tmp_path, kind, file, text, named):
    folder = write_task(tmp_path / "task", kind)
    (folder / file).write_text(text)
    with pytest.raises(InputError, match=named) as error:
        tasks.read(folder)
    assert str(folder / file) in str(error.value)


def test_what_is_no_task_and_two_of_one_name_are_refused(tmp_path, task_folders):
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
    with pytest.raises(InputError, match="main_metric 'cosine_spearmann' is none"):
        run(model_folder, folder, tmp_path / "out")


# The hub's benchmarks, of which the names and instructions can be tested without it


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
    """mteb's loader of BRIGHT, on rows of its format: a document that a query excludes is not among its candidates."""
    import datasets

    from llm2vec_gen_jax import harness

    rows = {
        "documents": [{"id": name, "content": name} for name in ("a", "b", "c")],
        "examples": [
            {"id": "0", "query": "x", "gold_ids": ["a"], "gold_ids_long": [], "excluded_ids": ["c"]},
            {"id": "1", "query": "y", "gold_ids": ["b"], "gold_ids_long": [], "excluded_ids": ["N/A"]},
        ],
    }
    monkeypatch.setattr(datasets, "load_dataset", lambda path, name, **_: rows[name])
    task = next(task for task in harness.hub_tasks("BRIGHT(v1.1)") if task.metadata.name == "BrightBiologyRetrieval")
    task.load_data()
    assert task.top_ranked["standard"] == {"0": ["a", "b"], "1": ["a", "b", "c"]}


@needs_mteb
def test_hub_errors_are_plain(model_folder, tmp_path):
    with pytest.raises(InputError, match="tasks=NFCorpuss: .*NFCorpus"):
        run(model_folder, "NFCorpuss", tmp_path / "out")
    with pytest.raises(InputError, match="NFCorpus: its data cannot be fetched from the hub"):
        run(model_folder, "NFCorpus", tmp_path / "out")
    with pytest.raises(InputError, match="task SciDocsRR has no published instruction"):
        run(model_folder, "SciDocsRR", tmp_path / "out")


# The real thing


@needs_mteb
@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared evaluation data")
def test_smollm2_on_sts_b(tmp_path):
    scores = run("smollm2-135m", SHARED / "STSBenchmarkTest", tmp_path / "out", "kind=teacher", "attention=causal")
    assert scores["STSBenchmarkTest"]["main_score"] == pytest.approx(0.372, abs=5e-3)
