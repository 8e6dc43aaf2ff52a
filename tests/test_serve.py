"""The server as its users see it: a process of its own, OpenAI's client, hostile and slow clients, signals."""

import asyncio
import base64
import concurrent.futures
import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen

from .conftest import check_error, one_device_mesh
from .embedders import TEXTS, E, K

for needed in ("httpx", "orjson", "prometheus_client", "starlette", "uvicorn"):
    pytest.importorskip(needed, reason="needs requirements-serve.txt")
httpx = pytest.importorskip("httpx")
openai = pytest.importorskip("openai", reason="needs requirements-serve.txt")

ROOT = pathlib.Path(__file__).parent.parent
KEY = "a secret"
MOST_NEW = 8
SMALL = ["port=0", "name=tiny", "max_length=100", "batch_size=2"]
SMALL += [f"decode.max_new_tokens={MOST_NEW}", "decode.batch_size=2"]


def environment(key=None):
    """Of a process that runs on one device."""
    given = os.environ | {
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": "",
        "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return given | ({"LLM2VEC_GEN_API_KEY": key} if key else {})


class Running:
    """A server in a process of its own. url: where it answers."""

    def __init__(self, folder, *words, key=None):
        command = [sys.executable, "-m", "launch.serve", str(folder), *SMALL, *words]
        self.process = subprocess.Popen(command, env=environment(key), stdout=subprocess.PIPE, text=True)
        self.url = self.process.stdout.readline().split()[-1].removesuffix("/v1")

    def ready(self):
        assert self.process.stdout.readline().startswith("ready: ")
        return self

    def post(self, path, content, **options):
        """Sends an object, or bytes as they are. Returns the response."""
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        return httpx.post(f"{self.url}/v1/{path}", content=content, timeout=120, **options)

    def metric(self, name):
        """The sum of a metric's lines, 0 where there is none."""
        lines = httpx.get(f"{self.url}/metrics", timeout=120).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"llm2vec_gen_{name}"))

    def until(self, name, value):
        """Waits for a metric to have a value."""
        for _ in range(1200):
            if self.metric(name) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} stays {self.metric(name)}")

    def address(self):
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def healthy(self):
        assert self.process.poll() is None
        return httpx.get(f"{self.url}/health", timeout=120).json() == {"status": "ok"}


