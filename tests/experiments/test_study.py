"""The study: all stages on a tiny LLM, resuming after a kill, splits, and tables checked against manual calculation."""

import importlib.util
import json
import math
import time

import numpy as np
import pytest

from llm2vec_gen_jax.common import files, jsonl
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import ReproduceConfig, TrainConfig, options
from llm2vec_gen_jax.evaluation import tasks
from llm2vec_gen_jax.experiments import comparisons, plots, reproduce, splits, tables, text_metrics
from llm2vec_gen_jax.teachers import encoder
from llm2vec_gen_jax.training.train import train
from tests.conftest import tiny_torch_model, torch_outputs, write_jsonl
from tests.helpers.adapters import LORA, write_adapter
from tests.helpers.commands import rows_of
from tests.helpers.tasks import TYPES, needs_mteb, write_task

SIZES = {
    "queries": 8,
    "held_out": 3,
    "max_new_tokens": 12,
    "steps": 3,
    "schedule_steps": 3,
    "ablation_steps": 2,
    "batch_size": 8,
    "seeds": 2,
    "limit": 6,
    "documents": 0,
    "hyde_limit": 4,
    "hyde_tokens": 8,
    "decoded_tokens": 8,
    "timed": 2,
}


@pytest.fixture(scope="module")
def task_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    for kind in TYPES:
        write_task(folder / kind, kind)
    write_task(folder / "dev", "sts", "SmallDev")
    for name in ("queries", "corpus"):  # make the texts different from those of other tasks
        file = folder / "safety_retrieval" / f"{name}.jsonl"
        write_jsonl(file, [row | {"text": f"forbidden {row['text'].strip()}"} for row in rows_of(file)])
    return folder


@pytest.fixture(scope="module")
def arguments(tiny_folder, tmp_path_factory):
    """Arguments of a study of the tiny LLM, without tasks and output."""
    folder = tmp_path_factory.mktemp("teacher")
    adapter = write_adapter(folder / "adapter", LORA, {(layer, "mlp.up_proj"): 4 for layer in range(3)})
    rows = [{"question": f"question {number} of {number * number}?"} for number in range(11)]
    queries = write_jsonl(folder / "queries.jsonl", rows)
    sizes = [f"sizes.{name}={value}" for name, value in SIZES.items()]
    return [f"backbone.path={tiny_folder('qwen2')}", f"teacher.adapters=[{adapter}]", f"queries={queries}", *sizes]


def study(arguments, tasks, output, *overrides):
    """Runs a study; returns its output folder and the text of its report."""
    loaded = options.load(ReproduceConfig, None, [*arguments, f"tasks={tasks}", f"output={output}", *overrides])
    return output, reproduce.reproduce(loaded).read_text()


# All stages


@pytest.fixture(scope="module")
def finished(arguments, task_folders, tmp_path_factory):
    if importlib.util.find_spec("mteb") is None:
        pytest.skip("needs requirements-eval.txt")
    overrides = ["comparisons=[budget, centred-cosine, sampled-4, 'mine: loss.alignment=2 compression.num_tokens=2']"]
    return study(arguments, task_folders, tmp_path_factory.mktemp("study"), *overrides)


def table(output, name):
    return files.read_json(output / "tables" / f"{name}.json")


def test_headline_matches_the_scores(finished):
    output, report = finished
    rows = {row["category"]: row for row in table(output, "headline")["rows"]}
    assert list(rows)[:5] == list(tables.CATEGORIES) and len(rows) == 6
    students = [files.read_json(output / "scores/test" / f"base-3-{seed}-6/results.json") for seed in (0, 1)]
    teacher = files.read_json(output / "scores/test/teacher-6/results.json")
    first, second = (results["Small-retrieval"]["main_score"] for results in students)
    result = rows["retrieval"]
    assert result["student"] == pytest.approx((first + second) / 2)
    assert result["deviation"] == pytest.approx(abs(first - second) / math.sqrt(2))
    assert result["teacher"] == teacher["Small-retrieval"]["main_score"]
    assert result["teacher"] != result["causal"], "the adapter is merged"
    assert "## Student against teacher" in report and f"{result['student']:.4f}" in report


