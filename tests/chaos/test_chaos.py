"""A short run of the fault injection: every kind of fault once. The long runs are tests.chaos and chaos_jobs."""

import pathlib
import subprocess
import sys

import pytest

from tests.chaos.faults import DAMAGES, FAULTS

ROOT = pathlib.Path(__file__).parents[2]


def run(*words):
    return subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, timeout=500)


@pytest.mark.slow
def test_training_survives_every_kind_of_fault():
    kinds = len(FAULTS) + len(DAMAGES) - 1
    done = run("tests.chaos", "--faults", str(kinds), "--seed", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{kinds} of {kinds} survived" in done.stdout


@pytest.mark.slow
def test_encode_and_respond_survive_kills_and_damage():
    done = run("tests.chaos.jobs", "--kills", "3", "--damages", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| encode | 3 | 3 |" in done.stdout and "| respond | 3 | 3 |" in done.stdout
