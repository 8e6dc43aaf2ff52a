"""The tables of a study, checked against manual calculation."""

import math

import numpy as np
import pytest

from llm2vec_gen_jax.experiments import tables

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
    result = tables.comparisons(runs, types, {"base": {"tokens": 10, "alignment_loss": 1.5}}, 100)
    assert "100 queries or test rows" in result.note and "up to 0.10" in result.note
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
