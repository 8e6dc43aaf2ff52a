"""The settings of the server."""

import dataclasses

from llm2vec_gen_jax.config.common import BACKBONE_DTYPES, KernelsConfig, MeshConfig, section, setting


@dataclasses.dataclass
class DecodeSettings:
    """/v1/decode: text out of embeddings."""

    enabled: bool = setting(True, "offer /v1/decode, and soft_prompts in /v1/embeddings")
    batch_size: int = setting(8, "texts that are decoded together", least=1)
    max_inputs: int = setting(64, "of one request", least=1)
    max_new_tokens: int = setting(128, "tokens of a decoded text; a request's max_tokens can be less", least=1)
    temperature: float = setting(0.0, "0: greedy")
    top_p: float = setting(1.0, "nucleus of the sampling", most=1)


@dataclasses.dataclass
class ServeConfig:
    """`python -m launch.serve MODEL`: OpenAI's /v1/embeddings and /v1/models, and /v1/decode, over HTTP.

    Requests that wait are encoded together. /health answers 200 when everything is compiled, /metrics is for
    Prometheus. Where the environment has LLM2VEC_GEN_API_KEY, /v1/ asks for it as a Bearer token. SIGTERM: what is in
    flight is finished, then the process ends with 0. Needs requirements-serve.txt.
    """

    host: str = setting("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port: int = setting(8000, "to listen on; 0: a free one, which is printed")
    name: str | None = setting(None, "of the model in requests and answers; null: MODEL as it was given")
    instruction: str = setting("", "put before every text, with one space, unless a request has its own")
    max_length: int = setting(512, "tokens of a text, the compression tokens included", least=1)
    truncate: bool = setting(True, "cut longer texts; false: refuse them")
    normalize: bool = setting(False, "to unit length, after `dimensions`")
    batch_size: int = setting(32, "rows of 256 tokens that are encoded together; short texts share a row", least=1)
    max_wait_ms: float = setting(2.0, "how long a text waits for others while the model is idle")
    max_waiting: int = setting(4096, "texts that may wait; a request beyond is refused (429)", least=1)
    max_requests: int = setting(256, "requests at a time, unread ones included; others are refused (429)", least=1)
    max_inputs: int = setting(2048, "texts of one request (413)", least=1)
    max_body_bytes: int = setting(8 * 2**20, "bytes of one request (413)", least=1)
    client_timeout: float = setting(60.0, "seconds in which a client must have sent its request, and read the answer")
    request_timeout: float = setting(300.0, "seconds in which an answer must be there (503)")
    shutdown_timeout: int = setting(30, "seconds that what is in flight at SIGTERM may take", least=1)
    warmup: bool = setting(True, "compile every shape at the start, not when it is first needed")
    decode: DecodeSettings = section(DecodeSettings)
    dtype: str = setting("auto", "of the backbone", BACKBONE_DTYPES)
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)
