"""Tables and paragraphs at the width of the terminal."""

import pathlib

import pytest

from llm2vec_gen_jax.common import terminal
from llm2vec_gen_jax.experiments import quickstart
from llm2vec_gen_jax.lens.tables import logit_table, neighbor_table


@pytest.fixture(params=[60, 80, 120])
def width(request, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(request.param))
    return request.param


def fits(text, width):
    return max(map(len, text.splitlines())) <= width


def test_a_wide_table_is_split_and_repeats_its_first_column(width):
    rows = [[f"row {number}", *(f"cell {number}.{column}" for column in range(30))] for number in range(3)]
    text = terminal.align_columns(rows)
    assert fits(text, width)
    blocks = [block.splitlines() for block in text.split("\n\n")]
    for number, row in enumerate(rows):
        assert all(block[number].startswith(row[0]) for block in blocks)
        assert [cell for block in blocks for cell in block[number].split("  ")[1:]] == row[1:]
    assert terminal.align_columns([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc  d"
    assert terminal.align_columns([["a"], ["bb"]]) == "a\nbb"


def test_tables_of_the_lenses_fit(width):
    words = ["representation", "a", "Frankreich", " ", "\n", "ü" * 30, "antidisestablishmentarianism"]
    tokens = [[{"text": word, "probability": 0.5} for word in words] for _ in range(3)]
    row = {"text": "a long text\nof lines " * 20, "tokens": tokens, "words": tokens[0]}
    text = logit_table(row)
    assert fits(text, width) and text.count("0.500") == 3 * len(words) + len(words)
    near = {"word": "bank", "cosine": 0.5, "layer": 3, "before": "by the river " * 9, "after": " of the stream" * 9}
    text = neighbor_table({"text": "a long text " * 20, "layer": 3, "tokens": [[near, near], [near]]})
    assert fits(text, width) and text.count("[bank]") == 3 and "[layer 3]" in text.splitlines()[0]
    near |= {"before": "", "after": ""}
    assert "  [bank]" in neighbor_table({"text": "a", "layer": 3, "tokens": [[near]]})


@pytest.mark.parametrize(
    ("program", "prefix"), [("launch/quickstart.py", "python -m launch."), ("llm2vec-gen quickstart", "llm2vec-gen ")]
)
def test_printed_commands_run_where_the_quickstart_ran(monkeypatch, program, prefix):
    monkeypatch.setattr("sys.argv", [program])
    lines = quickstart._written_paths(*map(pathlib.Path, ("out", "queries", "responses", "run/model"))).splitlines()
    assert f"  {prefix}lens report run/model \\" in lines
    assert f"  {prefix}encode run/model input=FILE.txt output=vectors" in lines
