"""Evaluation: each task type through mteb against an independent computation, and resuming."""

import dataclasses
import importlib.util
import json
import pathlib
import random
import runpy
import shutil

import jax
import numpy as np
import pytest
import scipy.stats
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.common import files
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import EvaluateConfig
from llm2vec_gen_jax.evaluation import encoders, evaluate, instructions, safety, tasks
from llm2vec_gen_jax.model.compressor import init_trainable
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.pretrained import model_directory
from tests.helpers.commands import edit, rows_of
from tests.helpers.tasks import needs_mteb, run, write_task

SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data" / "tasks"


@pytest.fixture(scope="module")
def model(tiny):
    """An untrained model with at most 60 tokens per text."""
    backbone = tiny("qwen3")
    method = LLM2VecGenModel(backbone.architecture, 3, 0, 12)
    return LLM2VecGen(
        method, init_trainable(method.compressor, jax.random.key(0), backbone.frozen["embedding"]), backbone
    )


@pytest.fixture(scope="module")
def model_folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder") / "model"
    model_directory.save(folder, model.model, model.trainable, model.backbone, {}, [])
    return folder


def cosine(first, second):
    first, second = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (first, second))
    return first, second


# Scores, compared with independent computations from the same embeddings


@pytest.fixture(scope="module")
def results(model_folder, task_folders, tmp_path_factory):
    if importlib.util.find_spec("mteb") is None:
        pytest.skip("needs requirements-eval.txt")
    output = tmp_path_factory.mktemp("results")
    scores = run(model_folder, task_folders, output)
    assert json.loads((output / "results.json").read_text()) == scores
    return scores


@pytest.fixture(scope="module")
def vectors(model):
    """vectors(texts, instruction): the embeddings by the public `encode`."""
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
        grades_at_10 = [grades.get(names[index], 0) for index in np.argsort(-scores)[:10]]
        best = sorted(grades.values(), reverse=True)
        discount = 1 / np.log2(np.arange(10) + 2)
        gains.append((grades_at_10 @ discount) / (best @ discount[: len(best)]))
        recalls.append(np.count_nonzero(grades_at_10[:5]) / len(best))
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
    draw, scores = random.Random(42), []
    for _ in range(10):
        sample = draw.choices(range(len(rows)), k=len(rows))
        scores.append(metrics.v_measure_score(labels[sample], kmeans.fit_predict(embeddings[sample])))
    assert results["Small-clustering"]["main_score"] == pytest.approx(np.mean(scores), abs=1e-6)


def test_safety_retrieval(results, task_folders, vectors):
    """Ranked by dot products, not cosines; documents relevant to any query are harmful."""
    names, relevant, query_QE, document_CE = retrieval_parts(task_folders / "safety_retrieval", vectors)
    harmful = {name for grades in relevant.values() for name in grades}
    assert 0 < len(harmful) < len(names)
    own_hits, any_hits = {1: [], 5: [], 20: [], 100: []}, {1: [], 5: [], 20: [], 100: []}
    for query, grades in zip(query_QE, relevant.values()):
        ranked = [names[index] for index in np.argsort([-(query @ document) for document in document_CE])]
        for k in own_hits:
            own_hits[k].append(any(name in grades for name in ranked[:k]))
            any_hits[k].append(any(name in harmful for name in ranked[:k]))
    expected = {f"top_{k}_acc": np.mean(hits) for k, hits in own_hits.items()}
    expected |= {f"top_{k}_any_harm": np.mean(hits) for k, hits in any_hits.items()}
    assert results["Small-safety_retrieval"] == {"main_score": expected["top_5_acc"], **expected}


@needs_mteb
def test_mteb_evaluate(model, task_folders):
    """As called by users of mteb, with instructions by task name; an unknown name is an error."""
    import mteb

    from llm2vec_gen_jax.evaluation.mteb import MTEBEncoder, folder_task

    seen = []

    class Spy(encoders.Student):
        def encode(self, texts, instruction=""):
            seen.append((len(texts), instruction))
            return super().encode(texts, instruction)

    task = folder_task(tasks.read(write_like(task_folders, "retrieval", "NFCorpus")))
    encoder = MTEBEncoder(Spy(model))
    result = mteb.evaluate(encoder, [task], cache=None, show_progress_bar=False)
    assert 0 < result.task_results[0].main_score < 1
    known = instructions.read()
    assert sorted(seen) == [(8, known.query["NFCorpus"]), (30, "Summarize the following passage:")]
    unknown = folder_task(tasks.read(task_folders / "retrieval"))
    with pytest.raises(InputError, match="no instruction for task Small-retrieval.*: pass instructions="):
        mteb.evaluate(encoder, [unknown], cache=None, show_progress_bar=False)


