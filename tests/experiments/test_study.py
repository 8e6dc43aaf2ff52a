"""The study: all stages on a tiny LLM, resuming after a kill, and bad input."""

import importlib.util
import math
import time

import pytest

from llm2vec_gen_jax.common import files, jsonl
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import ReproduceConfig, TrainConfig, options
from llm2vec_gen_jax.experiments import comparisons, plots, reproduce, tables
from llm2vec_gen_jax.training.train import train
from tests.conftest import write_jsonl
from tests.helpers.commands import rows_of
from tests.helpers.tasks import needs_mteb, write_task


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
    # The comparisons have as many steps as the headline run, whose first seed is their base.
    assert {path.name for path in (output / "runs").iterdir()} == {f"{name}-3-0" for name in trained} | {"base-3-1"}
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


@needs_mteb
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
        ("tasks=null", "tasks is required"),
    ],
)
def test_bad_settings_fail_before_any_work(arguments, task_folders, tmp_path, argument, expected):
    with pytest.raises(InputError, match=expected):
        study(arguments, task_folders, tmp_path / "study", argument)
    assert not (tmp_path / "study").exists() or not any(tmp_path.joinpath("study").glob("[!.]*"))


@needs_mteb
def test_a_task_that_is_too_small_to_be_split_is_named_before_any_work(arguments, tmp_path):
    task = write_task(tmp_path / "tasks" / "few", "classification")
    rows = {row["label"]: row for row in rows_of(task / "train.jsonl")}
    write_jsonl(task / "train.jsonl", rows.values())  # one of each label: none is left for the test rows
    with pytest.raises(InputError, match="development/few/test.jsonl: no rows"):
        study(arguments, tmp_path / "tasks", tmp_path / "study")
    assert not (tmp_path / "study" / "train.jsonl").exists()


@needs_mteb
def test_a_folder_with_other_files_is_rejected(arguments, task_folders, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds thesis.txt, which is not part of a study"):
        study(arguments, task_folders, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == {"thesis.txt"}
