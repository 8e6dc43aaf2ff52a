"""The server before all programs are compiled, what is compiled, and prompts by name; in this process."""

import json

import jax
import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen, config
from tests.helpers.servers import ask_in_process


@pytest.fixture
def endpoints(embedder):
    """Endpoints of a model with a prompt; nothing is compiled."""
    from llm2vec_gen_jax.serving.endpoints import Endpoints

    settings = config.ServeConfig(max_length=40, batch_size=1, max_wait_ms=0)
    settings.decode.max_new_tokens, settings.decode.batch_size = 2, 1
    prompted = LLM2VecGen(embedder.model, embedder.trainable, embedder.backbone, prompts={"query": "Find:"})
    made = Endpoints(prompted, settings, "tiny", None)
    yield made
    made.engine.batcher.close()


def test_embeddings_are_served_while_decoding_is_compiled(endpoints):
    ask = ask_in_process(endpoints)

    def statuses():
        bodies = {"/v1/embeddings": {"input": "a"}, "/embed": {"inputs": "a"}, "/v1/decode": {"input": "a"}}
        found = {path: ask("POST", path, json.dumps(body)).status_code for path, body in bodies.items()}
        soft = {"input": "a", "soft_prompts": True}
        return [*found.values(), ask("POST", "/v1/embeddings", json.dumps(soft)).status_code]

    def health():
        response = ask("GET", "/health")
        lines = ask("GET", "/metrics").text.splitlines()
        gauges = [float(line.split()[1]) for line in lines if line.startswith("llm2vec_gen_") and "ready " in line]
        return response.status_code, *response.json().values(), *gauges

    assert statuses() == [503] * 4 and health() == (503, "compiling", "compiling", 0, 0)
    endpoints.ready = True
    assert statuses() == [200, 200, 503, 503] and health() == (200, "ok", "compiling", 1, 0)
    endpoints.decoding_ready = True
    assert statuses() == [200] * 4 and health() == (200, "ok", "ok", 1, 1)
    endpoints.config.decode.enabled, endpoints.decoding_ready = False, False
    assert health() == (200, "ok", "disabled", 1, 0)


@pytest.fixture
def log_compiles():
    """JAX logs what it traces and compiles, in all threads."""
    jax.config.update("jax_log_compiles", True)
    yield
    jax.config.update("jax_log_compiles", False)


def test_compilation_runs_nothing_and_no_request_compiles(endpoints, caplog, log_compiles):
    engine = endpoints.engine
    with jax.no_execution(True):
        assert engine.compile_decoding() == 7  # 6 shapes of texts, one of soft prompts
    engine.compile_decoding()  # for JAX, programs that may be executed are others
    caplog.clear()
    for texts in (["one"], ["a text of forty tokens or nearly so"] * 9):
        results = engine.embed(engine.tokenize(texts, ""), True).result(60)
    engine.decode([prompts for _, prompts in results[:2]], 2, 0).result(60)
    assert not caplog.messages


def test_prompts_by_name(endpoints):
    endpoints.ready, ask = True, ask_in_process(endpoints)
    found = ask("POST", "/embed", json.dumps({"inputs": ["me"], "prompt_name": "query", "normalize": False})).json()
    np.testing.assert_allclose(found, endpoints.model.encode(["Find: me"]), atol=1e-5)
    refused = ask("POST", "/embed", json.dumps({"inputs": ["me"], "prompt_name": "quary"}))
    assert refused.status_code == 422 and "did you mean 'query'" in refused.json()["error"]