def test_every_measurement_has_a_table(finished):
    output, report = finished
    runs = {row["run"]: row for row in table(output, "comparisons")["rows"]}
    trained = ["base", "alignment-only", "reconstruction-only", "tokens-1", "centred-cosine", "sampled-4", "mine"]
    assert list(runs) == [*trained, "teacher", "causal"]
    assert [runs[name]["tokens"] for name in trained] == [10, 10, 10, 1, 10, 10, 2]
    assert runs["alignment-only"]["reconstruction_loss"] == 0 < runs["base"]["reconstruction_loss"]
    assert 0 <= runs["centred-cosine"]["alignment_loss"] <= 2 != runs["base"]["alignment_loss"]
    sampled = jsonl.read_jsonl(output / "sampled-4.jsonl")
    assert {row["sample"] for _, row in sampled} == {0, 1, 2, 3}, "four responses to each query"
    assert set(runs["base"]) >= {"sts", "classification", "retrieval", "mean"}
    assert "clustering" not in runs["base"] and "safety_retrieval" not in runs["base"]
    hyde_table = table(output, "hyde")
    assert "first 4 queries" in hyde_table["note"] and all(row["seconds"] > 0 for row in hyde_table["rows"])
    reconstruction = {row["from"]: row for row in table(output, "reconstruction")["rows"]}
    assert list(reconstruction) == ["the response itself", "with reconstruction loss", "without"]
    itself = reconstruction["the response itself"]
    with_words = 1 - itself["empty"] / itself["texts"]
    assert itself["token_f1"] == itself["rouge_l"] == pytest.approx(with_words)
    assert itself["teacher_cosine"] == pytest.approx(1)
    assert itself["perplexity"] > 1 and itself["teacher_cosine_shuffled"] < 1
    assert len(table(output, "examples")["rows"]) == itself["texts"]
    refusals = table(output, "refusals-Small-safety_retrieval")["rows"]
    assert len(refusals) == 4 and {row["texts"] for row in refusals} == {6}
    assert all(row["seconds"] > 0 for row in table(output, "cost")["rows"])
    assert "top_5_any_harm" in report
    seconds = [files.read_json(marker)["seconds"] for marker in (output / "stages").iterdir()]
    assert min(seconds) >= 0 and f"took {sum(seconds) / 60:.0f} minutes" in report


def test_texts_of_safety_tasks_are_not_stored(finished):
    """The splits of safety tasks are symlinks; no other file contains their texts."""
    output, _ = finished
    texts = [row["text"] for name in ("queries", "corpus") for row in rows_of(_safety(output) / f"{name}.jsonl")]
    for file in output.rglob("*"):
        if file.suffix in (".json", ".jsonl", ".md", ".yaml") and not file.is_symlink():
            written = file.read_text()
            assert not any(text.strip() in written for text in texts), file


def _safety(output):
    return output / "tasks" / "test" / "safety_retrieval"


def test_held_out_and_test_data_are_separate(finished):
    output, _ = finished
    train, held_out = (rows_of(output / f"{name}.jsonl") for name in ("train", "held_out"))
    assert len(train) == 8 and len(held_out) == 3
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    compared = {path.name for path in (output / "scores/test").iterdir()}
    assert compared == {"base-3-0-6", "base-3-1-6", "teacher-6", "causal-6", "base-3-0-4", "teacher-4", "hyde-4"}


