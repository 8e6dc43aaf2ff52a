"""Progress bars and messages while something takes long, on a terminal and in a file."""

import os
import pathlib
import pty
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = """
import time
from llm2vec_gen_jax.common import progress
with progress.announce("loading it"):
    time.sleep({seconds})
print("done")
"""


def on_terminal(seconds, environment):
    """Returns what a terminal receives from standard error."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SCRIPT.format(seconds=seconds)]
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.PIPE, env=environment)
    os.close(theirs)
    received = b""
    while True:
        try:
            received += (piece := os.read(ours, 1000))
        except OSError:  # the end of a terminal
            break
        if not piece:
            break
    assert process.communicate(timeout=60)[0] == b"done\n" and process.returncode == 0
    os.close(ours)
    return received


def test_a_message_appears_after_a_second_and_is_erased():
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    assert on_terminal(1.5, environment) == b"loading it ...\r\x1b[K"
    assert on_terminal(0.0, environment) == b""


def test_a_file_receives_a_line_after_ten_seconds(capsys, monkeypatch):
    from llm2vec_gen_jax.common import progress

    waits = []
    timer = progress.threading.Timer
    monkeypatch.setattr(progress.threading, "Timer", lambda wait, show: (waits.append(wait), timer(0.01, show))[1])
    with progress.announce("loading it"):
        time.sleep(0.2)
    assert waits == [10.0] and capsys.readouterr().err == "loading it ...\n"


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
