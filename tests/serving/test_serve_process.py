"""The server process: start, termination by a signal, and benchmark."""

import concurrent.futures
import json
import signal
import socket
import subprocess
import sys

import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.config import options
from tests.conftest import check_error
from tests.helpers.embedders import E
from tests.helpers.servers import ROOT, SMALL, check_refusal, environment, running

httpx = pytest.importorskip("httpx", reason="needs requirements-serve.txt")
from llm2vec_gen_jax.serving import server  # noqa: E402


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_the_server_after_requests_in_flight(model_folder, number):
    with running(model_folder, "max_wait_ms=2000", "warmup=false") as server:
        server.ready()
        with concurrent.futures.ThreadPoolExecutor() as pool:
            answer = pool.submit(server.post, "embeddings", {"input": "one"})
            server.until("waiting", 1)
            server.process.send_signal(number)
            assert len(answer.result().json()["data"][0]["embedding"]) == E
        assert server.process.wait(60) == 0
        with pytest.raises(httpx.ConnectError):
            server.post("embeddings", {"input": "one"})


def test_requests_in_flight_at_the_shutdown_timeout_get_a_response(model_folder):
    """Queued texts and an incomplete body get a response before the process ends."""
    arguments = ("max_wait_ms=600000", "shutdown_timeout=1", "warmup=false")
    with running(model_folder, *arguments, stderr=subprocess.PIPE) as server:
        server.ready()
        with concurrent.futures.ThreadPoolExecutor() as pool, socket.create_connection(server.address()) as slow:
            slow.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{")
            answers = [pool.submit(server.post, "embeddings", {"input": ["one", "two"]}) for _ in range(5)]
            server.until("waiting", 10)
            server.process.send_signal(signal.SIGTERM)
            for answer in answers:
                check_refusal(answer.result(), 503, "the server is stopping", code="stopping")
                assert answer.result().headers["Retry-After"] == "1"
            assert slow.recv(100).startswith(b"HTTP/1.1 503")
        _, errors = server.process.communicate(timeout=60)
    assert server.process.returncode == 0
    assert "Traceback" not in errors and "Error" not in errors, errors


def test_errors_at_start(command, model_folder, monkeypatch, tmp_path):
    check_error(command("serve", tmp_path / "nowhere", "port=0"), "nowhere")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check_error(command("serve", model_folder, f"port={port}"), f"port={port}", "in use")
    check_error(command("serve", model_folder, "port=70000"), "port=70000")
    check_error(command("serve", model_folder, "host=no.such.host.invalid"), "host=no.such.host.invalid")
    check_error(command("serve", model_folder, "port=0", "max_length=4"), "max_length must exceed")
    monkeypatch.setenv("LLM2VEC_GEN_API_KEY", " ")
    check_error(command("serve", model_folder, "port=0"), "LLM2VEC_GEN_API_KEY is empty")
    for key in ("clé", "a\nb", "a\udce9"):
        monkeypatch.setenv("LLM2VEC_GEN_API_KEY", key)
        check_error(command("serve", model_folder, "port=0"), "LLM2VEC_GEN_API_KEY must be of printable ASCII")
    monkeypatch.delenv("LLM2VEC_GEN_API_KEY")
    check_error(command("serve", model_folder, "port=0", f"instruction={'a' * 600}"), "'instruction' leaves no tokens")


def test_the_printed_address_accepts_connections(model_folder, monkeypatch, capsys):
    def run(self, listener):
        printed = capsys.readouterr().out
        socket.create_connection(listener.getsockname(), timeout=5).close()
        assert f":{listener.getsockname()[1]}/v1" in printed

    monkeypatch.setattr(server.Server, "run", run)
    server.serve(str(model_folder), options.load(config.ServeConfig, None, ["port=0"]))


def test_requests_are_rejected_during_compilation(model_folder):
    with running(model_folder, "max_length=512", "batch_size=16") as server:
        response = httpx.get(f"{server.url}/health", timeout=120)
        if response.json() == {"status": "compiling", "decoding": "compiling"}:  # not if all programs are cached
            assert response.status_code == 503
            response = server.post("embeddings", {"input": "a"})
            if response.status_code != 200:
                check_refusal(response, 503, "being compiled", code="not_ready")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


@pytest.mark.slow
def test_the_benchmark_agrees_with_the_model(model_folder, tmp_path):
    command = [sys.executable, "-m", "benchmarks.serve", str(model_folder), *SMALL[2:], "--texts", "24"]
    command += ["--concurrency", "4", "--per-request", "1", "5", "--rounds", "2", "--output", str(tmp_path / "rows")]
    done = subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *rows, alone = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [row["requests"] for row in rows] == [2 * 24, 2 * 5]
    for row in rows:
        assert row["errors"] == 0 and row["difference"] < 1e-5 and 0 < row["p50"] <= row["p99"]
        assert row["of_encode"] == pytest.approx(row["texts_per_second"] / alone["texts_per_second"])