def test_finished_stages_are_skipped_and_comparisons_can_be_added(finished, arguments, task_folders, capsys):
    output, report = finished
    before = {file: file.stat().st_mtime_ns for file in (output / "scores").rglob("*.json")}
    _, again = study(arguments, task_folders, output, "comparisons=[budget, centred-cosine]")
    assert again.splitlines()[:5] == report.splitlines()[:5]
    printed = capsys.readouterr().out.splitlines()
    names = {path.stem for path in (output / "stages").iterdir()}
    expected = {name for name in names if "mine" not in name and "sampled" not in name}
    assert {line.removesuffix(": done before") for line in printed} & names == expected
    assert before == {file: file.stat().st_mtime_ns for file in (output / "scores").rglob("*.json")}
    with pytest.raises(InputError, match="holds another run .sizes.steps: 3 -> 4"):
        study(arguments, task_folders, output, "sizes.steps=4")


@needs_mteb
def test_plots_are_drawn(finished, tmp_path):
    pytest.importorskip("matplotlib")
    output, report = finished
    assert (output / "plots/headline.png").read_bytes().startswith(b"\x89PNG")
    assert "![headline](plots/headline.png)" in report
    assert {path.stem for path in plots.draw({"cost": table(output, "cost")}, tmp_path)} == {"cost"}


@pytest.mark.slow
def test_a_killed_study_resumes(arguments, tmp_path, launch):
    """A process that is killed during training. Without tasks of mteb."""
    write_task(tmp_path / "tasks" / "safety", "safety_retrieval")
    command = [*arguments, "tasks=tasks", "output=study", "sizes.steps=4", "comparisons=[]", "sizes.seeds=1"]
    killed = launch(tmp_path, "reproduce", *command)
    metrics = tmp_path / "study/runs/base-4-0/metrics.jsonl"
    while not metrics.exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.kill()
    killed.communicate()
    assert metrics.exists() and not (tmp_path / "study/report.md").exists()
    responses = (tmp_path / "study/train.jsonl").read_bytes()
    again = launch(tmp_path, "reproduce", *command)
    out, errors = again.communicate()
    assert again.returncode == 0, errors[-2000:]
    for name in ("tasks", "queries", "respond-train", "respond-held_out"):
        assert f"{name}: done before" in out
    assert out.splitlines()[-1] == "written: study/report.md"
    assert (tmp_path / "study/train.jsonl").read_bytes() == responses
    assert len(rows_of(metrics)) == 4


@pytest.mark.parametrize("name", ["forms", "alternating", "query-0.5"])
def test_comparisons_beyond_the_paper_train(tiny_folder, tmp_path, name):
    rows = [{"question": f"What is {number}?", "answer": f"It is {number}."} for number in range(16)]
    write_jsonl(tmp_path / "responses.jsonl", rows)
    words = [f"backbone.path={tiny_folder('llama')}", f"data.responses={tmp_path / 'responses.jsonl'}"]
    words += ["train.steps=1", "train.batch_size=8", f"train.output={tmp_path / 'run'}"]
    words += comparisons.EXTRA_COMPARISONS[name]
    train(options.load(TrainConfig, None, words), show_progress=False)
    losses = comparisons.final_losses(tmp_path / "run")
    assert ("repeat_alignment_loss" in losses) == (name == "forms") and math.isfinite(losses["loss"])


# Bad input


@pytest.mark.parametrize(
    "argument, expected",
    [
        ("comparisons=[cosin]", "comparisons=cosin.*'cosine'"),
        ("comparisons=['cosine: loss.alignment=2']", "comparisons=cosine: loss"),
        ("comparisons=['mine: loss.alignmnt=2']", "'loss.alignment'"),
        ("comparisons=[supervised-teacher]", "needs supervised_teacher="),
        ("recipe=[train.stepz=2]", "'train.steps'"),
        ("teacher.kind=file", "remove teacher.kind"),
        ("sizes.queries=0", "sizes.queries"),
        ("budget=hour", "'hours'"),
        ("tasks=null", "tasks is needed"),
    ],
)
def test_bad_settings_fail_before_any_work(arguments, task_folders, tmp_path, argument, expected):
    with pytest.raises(InputError, match=expected):
        study(arguments, task_folders, tmp_path / "study", argument)
    assert not (tmp_path / "study").exists() or not any(tmp_path.joinpath("study").glob("[!.]*"))


