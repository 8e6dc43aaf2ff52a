"""Limits of the server: hostile bodies, too many requests, slow and disconnected clients."""

import concurrent.futures
import contextlib
import socket
import time

import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen
from tests.conftest import one_device_mesh
from tests.helpers.servers import check_refusal, running

httpx = pytest.importorskip("httpx", reason="needs requirements-serve.txt")


@pytest.fixture(scope="module")
def strict(model_folder):
    """A server with small limits and a long batching delay."""
    limits = ["max_wait_ms=1500", "max_waiting=2", "max_inputs=3", "max_body_bytes=20000", "max_requests=8"]
    limits += ["client_timeout=1.5", "truncate=false", "normalize=true", "instruction=Find:", "warmup=false"]
    with running(model_folder, *limits) as started:
        yield started.ready()


@pytest.fixture(scope="module")
def model(model_folder):
    return LLM2VecGen.from_pretrained(model_folder, "float32", mesh=one_device_mesh())


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
def test_bad_requests_are_rejected(strict, body, status, expected):
    check_refusal(strict.post("embeddings", body), status, expected)
    assert strict.healthy()


@pytest.fixture(scope="module")
def wide(model_folder):
    """A server with the default limits."""
    with running(model_folder, "warmup=false", "max_wait_ms=0") as started:
        yield started.ready_to_decode()


MANY = b",[1]" * 1_000_000
LONG = b"k" * 7_000_000


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("decode", b'{"soft_prompts":[[[1]%s]]}' % MANY, 400),
        ("decode", b'{"soft_prompts":[[[1]]%s]}' % MANY, 413),
        ("decode", b'{"soft_prompts":["%s"]}' % LONG, 400),
        ("decode", b'{"soft_prompts":[[[1%s],[2],[3]]]}' % (b",1" * 2_000_000), 400),
        ("embeddings", b'{"%s":1}' % LONG, 400),
        ("embeddings", b'{"model":"%s"}' % LONG, 404),
        ("embeddings", b'{"input":"a","encoding_format":"%s"}' % LONG, 400),
        ("embeddings", b'{"input":[""%s]}' % MANY, 413),
        ("embeddings", b'{"input":"%s"}' % (b" " * 7_000_000), 200),
        ("embeddings", b'{"input":["a"%s],"instruction":"%s"}' % (b',"a"' * 2000, b"i" * 2**20), 400),
        ("embeddings", b'{"input":["a"%s],"instruction":"%s"}' % (b',"a"' * 2000, b" " * 2**20), 400),
    ],
    ids=lambda value: str(value)[:28],
)
def test_a_large_body_does_not_block_other_requests(wide, path, body, status):
    """Other requests are answered meanwhile, and the memory of the server does not grow."""
    before, longest = wide.memory("VmRSS"), 0
    with concurrent.futures.ThreadPoolExecutor() as pool:
        answer = pool.submit(wide.post, path, body)
        while not answer.done():
            started = time.monotonic()
            assert wide.healthy()
            longest = max(longest, time.monotonic() - started)
    assert answer.result().status_code == status and len(answer.result().content) < 5000
    assert longest < 1.5
    assert wide.memory("VmHWM") - before < 400e6  # an empty list takes 4 bytes of JSON and 64 bytes of memory


def test_a_body_of_unknown_length_is_limited(strict):
    response = httpx.post(f"{strict.url}/v1/embeddings", content=iter([b"[" * 9000] * 30), timeout=120)
    check_refusal(response, 413, "must not exceed 20000 bytes")


def test_unknown_urls_and_methods(strict):
    check_refusal(httpx.get(f"{strict.url}/v1/nothing"), 404, "GET /v1/nothing", code="unknown_url")
    check_refusal(httpx.get(f"{strict.url}/v1/embeddings"), 405, "Method Not Allowed")


def test_settings_of_the_server(strict, model):
    embedding = strict.post("embeddings", {"input": "me", "dimensions": 5}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(
        embedding, model.encode("Find: me", truncate_dim=5, normalize_embeddings=True), atol=1e-5
    )


def test_queued_requests_are_batched_and_the_queue_is_limited(strict, model):
    batches, requests = strict.metric("batch_requests_count"), strict.metric("batch_requests_sum")
    with concurrent.futures.ThreadPoolExecutor() as pool:
        first = pool.submit(strict.post, "embeddings", {"input": "one"})
        strict.until("waiting", 1)
        second = pool.submit(strict.post, "embeddings", {"input": "two"})
        strict.until("waiting", 2)
        response = strict.post("embeddings", {"input": "three"})
        check_refusal(response, 429, "2 inputs are waiting", code="rate_limit_exceeded")
        assert response.headers["Retry-After"] == "1"
        for text, future in (("one", first), ("two", second)):
            expected = model.encode(f"Find: {text}", normalize_embeddings=True)
            np.testing.assert_allclose(future.result().json()["data"][0]["embedding"], expected, atol=1e-5)
    assert strict.metric("batch_requests_count") - batches == 1
    assert strict.metric("batch_requests_sum") - requests == 2


def test_requests_of_disconnected_clients_are_dropped(strict):
    gone = strict.metric('requests_total{endpoint="embeddings",status="499"}')
    items = strict.metric("batch_items_sum")
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{strict.url}/v1/embeddings", json={"input": "one"}, timeout=0.3)
    strict.until("waiting", 0)
    strict.until('requests_total{endpoint="embeddings",status="499"}', gone + 1)
    assert strict.metric("batch_items_sum") == items


def head(length):
    return f"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: {length}\r\n\r\n".encode()


def test_slow_clients_are_disconnected(strict):
    """Clients with incomplete headers, and clients with incomplete bodies."""
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


def test_too_many_concurrent_requests(strict):
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            connection = stack.enter_context(socket.create_connection(strict.address()))
            connection.sendall(head(100))
        strict.until("in_flight", 8)
        check_refusal(strict.post("embeddings", {"input": "a"}), 429, "more than 8 concurrent requests")
        assert strict.healthy()
    strict.until("in_flight", 0)
    assert strict.post("embeddings", {"input": "a"}).status_code == 200