@contextlib.contextmanager
def running(*words, **options):
    server = Running(*words, **options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


@pytest.fixture(scope="module")
def server(model_folder):
    """A server with a key, everything compiled."""
    with running(model_folder, key=KEY) as started:
        yield started.ready()


@pytest.fixture(scope="module")
def strict(model_folder):
    """A server of narrow limits, which waits long for others."""
    limits = ["max_wait_ms=1500", "max_waiting=2", "max_inputs=3", "max_body_bytes=20000", "max_requests=8"]
    limits += ["client_timeout=1.5", "truncate=false", "normalize=true", "instruction=Find:", "warmup=false"]
    with running(model_folder, *limits) as started:
        yield started.ready()


@pytest.fixture(scope="module")
def model(model_folder):
    return LLM2VecGen.from_pretrained(model_folder, "float32", mesh=one_device_mesh())


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


def check_refusal(response, status, *expected, code=None):
    """An error of OpenAI's shape."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["type"], str)
    for part in expected:
        assert part in error["message"]
    if code:
        assert error["code"] == code


# OpenAI's client


def test_one_text_and_many(client, model):
    one = client.embeddings.create(input="a longer text", model="tiny", user="me")
    assert (one.object, one.model, len(one.data), one.data[0].index) == ("list", "tiny", 1, 0)
    np.testing.assert_allclose(one.data[0].embedding, model.encode("a longer text"), atol=1e-5)
    assert one.usage.prompt_tokens == one.usage.total_tokens == len("a longer text")  # a token per byte
    many = client.embeddings.create(input=TEXTS, model="tiny")
    assert [item.index for item in many.data] == list(range(len(TEXTS)))
    np.testing.assert_allclose([item.embedding for item in many.data], model.encode(TEXTS, max_length=100), atol=1e-5)


def test_dimensions_and_formats(client, server, model):
    expected = model.encode("text", truncate_dim=5)
    for encoding in ("float", "base64", openai.omit):  # left out: the client asks for base64 and decodes it
        found = client.embeddings.create(input="text", model="tiny", dimensions=5, encoding_format=encoding)
        embedding = found.data[0].embedding
        if encoding == "base64":
            embedding = np.frombuffer(base64.b64decode(embedding), "<f4")
        np.testing.assert_allclose(embedding, expected, atol=1e-6)
    raw = {"input": "text", "encoding_format": "base64"}
    found = server.post("embeddings", raw, headers={"Authorization": f"Bearer {KEY}"}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(found), "<f4"), model.encode("text"), atol=1e-6)


def test_an_instruction_comes_first(client, model):
    found = client.embeddings.create(input="me", model="tiny", extra_body={"instruction": "Find:"})
    np.testing.assert_allclose(found.data[0].embedding, model.encode("Find: me"), atol=1e-5)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "llm2vec_gen_jax"
    with pytest.raises(openai.NotFoundError, match="'large' does not exist; this server has 'tiny'"):
        client.models.retrieve("large")
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(input="a", model="large")
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_what_the_client_is_told(client):
    for options, expected in (
        ({"input": [1, 2, 3]}, "token ids are not accepted"),
        ({"input": [[1, 2], [3]]}, "token ids are not accepted"),
        ({"input": []}, "at least one"),
        ({"input": "a", "dimensions": E + 1}, f"within 1 and {E}, found {E + 1}"),
        ({"input": "a", "encoding_format": "hex"}, "float or base64, not 'hex'"),
        ({"input": "a", "extra_body": {"dimension": 3}}, "unknown key 'dimension', did you mean 'dimensions'"),
    ):
        with pytest.raises(openai.BadRequestError, match=expected):
            client.embeddings.create(model="tiny", **options)


def test_a_key_is_asked_for(server):
    wrong = [{}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer é".encode()}]
    for headers in wrong:
        response = server.post("embeddings", {"input": "a"}, headers=headers)
        check_refusal(response, 401, "Authorization: Bearer", code="invalid_api_key")
    check_refusal(httpx.get(f"{server.url}/v1/models"), 401)
    assert server.healthy()  # needs none


def test_concurrent_requests_get_their_own_vectors(server, model):
    random = np.random.default_rng(0)
    words = ["one", "two", "three", "four", "five", "six"]
    texts = [f"{number} " + " ".join(random.choice(words, random.integers(1, 15))) for number in range(400)]
    cuts = sorted(random.choice(np.arange(1, 400), 149, replace=False))
    requests = np.split(np.arange(400), cuts)

    async def ask():
        limits = {"base_url": f"{server.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 300}
        async with openai.AsyncOpenAI(**limits) as client:
            calls = [client.embeddings.create(input=[texts[row] for row in rows], model="tiny") for rows in requests]
            return await asyncio.gather(*calls)

    before = server.metric('batch_items_count{kind="embed"')
    found = asyncio.run(ask())
    expected = model.encode(texts, max_length=100)
    for rows, answer in zip(requests, found):
        np.testing.assert_allclose([item.embedding for item in answer.data], expected[rows], atol=1e-5)
    batches = server.metric('batch_items_count{kind="embed"') - before
    assert batches < len(requests), "requests that wait are encoded together"


# Decoding


def test_decoding(server, model):
    texts = ["What is the capital of France?", "one", "two"]
    send = {"headers": {"Authorization": f"Bearer {KEY}"}}
    _, prompts = model.encode(texts, return_soft_prompts=True)
    expected = model.decode(prompts, max_new_tokens=MOST_NEW)
    answer = server.post("decode", {"input": texts}, **send).json()
    assert [item["text"] for item in answer["data"]] == expected
    assert [item["index"] for item in answer["data"]] == [0, 1, 2]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == sum(map(len, texts)) and 0 < usage["completion_tokens"] <= 3 * MOST_NEW
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    for encoding in ("float", "base64"):
        wanted = {"input": texts, "soft_prompts": True, "encoding_format": encoding}
        found = server.post("embeddings", wanted, **send).json()["data"]
        if encoding == "float":
            np.testing.assert_allclose([item["embedding"] for item in found], model.encode(texts), atol=1e-5)
            np.testing.assert_allclose([item["soft_prompts"] for item in found], prompts, atol=1e-5)
        answer = server.post("decode", {"soft_prompts": [item["soft_prompts"] for item in found]}, **send).json()
        assert [item["text"] for item in answer["data"]] == expected
    cut = server.post("decode", {"input": texts[0], "max_tokens": 3}, **send).json()["data"][0]["text"]
    assert cut == model.decode(prompts[0], max_new_tokens=3)


@pytest.mark.parametrize(
    "body, expected",
    [
        ({}, "an embedding alone"),
        ({"input": "a", "soft_prompts": []}, "give one of"),
        ({"soft_prompts": [[1.0] * E]}, f"'soft_prompts' 0 must be {K} x 32 numbers"),
        ({"soft_prompts": ["=?"]}, "'soft_prompts' 0 must be"),
        ({"soft_prompts": [[[1e300] * 32] * K]}, "'soft_prompts' 0 must be"),
        ({"soft_prompts": [[[1] * 32] * K, [[1], [2, 3]]]}, "'soft_prompts' 1 must be"),
        ({"input": "a", "max_tokens": MOST_NEW + 1}, f"within 1 and {MOST_NEW}"),
        ({"input": "a", "seed": "x"}, "'seed' must be an integer"),
    ],
)
def test_what_cannot_be_decoded(server, body, expected):
    check_refusal(server.post("decode", body, headers={"Authorization": f"Bearer {KEY}"}), 400, expected)
    assert server.healthy()


# Limits


@pytest.mark.parametrize(
    "body, status, expected",
    [
        (b"", 400, "not valid JSON"),
        (b"{", 400, "not valid JSON"),
        (b'{"input": "\xff"}', 400, "not valid JSON"),
        (b'{"input": "\\ud800"}', 400, "not valid JSON"),
        (b'{"input": NaN}', 400, "not valid JSON"),
        (b"[" * 19_000, 400, "not valid JSON"),
        (b'["a"]', 400, "must be a JSON object"),
        ({"input": None}, 400, "'input' must be a string"),
        ({"input": {"a": 1}}, 400, "'input' must be a string"),
        ({"input": ["a", None]}, 400, "'input' 1 must be a string"),
        ({"input": ["a", ["b"]]}, 400, "'input' 1 must be a string"),
        ({"input": "a", "dimensions": True}, 400, "'dimensions' must be an integer"),
        ({"input": "a", "dimensions": "3"}, 400, "'dimensions' must be an integer"),
        ({"input": "a", "model": 3}, 400, "'model' must be a string"),
        ({"input": ["a"] * 4}, 413, "has 4 items, at most 3"),
        ({"input": "a" * 19_000}, 400, "input 0 is longer than the 96 tokens"),
        ({"input": "a" * 20_001}, 413, "must not exceed 20000 bytes"),
        ({"input": "a" * 10_000_000}, 413, "must not exceed 20000 bytes"),
        ({"input": ["a"] * 100_000}, 413, "must not exceed 20000 bytes"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_bad_requests_are_refused_and_the_server_lives(strict, body, status, expected):
    check_refusal(strict.post("embeddings", body), status, expected)
    assert strict.healthy()


def test_a_body_of_unknown_length_is_limited(strict):
    response = httpx.post(f"{strict.url}/v1/embeddings", content=iter([b"[" * 9000] * 30), timeout=120)
    check_refusal(response, 413, "must not exceed 20000 bytes")


def test_unknown_urls_and_methods(strict):
    check_refusal(httpx.get(f"{strict.url}/v1/nothing"), 404, "GET /v1/nothing", code="unknown_url")
    check_refusal(httpx.get(f"{strict.url}/v1/embeddings"), 405, "Method Not Allowed")


def test_settings_of_the_server(strict, model):
    found = strict.post("embeddings", {"input": "me", "dimensions": 5}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(found, model.encode("Find: me", truncate_dim=5, normalize_embeddings=True), atol=1e-5)


def test_waiting_requests_are_encoded_together_and_one_too_many_is_refused(strict, model):
    batches, requests = strict.metric("batch_requests_count"), strict.metric("batch_requests_sum")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(strict.post, "embeddings", {"input": "one"})
        strict.until("waiting", 1)
        second = pool.submit(strict.post, "embeddings", {"input": "two"})
        strict.until("waiting", 2)
        response = strict.post("embeddings", {"input": "three"})
        check_refusal(response, 429, "2 inputs wait already", code="rate_limit_exceeded")
        assert response.headers["Retry-After"] == "1"
        for text, future in (("one", first), ("two", second)):
            expected = model.encode(f"Find: {text}", normalize_embeddings=True)
            np.testing.assert_allclose(future.result().json()["data"][0]["embedding"], expected, atol=1e-5)
    assert strict.metric("batch_requests_count") - batches == 1
    assert strict.metric("batch_requests_sum") - requests == 2


def test_what_a_client_no_longer_waits_for_is_dropped(strict):
    gone = strict.metric('requests_total{endpoint="embeddings",status="499"}')
    items = strict.metric("batch_items_sum")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{strict.url}/v1/embeddings", json={"input": "one"}, timeout=0.3)
    strict.until("waiting", 0)
    strict.until('requests_total{endpoint="embeddings",status="499"}', gone + 1)
    assert strict.metric("batch_items_sum") == items


def head(length):
    return f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode()


def test_slow_clients_are_given_up(strict):
    """Those that never finish their headers, and those that never finish their body."""
    sockets = [socket.create_connection(strict.address(), timeout=60) for _ in range(12)]
    for number, connection in enumerate(sockets):
        connection.sendall(head(100)[: 20 if number % 2 else None])
    for number, connection in enumerate(sockets):
        received = b""
        while part := connection.recv(4096):
            received += part
        if number % 2 == 0:
            assert received.startswith(b"HTTP/1.1 408") or b" 429 " in received
        connection.close()
    assert strict.healthy() and strict.metric("in_flight") == 0


def test_too_many_requests_at_a_time(strict):
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(socket.create_connection(strict.address()))
            connection.sendall(head(100))
        strict.until("in_flight", 8)
        check_refusal(strict.post("embeddings", {"input": "a"}), 429, "more than 8 requests")
        assert strict.healthy()
    strict.until("in_flight", 0)
    assert strict.post("embeddings", {"input": "a"}).status_code == 200


# Start and end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_what_is_in_flight(model_folder, number):
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


def test_what_keeps_a_server_from_starting(command, model_folder, monkeypatch, tmp_path):
    check_error(command("serve", tmp_path / "nowhere", "port=0"), "nowhere")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        check_error(command("serve", model_folder, f"port={port}"), f"port={port}", "in use")
    check_error(command("serve", model_folder, "port=70000"), "port=70000")
    check_error(command("serve", model_folder, "host=no.such.host.invalid"), "host=no.such.host.invalid")
    check_error(command("serve", model_folder, "port=0", "max_length=4"), "max_length must exceed")
    monkeypatch.setenv("LLM2VEC_GEN_API_KEY", " ")
    check_error(command("serve", model_folder, "port=0"), "LLM2VEC_GEN_API_KEY is empty")


def test_requests_are_refused_while_programs_compile(model_folder):
    with running(model_folder, "max_length=512", "batch_size=16") as server:
        response = httpx.get(f"{server.url}/health", timeout=120)
        if response.json() == {"status": "compiling"}:  # a cache of compiled programs can be faster
            assert response.status_code == 503
            response = server.post("embeddings", {"input": "a"})
            if response.status_code != 200:
                check_refusal(response, 503, "being compiled", code="not_ready")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(60) == 0


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