def test_a_folder_with_other_files_is_rejected(arguments, task_folders, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds thesis.txt, which is not part of a study"):
        study(arguments, task_folders, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"thesis.txt"}


# Splits


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
    for name in ("Small-retrievalDevelopment", "Small-retrieval"):
        original, cut = originals[name.removesuffix("Development")].data, views[name].data
        corpus_ids = {row["id"] for row in cut["corpus"]}
        query_ids = [row["id"] for row in cut["queries"]][:2]
        judged = {document for query in query_ids for document in original["qrels"][query]}
        assert len(query_ids) == 2 and judged <= corpus_ids < {row["id"] for row in original["corpus"]}
        assert len(corpus_ids) == max(3, len(judged))
    assert (tmp_path / "test/safety_retrieval/corpus.jsonl").is_symlink(), "no text of a safety task is copied"
    for name in ("Small-classificationDevelopment", "Small-classification"):
        labels = [row["label"] for row in views[name].data["train"]]
        assert len(labels) == 3 and len(set(labels)) == min(3, len({row["label"] for row in views[name].data["test"]}))


def _read(folder):
    return [tasks.read(place) for place in tasks.find(folder)]


def test_texts_of_tasks_are_no_training_queries(arguments, tmp_path):
    write_task(tmp_path / "tasks" / "sts", "sts")
    sentence = rows_of(tmp_path / "tasks/sts/test.jsonl")[3]["sentence2"]
    questions = [f"new {number}" for number in range(11)]
    rows = [{"question": question} for question in [f"  {sentence.upper()}", *questions, "new 0"]]
    queries = write_jsonl(tmp_path / "queries.jsonl", rows)
    overrides = [
        f"tasks={tmp_path / 'tasks'}",
        f"output={tmp_path / 'study'}",
        f"queries={queries}",
        "sizes.held_out=4",
    ]
    (tmp_path / "study").mkdir()
    instance = reproduce.Study(options.load(ReproduceConfig, None, [*arguments, *overrides]))
    instance._choose_queries(str(queries))
    train, held_out = (rows_of(tmp_path / f"study/{name}.queries.jsonl") for name in ("train", "held_out"))
    assert [row["question"] for row in train] == questions[:8]
    assert [row["question"] for row in held_out] == questions[8:], "a repetition of one to train on is not held out"


# Decoded text


def test_overlap_metrics():
    text, reference = "The cat sat, on the mat!", "the mat on the cat"
    assert text_metrics.token_f1(text, reference) == pytest.approx(2 * 5 / (6 + 5))
    assert text_metrics.rouge_l(text, reference) == pytest.approx(
        2 * 3 / (6 + 5)
    )  # "on the" or "the ... the mat": the, on, the
    assert text_metrics.token_f1("", "a") == text_metrics.rouge_l("a", "") == text_metrics.rouge_l("a", "b") == 0
    assert text_metrics.distinct_bigrams("a b a b a") == 0.5 and text_metrics.distinct_bigrams("a") is None


def test_perplexity_matches_torch(tiny):
    import torch

    backbone, model = tiny("qwen2"), tiny_torch_model("qwen2")
    texts = ["A cat.", "x", "", "a longer text than others, with words"]
    sums, counts = text_metrics.nll(backbone, texts, 30)
    ids = backbone.tokenizer.encode(texts, 30)
    for row, (_, logits) in enumerate(torch_outputs(model, [ids[0], ids[3]])):
        text = (0, 3)[row]
        log = torch.log_softmax(torch.tensor(logits), dim=-1).numpy()
        expected = -sum(log[place, token] for place, token in enumerate(ids[text][1:]))
        assert sums[text] == pytest.approx(expected, rel=1e-4) and counts[text] == len(ids[text]) - 1
    assert sums[1] == sums[2] == counts[1] == counts[2] == 0
    teacher = encoder.Teacher(backbone, backbone.frozen, True)
    result = text_metrics.measure(texts, texts, backbone, teacher, 30)
    assert result["perplexity"] == pytest.approx(math.exp(sums.sum() / counts.sum()))
    assert result["empty"] == 1 and result["texts"] == 4


@pytest.mark.parametrize(
    "text, expected",
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("i CANNOT do this", True),
        ("As an AI, I have no opinion.", True),
        ("As an example, take two eggs.", False),
        ("Sorry is a short word.", False),
        ("", False),
    ],
)
def test_refusals(text, expected):
    assert text_metrics.is_refusal(text) == expected