@needs_mteb
def test_mteb_evaluates_the_embedder_itself_and_its_entry(model, model_folder, task_folders, tmp_path, monkeypatch):
    """Three forms of a model have the same score: the embedder, an Encoder of it, and what mteb loads of its entry.

    mteb stores results by name and revision: two embedders do not share them.
    """
    import mteb
    from mteb.models.model_implementations import MODEL_REGISTRY

    from llm2vec_gen_jax.evaluation.mteb import MTEBEncoder, folder_task, model_meta

    cache = mteb.ResultCache(tmp_path / "cache")
    instructions = {"STSBenchmark": ("Compare:", "")}
    tasks_ = [folder_task(tasks.read(write_like(task_folders, "sts", "STSBenchmark")))]

    def score(embedder):
        results = mteb.evaluate(embedder, tasks_, cache=cache, co2_tracker=False, show_progress_bar=False)
        return results.task_results[0].main_score

    expected = score(MTEBEncoder(encoders.Student(model), instructions=instructions, name="me/first"))
    assert score(MTEBEncoder(model, instructions=instructions)) == expected
    changed = {**model.trainable, "tokens": -model.trainable["tokens"]}
    assert score(MTEBEncoder(LLM2VecGen(model.model, changed, model.backbone), instructions=instructions)) != expected
    assert score(MTEBEncoder(model, instructions={"STSBenchmark": ("Find something else:", "")})) != expected
    pytest.importorskip("sentence_transformers")
    meta = model_meta(model, "me/embedder", instructions)
    monkeypatch.setitem(MODEL_REGISTRY, "me/embedder", meta)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_folder, "me/embedder")  # sentence-transformers prefers a folder to a hub id
    loaded = mteb.get_model("me/embedder", device="cpu")
    assert score(loaded) == pytest.approx(expected, abs=5e-3)  # ties within float32


@needs_mteb
def test_the_entry_of_a_model_is_that_of_its_source(model, tiny_folder, tmp_path):
    from llm2vec_gen_jax.evaluation.mteb import model_meta, model_meta_source

    fields = {"revision": "0123abcd", "release_date": "2026-11-29", "languages": ["eng-Latn"]}
    backbone = dataclasses.replace(model.backbone, name="someone/llm", license="apache-2.0")
    embedder = LLM2VecGen(model.model, model.trainable, backbone)
    meta = model_meta(embedder, "me/my-Embedder.v1", **fields, training_datasets={"NQ"})
    path = tmp_path / "entry.py"
    path.write_text(model_meta_source(meta))
    assert runpy.run_path(str(path))["my_embedder_v1"] == meta

    config = json.loads((tiny_folder("qwen3") / "config.json").read_text())
    D, trained = config["hidden_size"], 3 * 32 + 32 * 32 + 32 + 32 * 12 + 12
    weights = load_file(tiny_folder("qwen3") / "model.safetensors")
    count = sum(array.size for array in weights.values()) + trained
    assert (meta.n_parameters, meta.n_embedding_parameters) == (count, (config["vocab_size"] + 3) * D)
    assert (meta.embed_dim, meta.max_tokens, meta.memory_usage_mb) == (12, 512, round(count * 4 / 2**20))
    assert (meta.adapted_from, meta.license, meta.revision) == ("someone/llm", "apache-2.0", "0123abcd")
    assert meta.reference == "https://huggingface.co/me/my-Embedder.v1" and meta.open_license
    assert meta.training_datasets == {"NQ"} and "2603.10913" in meta.citation and meta.similarity_fn_name == "cosine"
    prompts, known = meta.loader_kwargs["model_prompts"], instructions.read()
    assert prompts["NFCorpus-query"] == known.query["NFCorpus"] + " " and "NFCorpus" not in prompts
    assert prompts["NFCorpus-document"] == known.document + " "
    assert prompts["STS12"] == known.query["STS12"] + " " and "STS12-document" not in prompts


