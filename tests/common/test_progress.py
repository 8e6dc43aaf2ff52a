"""Progress bars of the library, in terminals and log files."""

import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]


def test_a_bar_without_a_notebook_warns_about_nothing():
    """tqdm chooses its notebook bar in notebooks only, and would warn there if ipywidgets is missing."""
    code = (
        "from llm2vec_gen_jax.common import progress\n"
        "with progress.bar(3, 'text', 'encode') as bar: bar.update(3)\n"
        "print(bar.mininterval)"
    )
    command = [sys.executable, "-W", "error:::tqdm", "-c", code]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert shown.stdout == "10.0\n"  # of a log file
    assert "encode: 100%" in shown.stderr and "3/3" in shown.stderr
    assert "Warning" not in shown.stderr and "IProgress" not in shown.stderr