# Tables


TASK_TYPES = {"A": "sts", "B": "classification", "C": "classification", "S": "safety_retrieval"}


def results(*scores):
    return {name: {"main_score": score} for name, score in zip(TASK_TYPES, scores)}


def test_headline_table():
    students = [results(0.6, 0.5, 0.7, 0.2), results(0.8, 0.6, 0.8, 0.4)]
    baselines = {"causal": results(0.1, 0.1, 0.3, 0.9), "teacher": results(0.5, 0.5, 0.5, 0.6)}
    result = tables.headline(students, baselines, TASK_TYPES)
    sts, classification, safety, average = result.rows
    assert sts == {
        "category": "sts",
        "causal": 0.1,
        "teacher": 0.5,
        "student": pytest.approx(0.7),
        "deviation": pytest.approx(math.sqrt(0.02)),
        "gain": pytest.approx(40),
    }
    assert classification["student"] == pytest.approx(0.65) and classification["gain"] == pytest.approx(30)
    assert classification["causal"] == pytest.approx(0.2)
    assert safety["gain"] == pytest.approx(-50)
    assert average == {"category": "average relative gain, without safety", "gain": pytest.approx(35)}
    lines = result.markdown().splitlines()
    assert lines[0] == "## Student against teacher"
    assert "| sts | 0.1000 | 0.5000 | 0.7000 | 0.1414 | 40.0000 |" in lines
    assert lines[-1] == "| average relative gain, without safety | – | – | – | – | 35.0000 |"


def test_undefined_scores():
    students, baselines = [results(None, 0.5, 0.7, 0.2)], {"teacher": results(0.5, 0.5, 0.5, 0.0)}
    result = tables.headline(students, baselines, TASK_TYPES)
    assert [row["category"] for row in result.rows[:-1]] == ["classification", "safety_retrieval"]
    assert result.rows[0]["deviation"] is None and result.rows[1]["gain"] is None
    assert tables.by_category({"A": {"main_score": 1.0}}, TASK_TYPES) == {"sts": 1.0}


def test_other_tables():
    runs = {"base": results(0.6, 0.5, 0.7, 0.2), "tokens-1": results(0.4, 0.2, 0.4, 0.1)}
    types = {name: kind for name, kind in TASK_TYPES.items() if name != "S"}
    result = tables.comparisons(runs, types, {"base": {"tokens": 10, "alignment_loss": 1.5}})
    assert [row["mean"] for row in result.rows] == [pytest.approx(0.6), pytest.approx(0.35)]
    assert result.rows[0]["tokens"] == 10 and result.rows[1]["tokens"] is None
    answered = results(0.1, 0.2, 0.4, 0.3)
    for number, scores in enumerate(answered.values()):
        scores["generation_seconds_per_query"] = float(number)
    rows = tables.hyde({"teacher": runs["base"], "hyde": answered}, TASK_TYPES, 0).rows
    assert [(row["hyde"], row["seconds"]) for row in rows] == [(0.1, 0.0), (pytest.approx(0.3), 1.5), (0.3, 3.0)]
    assert np.isclose(rows[1]["teacher"], 0.6)
    text = tables.Table("T", "", {"a": "A"}, [{"a": "x | y\nz"}, {"a": 123.456}, {}]).markdown()
    assert text.splitlines()[2:] == ["| A |", "| --- |", "| x \\| y z |", "| 123.5 |", "| – |"]
