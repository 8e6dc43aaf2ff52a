"""Endpoints of the server, called by OpenAI's client and plain HTTP: embeddings, models, decoding, API keys."""

import asyncio
import base64
import json
import os
import re

import huggingface_hub
import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen
from tests.conftest import one_device_mesh
from tests.helpers.embedders import TEXTS, E, K
from tests.helpers.servers import MOST_NEW, check_refusal, running

httpx = pytest.importorskip("httpx", reason="needs requirements-serve.txt")
openai = pytest.importorskip("openai", reason="needs requirements-serve.txt")

KEY = "a secret"


@pytest.fixture(scope="module")
def server(model_folder):
    """A server with an API key and an access log, after compilation."""
    with running(model_folder, "access_log=true", key=KEY) as started:
        yield started.ready_to_decode()


@pytest.fixture(scope="module")
def model(model_folder):
    return LLM2VecGen.from_pretrained(model_folder, "float32", mesh=one_device_mesh())


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        yield client


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
    for encoding in ("float", "base64", openai.omit):  # omitted: the client requests and decodes base64
        result = client.embeddings.create(input="text", model="tiny", dimensions=5, encoding_format=encoding)
        embedding = result.data[0].embedding
        if encoding == "base64":
            embedding = np.frombuffer(base64.b64decode(embedding), "<f4")
        np.testing.assert_allclose(embedding, expected, atol=1e-6)
    raw = {"input": "text", "encoding_format": "base64"}
    result = server.post("embeddings", raw, headers={"Authorization": f"Bearer {KEY}"}).json()["data"][0]["embedding"]
    np.testing.assert_allclose(np.frombuffer(base64.b64decode(result), "<f4"), model.encode("text"), atol=1e-6)


def test_an_instruction_comes_first(client, model):
    result = client.embeddings.create(input="me", model="tiny", extra_body={"instruction": "Find:"})
    np.testing.assert_allclose(result.data[0].embedding, model.encode("Find: me"), atol=1e-5)


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "llm2vec_gen_jax"
    with pytest.raises(openai.NotFoundError, match="'large' does not exist; this server has 'tiny'"):
        client.models.retrieve("large")
    with pytest.raises(openai.NotFoundError) as error:
        client.embeddings.create(input="a", model="large")
    assert error.value.code == "model_not_found" and error.value.param == "model"


def test_errors_reach_the_client(client):
    for options, expected in (
        ({"input": [1, 2, 3]}, "token ids are not accepted"),
        ({"input": [[1, 2], [3]]}, "token ids are not accepted"),
        ({"input": []}, "at least one"),
        ({"input": "a", "dimensions": E + 1}, f"between 1 and {E}, found {E + 1}"),
        ({"input": "a", "encoding_format": "hex"}, "float or base64, not 'hex'"),
        ({"input": "a", "extra_body": {"dimension": 3}}, "unknown key 'dimension', did you mean 'dimensions'"),
    ):
        with pytest.raises(openai.BadRequestError, match=expected):
            client.embeddings.create(model="tiny", **options)


def test_an_api_key_is_required(server):
    wrong = [{}, {"Authorization": KEY}, {"Authorization": f"Bearer {KEY}x"}, {"Authorization": "Bearer é".encode()}]
    for headers in wrong:
        response = server.post("embeddings", {"input": "a"}, headers=headers)
        check_refusal(response, 401, "Authorization: Bearer", code="invalid_api_key")
    check_refusal(httpx.get(f"{server.url}/v1/models"), 401)
    refused = httpx.post(f"{server.url}/embed", json={"inputs": "a"})
    assert refused.status_code == 401 and refused.json()["error_type"] == "Validation"
    assert httpx.get(f"{server.url}/info").status_code == 401
    assert server.healthy()  # without a key


def test_a_line_of_the_access_log_has_no_text_and_no_key(server):
    send = {"headers": {"Authorization": f"Bearer {KEY}"}}
    httpx.post(f"{server.url}/embed?key=query", json={"inputs": ["private", "words"]}, **send)
    httpx.get(f"{server.url}/a%0Ab")
    lines = os.read(server.process.stdout.fileno(), 1 << 16).decode().splitlines()
    pattern = r"20\d\d-\S+ \S+ 127\.0\.0\.1:\d+ POST /embed 200 in \d+\.\d ms, inputs: 2, tokens: 12"
    assert re.fullmatch(pattern, lines[-2]), lines[-2]
    assert re.search(r"GET /a b 404 in", lines[-1]), lines[-1]
    assert not [line for line in lines if KEY in line or "private" in line or "query" in line or "/health" in line]


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
    result = asyncio.run(ask())
    expected = model.encode(texts, max_length=100)
    for rows, answer in zip(requests, result):
        np.testing.assert_allclose([item.embedding for item in answer.data], expected[rows], atol=1e-5)
    batches = server.metric('batch_items_count{kind="embed"') - before
    assert batches < len(requests), "requests that wait are encoded together"


