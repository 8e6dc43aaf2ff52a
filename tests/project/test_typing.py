"""The types that a user's type checker sees: the public API has no Any where a real type exists."""

import pathlib
import sys

from mypy import api

ROOT = pathlib.Path(__file__).parents[2]
EXAMPLE = pathlib.Path(__file__).parent / "typed_example.py"


def test_the_public_api_has_real_types(tmp_path, monkeypatch):
    """`assert_type` fails for Any, and a call of a function without annotations is an error in the example."""
    wrong = tmp_path / "wrong_example.py"
    source = EXAMPLE.read_text()
    wrong.write_text(source.replace("assert_type(model.warmup(), int)", "assert_type(model.warmup(), str)"))
    monkeypatch.chdir(ROOT)  # for its settings and its cache
    limit = sys.getrecursionlimit()
    out, _, _ = api.run([str(EXAMPLE), str(wrong)])
    sys.setrecursionlimit(limit)  # mypy raises it, and the messages for deeply nested files in later tests depend on it
    errors = [line for line in out.splitlines() if "_example.py:" in line]
    assert len(errors) == 1 and "wrong_example.py:" in errors[0]
    assert 'Expression is of type "int", not "str"' in errors[0]
