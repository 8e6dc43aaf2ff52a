"""Records in the form of evaluation: texts after instructions, the same ones at any time, nothing twice."""

import json

import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.experiments.splits import evaluation_texts
from llm2vec_gen_jax.inference.instruct import instruct
from tests.conftest import write_jsonl
from tests.helpers.tasks import write_task

TEXTS = [
    "Bread rises because yeast makes gas. The gas stays in the dough, which grows. Bake it!",
    "Title\nThe river flooded the valley in the spring of that year. Nobody had expected it to.\nshort",
    "bread rises because   yeast makes gas. The gas stays in the dough, which grows. Bake it!",
    "Why?",
    "   ",
]


@pytest.fixture
def settings(tmp_path):
    """settings(**changes): a config for TEXTS, which are in a file."""
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS])
    values = {"input": str(tmp_path / "texts.jsonl"), "output": str(tmp_path / "records.jsonl")}
    return lambda **changes: config.InstructConfig(**values | changes)


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "unit, expected",
    [
        ("text", {TEXTS[0], TEXTS[1], "Why?"}),
        ("passage", {TEXTS[0], TEXTS[1].split("\n")[1]}),
        (
            "sentence",
            {
                "Bread rises because yeast makes gas.",
                "The gas stays in the dough, which grows.",
                "The river flooded the valley in the spring of that year.",
                "Nobody had expected it to.",
            },
        ),
    ],
)
def test_the_answer_is_the_text_and_the_question_the_text_after_an_instruction(settings, tmp_path, unit, expected):
    (tmp_path / "instructions.txt").write_text("Summarize:\n\n")
    rows = rows_of(instruct(settings(unit=unit, instructions=str(tmp_path / "instructions.txt"))))
    assert {row["answer"] for row in rows} == expected and len(rows) == len(expected), "duplicates are left out"
    assert [row["id"] for row in rows] == list(range(len(rows)))
    for row in rows:
        assert row["question"] == ("" if row["id"] % 2 else "Summarize: ") + row["answer"]


def test_long_texts_are_cut_and_texts_of_tasks_are_left_out(settings, tmp_path):
    assert {len(row["answer"].split()) for row in rows_of(instruct(settings(max_words=3)))} == {1, 3}
    write_task(tmp_path / "tasks" / "task", "classification")
    row = json.loads((tmp_path / "tasks" / "task" / "test.jsonl").read_text().splitlines()[0])
    write_jsonl(tmp_path / "texts.jsonl", [{"text": row["text"].upper()}, {"text": "of no task"}])
    rows = rows_of(instruct(settings(overwrite=True), evaluation_texts(tmp_path / "tasks")))
    assert [row["answer"] for row in rows] == ["of no task"]
    long = "A long test text. It has several sentences and\nmore than one line."
    write_jsonl(tmp_path / "tasks" / "task" / "test.jsonl", [row | {"text": long}, row | {"text": "Its own row."}])
    write_jsonl(tmp_path / "texts.jsonl", [{"text": long}, {"text": "It is of no task. Its own row."}])
    excluded = evaluation_texts(tmp_path / "tasks")
    for changes, expected in (({"max_words": 5}, "It is of no task."), ({"unit": "sentence"}, "It is of no task.")):
        rows = rows_of(instruct(settings(overwrite=True, **changes), excluded))
        assert [row["answer"] for row in rows] == [expected]


def test_it_resumes_to_the_same_bytes_wherever_it_is_cut(settings):
    path = instruct(settings(unit="sentence", count=3))
    whole = path.read_bytes()
    assert whole.count(b"\n") == 3
    for cut in (0, 5, whole.index(b"\n") + 1, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert instruct(settings(unit="sentence", count=3)).read_bytes() == whole
    with pytest.raises(InputError, match="holds another run .seed: 0 -> 1"):
        instruct(settings(unit="sentence", count=3, seed=1))
    assert instruct(settings(unit="sentence", count=3, seed=1, overwrite=True)).read_bytes() != whole


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"instructions": "repeated.txt"}, "repeated.txt, line 3: 'a' is repeated"),
        ({"instructions": "empty.txt"}, "instructions=empty.txt: no lines"),
        ({"instructions": "none.txt"}, "none.txt: no such file"),
        ({"instructions": "repeated.txt", "instruction": "b"}, "pass only one of them"),
        ({"count": 4}, "3 distinct texts of at least 1 words .unit=text., count=4 needed"),
        ({"input": "-"}, "input=-"),
        ({"output": "records.txt"}, "must end in .jsonl"),
        ({"field": "body"}, "texts.jsonl, line 1: no column 'body'"),
    ],
)
def test_an_invalid_setting_is_named_and_leaves_no_records(settings, tmp_path, changes, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "repeated.txt").write_text("a\nb\n a\n")
    (tmp_path / "empty.txt").touch()
    with pytest.raises(InputError, match=message):
        instruct(settings(**changes))
    assert not list(tmp_path.glob("records.*"))


def test_other_excluded_texts_are_another_run(settings):
    instruct(settings(), {"why?"})
    with pytest.raises(InputError, match="holds another run .excluded"):
        instruct(settings(), {"why not?"})
