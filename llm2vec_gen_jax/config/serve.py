"""Settings of the server."""

import dataclasses
from typing import ClassVar

from llm2vec_gen_jax.config.common import (
    BACKBONE_DTYPES,
    DTYPE_HELP,
    KernelsConfig,
    MeshConfig,
    ModelHubConfig,
    section,
    setting,
)


@dataclasses.dataclass
class DecodeSettings:
    """Settings of /v1/decode, which decodes embeddings into text."""

    enabled: bool = setting(True, "enable /v1/decode, and soft_prompts in /v1/embeddings")
    batch_size: int = setting(8, "texts per decoding batch", least=1)
    max_inputs: int = setting(64, "maximum inputs per decode request", least=1)
    max_new_tokens: int = setting(128, "maximum tokens per decoded text; a request's max_tokens can lower it", least=1)
    temperature: float = setting(0.0, "sampling temperature; 0: greedy decoding")
    top_p: float = setting(1.0, "nucleus sampling probability", most=1)


@dataclasses.dataclass
class ServeConfig(ModelHubConfig):
    """`python -m launch.serve MODEL`: serve embeddings over HTTP with the APIs of OpenAI and TEI, and decode them.

    That is /v1/embeddings and /v1/models, /embed and /info of Hugging Face's text-embeddings-inference, and /v1/decode.
    Concurrent requests are batched. /health returns 200 once embeddings are served; programs that decode are compiled
    after those. /metrics is for Prometheus. If the environment variable LLM2VEC_GEN_API_KEY is set, all other paths
    require it as a Bearer token. On SIGTERM, the server completes the requests in flight and exits with code 0.
    Requires requirements-serve.txt.
    """

    EXAMPLE: ClassVar = "smollm2-135m port=8000"

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all interfaces")
    port: int = setting(8000, "port to listen on; 0: any free port, which is printed")
    name: str | None = setting(None, "model name in requests and responses; null: MODEL as passed")
    instruction: str = setting(
        "", "instruction prepended to every text, separated by a space, unless a request has its own"
    )
    max_length: int = setting(512, "maximum tokens per text, including the compression tokens", least=1)
    truncate: bool = setting(True, "truncate longer texts; false: reject them")
    normalize: bool = setting(False, "L2-normalize embeddings, after `dimensions`")
    batch_size: int = setting(32, "rows of 256 tokens per batch; short texts share a row", least=1)
    max_wait_ms: float = setting(2.0, "milliseconds a text waits for others to share its batch while the model is idle")
    max_waiting: int = setting(4096, "maximum texts in the queue; further requests are rejected (429)", least=1)
    max_requests: int = setting(
        256, "maximum concurrent requests, including unread ones; further requests are rejected (429)", least=1
    )
    max_inputs: int = setting(2048, "maximum texts per request (413)", least=1)
    max_body_bytes: int = setting(8 * 2**20, "maximum bytes per request body (413)", least=1)
    client_timeout: float = setting(60.0, "seconds a client has to send its request and to read the response")
    request_timeout: float = setting(300.0, "seconds within which a request must be answered (503)")
    shutdown_timeout: int = setting(30, "seconds that requests in flight have to complete after SIGTERM", least=1)
    warmup: bool = setting(True, "compile all shapes at startup instead of on first use")
    access_log: bool = setting(True, "print a line per request, as uvicorn, vLLM and TEI do; not for probes")
    decode: DecodeSettings = section(DecodeSettings)
    dtype: str = setting("auto", DTYPE_HELP, BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)