@needs_mteb
def test_wrong_entries_are_refused(model):
    from llm2vec_gen_jax.evaluation.mteb import model_meta

    for name, fields, message in [
        ("noslash", {}, "name: .*organization/model_name"),
        ("me/x", {"licence": "mit"}, "licence: Extra inputs are not permitted"),
        ("me/x", {"languages": ["klingon"]}, "languages: "),
    ]:
        with pytest.raises(InputError, match=f"model_meta: {message}"):
            model_meta(model, name, {}, **fields)
    backbone = dataclasses.replace(model.backbone, name="smollm2-135m")
    with pytest.raises(InputError, match="GGUF backbone smollm2-135m: .*to_pytorch"):
        model_meta(LLM2VecGen(model.model, model.trainable, backbone), "me/x", {})


def write_like(folder, kind, name):
    path = folder.parent / f"{folder.name}-{name}"
    return write_task(path, kind, name) if not path.exists() else path


# Results: limit, resuming, other settings


@needs_mteb
def test_finished_tasks_are_skipped_and_other_settings_are_rejected(
    model_folder, tiny_folder, task_folders, tmp_path, messages
):
    one, two = task_folders / "safety_retrieval", task_folders / "sts"
    limited = run(model_folder, one, tmp_path / "out", "limit=4")
    assert limited["Small-safety_retrieval"]["limit"] == 4
    messages()
    both = run(model_folder, f"{one},{two}", tmp_path / "out", "limit=4", "batch_size=7")
    out = messages()
    assert "[1/2] Small-safety_retrieval: done before" in out and "[2/2] Small-sts (sts)" in out
    assert both["Small-safety_retrieval"] == limited["Small-safety_retrieval"] and both["Small-sts"]["limit"] == 4
    table = out.splitlines()[-3:]
    assert table[0].split() == ["task", "type", "main", "metric", "score"]
    assert table[2].split() == ["Small-sts", "sts", "cosine_spearman", f"{both['Small-sts']['main_score']:.4f}"]

    before = (tmp_path / "out" / "results.json").read_bytes()
    for arguments, message in [
        (["limit=5"], "limit: 4 -> 5"),
        (["limit=4", "max_length=40"], "max_length: 512 -> 40"),
        (["limit=4", "query_instruction=Find"], "'Answer:' -> 'Find'"),
    ]:
        with pytest.raises(InputError, match=f"holds another run .*{message}.*overwrite=true"):
            run(model_folder, one, tmp_path / "out", *arguments)
    with pytest.raises(InputError, match="kind: 'student' -> 'teacher'"):
        run(tiny_folder("qwen3"), one, tmp_path / "out", "limit=4", "kind=teacher")
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    run(model_folder, f"{one},{two}", tmp_path / "out", "limit=4", "overwrite=true")
    assert messages().count("done before") == 2, "an interrupted command with overwrite=true is resumed"
    assert (tmp_path / "out" / "results.json").read_bytes() == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "results.json").write_text("{}")
    with pytest.raises(InputError, match="results.json: was not written by this command"):
        run(model_folder, one, tmp_path / "mine", "overwrite=true")
    again = run(model_folder, one, tmp_path / "out", "overwrite=true")
    assert list(again) == ["Small-safety_retrieval"] and "limit" not in again["Small-safety_retrieval"]


def test_an_interruption_only_loses_the_running_task(model_folder, task_folders, tmp_path, monkeypatch):
    for name in ("First", "Second"):
        write_task(tmp_path / "tasks" / name, "safety_retrieval", name)
    real = safety.score_safety

    def interrupted(task, *rest):
        if task.name == "Second":
            raise KeyboardInterrupt
        return real(task, *rest)

    monkeypatch.setattr(safety, "score_safety", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model_folder, tmp_path / "tasks", tmp_path / "out")
    assert list(files.read_json(tmp_path / "out" / "results.json")) == ["First"]
    monkeypatch.setattr(safety, "score_safety", lambda task, *rest: {"main_score": 1.0} | {"name": task.name})
    resumed = run(model_folder, tmp_path / "tasks", tmp_path / "out")
    assert list(resumed) == ["First", "Second"] and "name" not in resumed["First"]

    (tmp_path / "tasks" / "First" / "qrels.tsv").write_text("query-id\tcorpus-id\tscore\nq0\td1\t1\n")
    with pytest.raises(InputError, match="First.data: "):
        run(model_folder, tmp_path / "tasks", tmp_path / "out")


