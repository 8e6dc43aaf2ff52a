"""The scripts and the notebook of examples/, and the first snippet of the README, run on the included model."""

import contextlib
import io
import json
import pathlib
import runpy
import sys

import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen
from tests.conftest import one_device_mesh
from tests.helpers.pages import blocks

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLES = {path.stem: path for path in (ROOT / "examples").iterdir() if path.suffix in (".py", ".ipynb")}


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The included model is loaded once for all examples."""
    load, model = LLM2VecGen.from_pretrained, LLM2VecGen.from_pretrained("smollm2-135m", mesh=one_device_mesh())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            LLM2VecGen,
            "from_pretrained",
            lambda path, *more, **options: model if path == "smollm2-135m" else load(path, *more, **options),
        )
        yield


@pytest.fixture
def run(capsys, monkeypatch):
    """run(name, *words) runs a script; returns the lines that it prints."""

    def run_(name, *words):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES[name]), *map(str, words)])
        runpy.run_path(str(EXAMPLES[name]), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return run_


def test_every_example_is_in_the_readme_and_here():
    text = (ROOT / "README.md").read_text()
    assert set(EXAMPLES) == {"search_folder", "cluster_by_answer", "triage_by_references", "published_checkpoint"}
    assert all(f"(examples/{path.name})" in text for path in EXAMPLES.values())


def test_the_search_finds_the_passage_that_answers(run, tmp_path):
    lines = run("search_folder")
    first = [below.split()[1] for line, below in zip(lines, lines[1:]) if line.endswith("?")]
    assert first == ["baking.txt:", "moon.txt:", "sleep.txt:", "history.txt:"]
    (tmp_path / "a.md").write_text("Grass is a plant.\n\nThe sky is blue because air scatters short waves.\n")
    assert "The sky is blue" in run("search_folder", tmp_path, "Why is the sky blue?")[1]


def test_questions_with_the_same_kind_of_answer_share_a_group(run):
    groups = "\n".join(run("cluster_by_answer")).split("group ")[1:]
    questions = [{line.strip() for line in group.splitlines()[1:]} for group in groups]
    assert {"Who wrote Hamlet?", "Which playwright created Romeo and Juliet?"} <= next(
        group for group in questions if "Who is the author of Macbeth?" in group
    )
    assert len(questions) == 4 and all(len(group) == 3 for group in questions)
    assert all(group.splitlines()[0].split(": ")[1] for group in groups)


def test_messages_are_routed_to_the_nearest_answer(run):
    queues = {line[18:].strip(): line.split("  ")[0] for line in run("triage_by_references")}
    assert queues["My shoes are the wrong size, I want my money back."] == "refunds"
    assert queues["Has my package been shipped?"] == "delivery"
    assert queues["What is the capital of France?"] == "(a person)"


def test_the_notebook_runs_and_its_outputs_are_those_that_it_shows():
    notebook = json.loads(EXAMPLES["published_checkpoint"].read_text())
    space: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            with contextlib.redirect_stdout(io.StringIO()) as printed:
                exec("".join(cell["source"]), space)
            shown = "".join(line for output in cell["outputs"] for line in output["text"])
            # The last digit of a cosine may differ between machines.
            assert [part for part in printed.getvalue().split() if "." not in part] == [
                part for part in shown.split() if "." not in part
            ]
    assert space["again"].shape == (4, 576)


def test_the_readme_shows_what_its_first_snippet_prints():
    languages = {language: text for _, language, text in reversed(list(blocks(ROOT / "README.md")))}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(languages["python"], {})
    shown, lines = languages["text"].splitlines(), printed.getvalue().splitlines()
    numbers = [np.array(" ".join(rows[:3]).replace("[", "").replace("]", "").split(), float) for rows in (shown, lines)]
    np.testing.assert_allclose(*numbers, atol=0.02)
    assert shown[3:] == lines[3:]
