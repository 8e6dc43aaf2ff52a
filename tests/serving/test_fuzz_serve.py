"""Fuzzing of the server: bodies, paths and headers of requests."""

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax import config
from tests.helpers.embedders import K
from tests.helpers.fuzzing import FUZZ, altered, damaged, dumped
from tests.helpers.servers import ask_in_process


@pytest.fixture(scope="module")
def ask(embedder):
    """ask(method, path, content, headers) returns the response of a server in this process."""
    from llm2vec_gen_jax.serving.endpoints import Endpoints

    settings = config.ServeConfig(max_length=60, batch_size=2, max_inputs=3, max_body_bytes=20000, max_wait_ms=0)
    settings.decode.max_new_tokens, settings.decode.batch_size, settings.decode.temperature = 2, 2, 0.5
    endpoints = Endpoints(embedder, settings, "tiny", None)
    endpoints.ready = endpoints.decoding_ready = True
    return ask_in_process(endpoints)


SOFT = np.ones((K, 32)).tolist()
BODIES = [
    ("/v1/embeddings", {"input": ["one", "two"], "dimensions": 3, "encoding_format": "base64", "soft_prompts": True}),
    ("/v1/embeddings", {"input": "one", "model": "tiny", "user": "x", "instruction": "Find:"}),
    ("/embed", {"inputs": ["one", "two"], "normalize": False, "truncate": True, "dimensions": 3}),
    ("/embed", {"inputs": "one", "truncation_direction": "Right", "prompt_name": None}),
    ("/v1/decode", {"input": ["one"], "max_tokens": 2, "seed": 5}),
    ("/v1/decode", {"soft_prompts": [SOFT], "max_tokens": 1, "seed": 2**31}),
]


def check_answer(response):
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    assert "application/json" in response.headers["content-type"]
    assert response.status_code == 200 or set(response.json()) in ({"error"}, {"error", "error_type"})


@hypothesis.given(st.data(), st.sampled_from(BODIES))
@FUZZ
def test_any_body_of_a_request(ask, data, what):
    path, body = what
    words = ["base64", "float", "soft_prompts", "input", "seed", "tiny", "left"]
    check_answer(ask("POST", path, dumped(data.draw(altered(body, words)))))


@hypothesis.given(st.data(), st.sampled_from(BODIES))
@FUZZ
def test_any_bytes_of_a_request(ask, data, what):
    path, body = what
    content = data.draw(damaged(dumped(body)) | st.binary(max_size=40))
    check_answer(ask(data.draw(st.sampled_from(["POST", "GET", "PUT"])), path, content))


@hypothesis.given(st.text(max_size=12), st.text(st.characters(codec="latin-1"), max_size=12))
@FUZZ
def test_any_path_and_header(ask, name, value):
    from urllib.parse import quote

    response = ask("GET", f"/v1/models/{quote(name)}", headers={"authorization": quote(value), "content-length": "x"})
    check_answer(response)