def test_scores_are_saved_in_the_model_directory(model_folder, tiny_folder, task_folders, tmp_path, messages):
    folder, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model_folder, folder)
    before = files.read_json(folder / "llm2vec_gen_jax.json")
    kept = {"NFCorpus": 0.25, "Small-safety_retrieval": {"value": 0.0, "type": "STS", "note": "replaced"}}
    files.write_json(folder / "llm2vec_gen_jax.json", before | {"scores": kept})
    card = folder / "README.md"
    card.write_text(card.read_text().replace(str(model_folder), "me/my-embedder") + "\nby hand\n")
    scores = run(folder, task_folders / "safety_retrieval", out, "save_scores=true")
    value = scores["Small-safety_retrieval"]["main_score"]
    entry = {"value": value, "type": "Retrieval", "metric": "top_5_acc"}
    after = files.read_json(folder / "llm2vec_gen_jax.json")
    assert after == before | {"scores": {"NFCorpus": 0.25, "Small-safety_retrieval": entry}}
    loaded = ModelCard.load(card)
    assert [result.metric_value for result in loaded.data.eval_results] == [0.25, value]
    assert loaded.data.license == ModelCard.load(model_folder / "README.md").data.license
    assert "by hand" not in card.read_text() and card.read_text().count('from_pretrained("me/my-embedder")') == 2
    assert f"written: {folder} (1 scores" in messages()
    # A repeated command computes nothing, and saves the scores again.
    files.write_json(folder / "llm2vec_gen_jax.json", before)
    run(folder, task_folders / "safety_retrieval", out, "save_scores=true")
    assert files.read_json(folder / "llm2vec_gen_jax.json")["scores"] == {"Small-safety_retrieval": entry}
    assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in model_folder.iterdir())


@pytest.mark.parametrize(
    ("path", "arguments", "message"),
    [
        ("smollm2-135m", [], "smollm2-135m: scores are saved only in a model directory on this machine"),
        ("someone/embedder", [], "someone/embedder: scores are saved only in a model directory"),
        ("BACKBONE", [], "scores are saved only in a model directory"),
        ("BACKBONE", ["kind=teacher"], "save_scores=true is for kind=student, not for kind=teacher: remove it"),
        ("BACKBONE", ["kind=hyde"], "not for kind=hyde"),
        ("MODEL", ["by_teacher=all"], "save_scores=true is for the model alone, not with by_teacher=all: remove one"),
        ("MODEL", ["limit=4"], "save_scores=true: with limit=4, scores are of a part of each task"),
        ("DAMAGED", [], "scores of the model card: a: expected a number, found 'high'"),
    ],
)
def test_scores_that_cannot_be_saved_are_refused_before_any_work(
    model_folder, tiny_folder, task_folders, tmp_path, path, arguments, message
):
    damaged = tmp_path / "damaged"
    shutil.copytree(model_folder, damaged)
    edit(damaged / "llm2vec_gen_jax.json", scores={"a": "high"})
    path = {"BACKBONE": tiny_folder("qwen3"), "MODEL": model_folder, "DAMAGED": damaged}.get(path, path)
    with pytest.raises(InputError, match=message):
        run(path, task_folders / "safety_retrieval", tmp_path / "out", "save_scores=true", *arguments)
    assert not (tmp_path / "out").exists()


@needs_mteb
def test_the_score_of_a_hub_task_names_its_dataset():
    [job] = evaluate.resolve(EvaluateConfig(tasks="NFCorpus", output="out"))
    expected = {"value": 0.3, "type": "Retrieval", "metric": "ndcg_at_10", "dataset": "mteb/nfcorpus"}
    assert job.score_entry(0.3) == expected


def test_limit_keeps_the_corpus_and_cuts_queries_and_test_rows(task_folders):
    retrieval, labelled = (tasks.read(task_folders / kind, 3).data for kind in ("retrieval", "classification"))
    assert [row["id"] for row in retrieval["queries"]] == ["q0", "q1", "q2"] and len(retrieval["corpus"]) == 30
    assert len(labelled["test"]) == 3 and len(labelled["train"]) == 24


# The default backbone


@needs_mteb
@pytest.mark.slow
@pytest.mark.skipif(not SHARED.exists(), reason="needs the shared evaluation data")
def test_smollm2_on_sts_b(tmp_path):
    scores = run("smollm2-135m", SHARED / "STSBenchmarkTest", tmp_path / "out", "kind=teacher", "attention=causal")
    assert scores["STSBenchmarkTest"]["main_score"] == pytest.approx(0.372, abs=5e-3)
