"""`respond engine=openai` against a real server process: busy, killed and started again, or not there at all."""

import collections
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference.respond import respond
from tests.conftest import write_jsonl
from tests.helpers.processes import free_port

ROOT = pathlib.Path(__file__).parents[2]
QUESTIONS = [f"question {number} " + "a" * (number % 7) for number in range(40)]


@contextlib.contextmanager
def serving(port, log, seconds=0.0):
    words = [sys.executable, "-m", "tests.helpers.chat_server", str(port), str(log), str(seconds)]
    process = subprocess.Popen(words, cwd=ROOT)
    try:
        for _ in range(200):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def server(tmp_path):
    """The port of a server."""
    port = free_port()
    with serving(port, tmp_path / "log"):
        yield port


def settings(folder, port, **changes):
    if not (folder / "queries.jsonl").exists():
        write_jsonl(folder / "queries.jsonl", [{"question": question} for question in QUESTIONS])
    values = {"engine": "openai", "endpoint": f"http://127.0.0.1:{port}/v1", "concurrency": 4}
    values |= {"input": str(folder / "queries.jsonl"), "output": str(folder / "out.jsonl")}
    return config.RespondConfig(**values | changes)


def words_of(values):
    """The words of the command with these settings."""
    return [f"{key}={getattr(values, key)}" for key in ("engine", "endpoint", "concurrency", "input", "output")]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(words=500):
    finish = {True: "length", False: "stop"}
    return [
        {
            "id": number,
            "question": question,
            "answer": " ".join(question.split()[:words]) + "?",  # for an unpaired surrogate
            "finish": finish[len(question.split()) > words],
        }
        for number, question in enumerate(QUESTIONS)
    ]


def by_id(rows):
    return sorted(rows, key=lambda row: (row["id"], row.get("sample", 0)))


def test_every_query_is_answered_once_by_a_server_that_is_busy_at_times(server, tmp_path):
    path = respond(settings(tmp_path, server))
    assert by_id(rows_of(path)) == expected()
    assert sorted((tmp_path / "log").read_text().splitlines()) == sorted(QUESTIONS)
    before = path.read_bytes()
    assert respond(settings(tmp_path, server)).read_bytes() == before, "nothing is left to ask"
    with pytest.raises(InputError, match="holds another run .sampling"):
        respond(settings(tmp_path, server, max_new_tokens=2))
    short = respond(settings(tmp_path, server, max_new_tokens=2, output=str(tmp_path / "short.jsonl")))
    assert by_id(rows_of(short)) == expected(2) and {row["finish"] for row in rows_of(short)} == {"stop", "length"}


def test_shares_and_samples_complete_each_other(server, tmp_path):
    rows = []
    for index in range(2):
        share = settings(tmp_path, server, samples=2, temperature=1.0)
        share.shard = config.ShardConfig(index, 2)
        rows += rows_of(respond(share))
    assert [(row["id"], row["sample"]) for row in by_id(rows)] == [(n, s) for n in range(40) for s in range(2)]
    seeds = [row["answer"].rstrip("?").split()[-1] for row in rows]
    assert len(set(seeds)) == 80, "every sample has a seed of its own"


def test_a_server_that_is_killed_and_started_again_loses_nothing(tmp_path, launch):
    port, log = free_port(), tmp_path / "log"
    with serving(port, log, 0.2) as first:
        run = launch(tmp_path, "respond", *words_of(settings(tmp_path, port)))
        while run.poll() is None and not (log.exists() and len(log.read_text().splitlines()) >= 8):
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        time.sleep(0.5)
    with serving(port, log):
        assert run.wait(120) == 0, run.stderr.read()
    assert by_id(rows_of(tmp_path / "out.jsonl")) == expected()


def test_a_client_that_is_killed_goes_on_where_it_stopped(tmp_path, launch):
    port, log, output = free_port(), tmp_path / "log", tmp_path / "out.jsonl"
    with serving(port, log, 0.2):
        run = launch(tmp_path, "respond", *words_of(settings(tmp_path, port)))
        while run.poll() is None and not (output.exists() and len(output.read_bytes().splitlines()) >= 8):
            time.sleep(0.05)
        run.kill()
        run.wait()
    with serving(port, log):
        assert by_id(rows_of(respond(settings(tmp_path, port)))) == expected()
    repeated = [n for n in collections.Counter(log.read_text().splitlines()).values() if n > 1]
    assert len(repeated) <= 8, "only what was under way is asked again"


def test_what_a_server_refuses_is_named(server, tmp_path, monkeypatch):
    def fails(message, **changes):
        with pytest.raises(InputError, match=message):
            respond(settings(tmp_path, **{"port": server} | changes))

    fails("model=ecko: not a model of .*did you mean 'echo'.*it has echo", model="ecko")
    fails("no server there .*Start it", port=free_port())
    fails("not the URL of an OpenAI API, which usually ends in /v1", endpoint=f"http://127.0.0.1:{server}")
    fails("endpoint is required", endpoint=None)
    monkeypatch.setenv("MY_KEY", "wrong")
    fails("rejects the key in the environment variable MY_KEY", api_key_env="MY_KEY")
    assert not os.path.exists(tmp_path / "out.jsonl"), "found out before anything is written"
    write_jsonl(tmp_path / "queries.jsonl", [{"question": "fine"}, {"question": "too long"}])
    fails("question 1, 'too long': .*9999 tokens", concurrency=1)
    assert [row["question"] for row in rows_of(tmp_path / "out.jsonl")] == ["fine"]


def test_a_server_that_does_not_answer_in_time_is_asked_once_and_named(tmp_path):
    port = free_port()
    with serving(port, tmp_path / "log", 2.0):
        with pytest.raises(InputError, match="within request_timeout=1 seconds. Increase it, or decrease concurrency"):
            respond(settings(tmp_path, port, request_timeout=1))
        time.sleep(1.5)  # the server logs what it has answered
        asked = (tmp_path / "log").read_text().splitlines()
    assert 1 <= len(asked) == len(set(asked)) <= 4


def test_ctrl_c_does_not_wait_for_requests_and_keeps_what_is_answered(tmp_path, launch):
    port, log, output = free_port(), tmp_path / "log", tmp_path / "out.jsonl"
    write_jsonl(tmp_path / "queries.jsonl", [{"question": text} for text in ["fast", "slow 1", "slow 2"]])
    with serving(port, log):
        run = launch(tmp_path, "respond", *words_of(settings(tmp_path, port)))
        while run.poll() is None and not (output.exists() and output.read_bytes()):
            time.sleep(0.05)
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=15)
    assert run.returncode == 130 and "Traceback" not in errors, errors
    assert [row["question"] for row in rows_of(output)] == ["fast"]


def test_answers_under_way_at_an_error_are_kept(server, tmp_path):
    questions = ["too long;late 1;late 2", "late 1", "late 2", *(f"never asked {number}" for number in range(20))]
    write_jsonl(tmp_path / "queries.jsonl", [{"question": question} for question in questions])
    with pytest.raises(InputError, match="question 0, 'too long;late 1;late 2'"):
        respond(settings(tmp_path, server, concurrency=3))
    assert {"late 1", "late 2"} <= {row["question"] for row in rows_of(tmp_path / "out.jsonl")}
    assert len(rows_of(tmp_path / "out.jsonl")) < 10, "nothing is asked after the error"
