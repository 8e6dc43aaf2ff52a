"""Messages while something takes long, on a terminal and in a file."""

import os
import pty
import subprocess
import sys
import time

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
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
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