# The API of text-embeddings-inference


def test_the_client_of_huggingface_hub(server, model, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # the server is on this machine
    with huggingface_hub.InferenceClient(base_url=server.url, api_key=KEY) as client:
        found = client.feature_extraction(TEXTS[:3])
        expected = model.encode(TEXTS[:3], max_length=100, normalize_embeddings=True)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        options = {"normalize": False, "dimensions": 5, "truncate": True, "truncation_direction": "right"}
        found = client.feature_extraction("x" * 200, model=f"{server.url}/embed", **options)
        np.testing.assert_allclose(found, [model.encode("x" * 200, max_length=100, truncate_dim=5)], atol=1e-5)


@pytest.mark.parametrize(
    "body, status, kind, expected",
    [
        (b"{", 422, "Validation", "not valid JSON"),
        ({}, 422, "Validation", "'inputs' must be a string"),
        ({"inputs": []}, 400, "Empty", "'inputs' is empty"),
        ({"inputs": ["a"] * 2049}, 413, "Validation", "at most 2048"),
        ({"inputs": [[1, 2]]}, 422, "Validation", "token ids are not accepted"),
        ({"inputs": "a", "dimensions": 0}, 422, "Validation", f"between 1 and {E}"),
        ({"inputs": "a", "normalise": False}, 422, "Validation", "did you mean 'normalize'"),
        ({"inputs": "a", "prompt_name": "query"}, 422, "Validation", "this model has no prompts"),
        ({"inputs": "a", "truncation_direction": "left"}, 422, "Validation", "must be right, not 'left'"),
        ({"inputs": ["a", "x" * 200], "truncate": False}, 422, "Validation", "input 1 is longer than the 96 tokens"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_errors_have_the_form_of_tei(server, body, status, kind, expected):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = httpx.post(f"{server.url}/embed", content=content, headers={"Authorization": f"Bearer {KEY}"})
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error", "error_type"} and response.json()["error_type"] == kind
    assert expected in response.json()["error"]


def test_info(server):
    found = httpx.get(f"{server.url}/info", headers={"Authorization": f"Bearer {KEY}"}).json()
    expected = {"model_id": "tiny", "model_dtype": "float32", "model_type": {"embedding": {"pooling": "mean"}}}
    expected |= {"max_input_length": 96, "max_batch_tokens": 512, "max_client_batch_size": 2048, "auto_truncate": True}
    assert expected.items() <= found.items()


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
        body = {"input": texts, "soft_prompts": True, "encoding_format": encoding}
        result = server.post("embeddings", body, **send).json()["data"]
        if encoding == "float":
            np.testing.assert_allclose([item["embedding"] for item in result], model.encode(texts), atol=1e-5)
            np.testing.assert_allclose([item["soft_prompts"] for item in result], prompts, atol=1e-5)
        answer = server.post("decode", {"soft_prompts": [item["soft_prompts"] for item in result]}, **send).json()
        assert [item["text"] for item in answer["data"]] == expected
    cut = server.post("decode", {"input": texts[0], "max_tokens": 3}, **send).json()["data"][0]["text"]
    assert cut == model.decode(prompts[0], max_new_tokens=3)


@pytest.mark.parametrize(
    "body, expected",
    [
        ({}, "embeddings, which are means"),
        ({"input": "a", "soft_prompts": []}, "give one of"),
        ({"soft_prompts": [[1.0] * E]}, f"'soft_prompts' 0 must be {K} x 32 numbers"),
        ({"soft_prompts": ["=?"]}, "'soft_prompts' 0 must be"),
        ({"soft_prompts": [[[1e300] * 32] * K]}, "'soft_prompts' 0 must be"),
        ({"soft_prompts": [[[1] * 32] * K, [[1], [2, 3]]]}, "'soft_prompts' 1 must be"),
        ({"input": "a", "max_tokens": MOST_NEW + 1}, f"between 1 and {MOST_NEW}"),
        ({"input": "a", "seed": "x"}, "'seed' must be an integer"),
    ],
)
def test_errors_of_decoding(server, body, expected):
    check_refusal(server.post("decode", body, headers={"Authorization": f"Bearer {KEY}"}), 400, expected)
    assert server.healthy()
