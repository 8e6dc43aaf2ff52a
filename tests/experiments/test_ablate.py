"""Ablations: one run per config, resumed or skipped, and one table of all runs."""

import json
import pathlib

import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.experiments.ablate import ablate, table
from llm2vec_gen_jax.training.metrics import read_metrics
from tests.conftest import write_jsonl

ABLATIONS = sorted((pathlib.Path(__file__).parents[2] / "configs/ablations").glob("*.yaml"))


@pytest.fixture
def run(tmp_path, tiny_folder, monkeypatch):
    """run(*file names) runs `python -m launch.ablate FILES ...` and returns the cells of the table."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")  # the table is not split
    rows = [{"question": f"question {number}", "answer": f"answer {number}"} for number in range(8)]
    write_jsonl(tmp_path / "responses.jsonl", rows)
    (tmp_path / "other").mkdir()
    for name, text in (
        ("aligned.yaml", "loss: {reconstruction: 0.0}"),
        ("repeated.yaml", "loss: {repeat: 1.0}\ncompression: {num_tokens: 2}"),
        ("other/aligned.yaml", "{}"),
    ):
        (tmp_path / name).write_text(text)
    arguments = [f"backbone.path={tiny_folder('qwen3')}", "data.responses=responses.jsonl", "train.output=runs"]

    def start(*files, steps=2):
        overrides = [*arguments, f"train.steps={steps}", "train.batch_size=8"]
        configs = [options.load(config.AblateConfig, file, overrides) for file in files]
        return [line.split() for line in ablate(files, configs, show_progress=False).splitlines()]

    return start


def test_table_of_all_runs(run, messages):
    rows = run("aligned.yaml", "repeated.yaml")
    assert rows[0] == ["run", "step", "loss", "alignment_loss", "reconstruction_loss", "repeat_alignment_loss"]
    assert [row[:2] for row in rows[1:]] == [["aligned", "2"], ["repeated", "2"]]
    last = read_metrics(pathlib.Path("runs/repeated"))[-1]
    assert rows[2][2:] == [f"{last[name]:.4f}" for name in rows[0][2:]]
    assert float(rows[1][4]) == 0 and rows[1][5] == "-"
    messages()
    results = {"STS": {"main_score": 0.51234, "pearson": 0.5}, "Constant": {"main_score": None}}
    pathlib.Path("runs/aligned/results.json").write_text(json.dumps(results))
    again = run("aligned.yaml", "repeated.yaml")
    assert messages().count("already finished") == 2
    assert [row[:6] for row in again] == rows
    assert [row[6] for row in again] == ["STS", "0.5123", "-"]


def test_a_run_without_steps_is_in_the_table(tmp_path):
    """Such as one that solves the alignment head only."""
    assert [line.split() for line in table([tmp_path / "solved"]).splitlines()] == [["run", "step"], ["solved", "0"]]


def test_an_ablation_resumes(run, messages):
    run("aligned.yaml")
    run("aligned.yaml", "repeated.yaml", steps=3)
    out = messages()
    assert "resuming runs/aligned at step 2" in out and "resuming runs/repeated" not in out
    assert table([pathlib.Path("runs/aligned")]).splitlines()[1].split()[1] == "3"


def test_config_files_with_the_same_name_are_rejected(run):
    with pytest.raises(InputError, match="other/aligned.yaml: another config file has the same name"):
        run("aligned.yaml", "other/aligned.yaml")
    assert not pathlib.Path("runs").exists()


def test_the_papers_ablations_differ_and_open_with_their_command():
    """Except for the baseline, which all comparisons include, and 20 tokens, which are part of two comparisons."""
    files = [*ABLATIONS, ABLATIONS[0].parent.parent / "qwen3-4b.yaml"]
    same = {}
    for file in files:
        same.setdefault(options.to_yaml(options.load(config.TrainConfig, file)), []).append(file.stem)
    expected = [["responses-self", "teacher-self", "tokens-10", "qwen3-4b"], ["thoughts-0", "tokens-20"]]
    assert [names for names in same.values() if len(names) > 1] == expected
    for file in ABLATIONS:
        expected = f"# python -m launch.train configs/ablations/{file.name} train.output=runs/ablations/{file.stem}"
        assert file.read_text().splitlines()[0] == expected
