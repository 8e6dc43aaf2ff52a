"""The HTTP endpoints of the server: the embeddings APIs of OpenAI and TEI, decoding, health and metrics.

Requests and errors have the shape of https://platform.openai.com/docs/api-reference/embeddings; those of /embed and
/info have TEI's (tei_api).
"""

import asyncio
import hmac
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from llm2vec_gen_jax import __version__
from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError, one_line, quote
from llm2vec_gen_jax.config import ServeConfig
from llm2vec_gen_jax.inference import postprocess
from llm2vec_gen_jax.serving import access_log, openai_api, tei_api
from llm2vec_gen_jax.serving.batcher import QueueFull
from llm2vec_gen_jax.serving.engine import ROW, Engine
from llm2vec_gen_jax.serving.openai_api import RequestError, to_response
from llm2vec_gen_jax.serving.telemetry import Telemetry

_LONG_BODY = 1 << 16  # bytes; longer bodies are parsed in a thread
_Handler = Callable[[Request], Awaitable[Response]]


class Endpoints:
    """Request handlers of a model. name: the model's name in requests; key: the required API key, if any.

    in_flight: the number of requests being read or answered. ready: whether embeddings are served. decoding_ready:
    whether /v1/decode and soft prompts are. cancelled: whether cancel_requests was called.
    """

    def __init__(self, model: LLM2VecGen, config: ServeConfig, name: str, key: str | None) -> None:
        self.model, self.config, self.name, self.key = model, config, name, key
        self.created, self.in_flight, self.ready, self.decoding_ready = int(time.time()), 0, False, False
        self.telemetry = Telemetry(
            waiting=lambda: self.engine.batcher.waiting,
            in_flight=lambda: self.in_flight,
            ready=lambda: self.ready,
            decoding_ready=lambda: self.decoding_ready,
        )
        self.engine = Engine(model, config, self.telemetry.batch)
        self._tasks: set[asyncio.Task] = set()
        self.cancelled = False

    def app(self, lifespan: Any = None) -> Starlette:
        """Returns the ASGI application. lifespan: an asynchronous context manager around its lifetime."""
        embed = self._endpoint(self.embed, tei_api.error_response)
        routes = [
            Route("/v1/embeddings", self._endpoint(self.embeddings), methods=["POST"]),
            Route("/v1/models", self._endpoint(self.models)),
            Route("/v1/models/{name:path}", self._endpoint(self.models)),
            Route("/embed", embed, methods=["POST"]),
            Route("/", embed, methods=["POST"]),  # where InferenceClient(base_url) of huggingface_hub posts
            Route("/info", self._endpoint(self.info, tei_api.error_response)),
            Route("/health", self.health),
            Route("/metrics", self.telemetry.page),
        ]
        if self.config.decode.enabled:
            routes.append(Route("/v1/decode", self._endpoint(self.decode), methods=["POST"]))
        return Starlette(routes=routes, exception_handlers={HTTPException: self._not_found}, lifespan=lifespan)

    def cancel_requests(self) -> None:
        """Ends all requests that are being read or answered with status 503."""
        self.cancelled = True
        for task in self._tasks:
            task.cancel()

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings: OpenAI's API, extended by `instruction` and `soft_prompts`."""
        body = await self._read(request, openai_api.EMBEDDING_KEYS)
        size = openai_api.dimensions_of(body, self.model.get_embedding_dimension())
        encoding, soft = body.get("encoding_format", "float"), body.get("soft_prompts", False)
        if encoding not in ("float", "base64"):
            message = f"'encoding_format' must be float or base64, not {quote(encoding)}"
            raise RequestError(400, message, param="encoding_format")
        if soft and not self.config.decode.enabled:
            raise RequestError(400, "decoding is disabled on this server (decode.enabled=false)", param="soft_prompts")
        if soft:
            self._require_decoding()
        limit = min(self.config.max_inputs, self.config.decode.max_inputs) if soft else self.config.max_inputs
        ids = await self._tokenize(request, openai_api.texts_of(body.get("input"), limit), self._instruction(body))
        results = await self._result(request, "input", self.engine.embed(ids, soft))
        encode = openai_api.to_base64 if encoding == "base64" else np.ascontiguousarray
        return await asyncio.to_thread(self._embeddings_response, ids, results, size, encode, soft)

    def _embeddings_response(
        self,
        ids: Sequence[np.ndarray],
        results: Sequence[Any],
        size: int | None,
        encode: Callable[[np.ndarray], Any],
        soft: bool,
    ) -> Response:
        embeddings = np.stack([row[0] if soft else row for row in results])
        data: list[dict[str, Any]] = [
            {"object": "embedding", "index": number, "embedding": encode(row)}
            for number, row in enumerate(postprocess.finish(embeddings, size, self.config.normalize))
        ]
        if soft:
            for item, (_, prompts) in zip(data, results):
                item["soft_prompts"] = encode(prompts)
        tokens = self._count_embedded(ids)
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        content = {"object": "list", "data": openai_api.to_fragments(data), "model": self.name, "usage": usage}
        return to_response(content)

    def _count_embedded(self, ids: Sequence[np.ndarray]) -> int:
        """Counts embedded texts. Returns the number of their tokens."""
        tokens = sum(map(len, ids))
        self.telemetry.embedded(len(ids), tokens)
        return tokens

    async def embed(self, request: Request) -> Response:
        """POST /embed: TEI's API."""
        body = await self._read(request, tei_api.EMBED_KEYS)
        size = openai_api.dimensions_of(body, self.model.get_embedding_dimension())
        tei_api.check_truncation_direction(body)
        prompt = tei_api.prompt_of(body, self.model.prompts, self.config.instruction)
        texts = tei_api.texts_of(body, self.config.max_inputs)
        ids = await self._tokenize(request, texts, prompt, body.get("truncate"))
        results = await self._result(request, "inputs", self.engine.embed(ids))
        return await asyncio.to_thread(self._embed_response, ids, results, size, body.get("normalize", True))

    def _embed_response(
        self, ids: Sequence[np.ndarray], results: Sequence[Any], size: int | None, normalize: bool
    ) -> Response:
        self._count_embedded(ids)
        return to_response(openai_api.to_fragments(postprocess.finish(np.stack(results), size, normalize)))

    async def info(self, request: Request) -> Response:
        """GET /info: TEI's description of the model and the limits."""
        config = self.config
        content = {
            "model_id": self.name,
            "model_sha": None,
            "model_dtype": self.model.backbone.dtype,
            "served_model_name": self.name,
            "model_type": {"embedding": {"pooling": "mean"}},
            "max_concurrent_requests": config.max_requests,
            "max_input_length": self.engine.limit,
            "max_batch_tokens": config.batch_size * ROW,
            "max_batch_requests": None,
            "max_client_batch_size": config.max_inputs,
            "auto_truncate": config.truncate,
            "tokenization_workers": 1,
            "version": __version__,
            "sha": None,
            "docker_label": None,
        }
        return to_response(content)

    async def decode(self, request: Request) -> Response:
        """POST /v1/decode: the text decoded from the soft prompts of texts, or from soft prompts."""
        self._require_decoding()
        body = await self._read(request, openai_api.DECODING_KEYS)
        settings = self.config.decode
        if ("input" in body) == ("soft_prompts" in body):
            raise RequestError(
                400,
                "give one of 'input' (texts) and 'soft_prompts' (from /v1/embeddings with \"soft_prompts\": true); "
                "embeddings, which are means over the soft prompts, cannot be decoded",
            )
        max_tokens = body.get("max_tokens", settings.max_new_tokens)
        if not 1 <= max_tokens <= settings.max_new_tokens:
            raise RequestError(400, f"'max_tokens' must be between 1 and {settings.max_new_tokens}", param="max_tokens")
        prompt_tokens, key = 0, "input" if "input" in body else "soft_prompts"
        if key == "input":
            texts = openai_api.texts_of(body["input"], settings.max_inputs)
            ids = await self._tokenize(request, texts, self._instruction(body))
            prompt_tokens = sum(map(len, ids))
            prompts = [prompts for _, prompts in await self._result(request, key, self.engine.embed(ids, True))]
        else:
            openai_api.check_count(body["soft_prompts"], settings.max_inputs, "soft_prompts")
            shape = self.model.model.num_tokens, self.model.model.architecture.hidden_size
            prompts = await asyncio.to_thread(openai_api.soft_prompts_of, body["soft_prompts"], shape)
        rows = await self._result(request, key, self.engine.decode(prompts, max_tokens, body.get("seed", 0)))
        rows = [row[:max_tokens] for row in rows]
        texts = [self.model.backbone.tokenizer.decode(row) for row in rows]
        data = [{"object": "decoding", "index": number, "text": text} for number, text in enumerate(texts)]
        new_tokens = sum(map(len, rows))
        total = prompt_tokens + new_tokens
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens, "total_tokens": total}
        request.state.inputs, request.state.tokens = len(rows), total
        return to_response({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def models(self, request: Request) -> Response:
        """GET /v1/models and /v1/models/NAME."""
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "llm2vec_gen_jax"}
        name = request.path_params.get("name")
        if name is None:
            return to_response({"object": "list", "data": [model]})
        if name != self.name:
            raise openai_api.unknown_model(name, self.name)
        return to_response(model)

    async def health(self, request: Request) -> Response:
        """GET /health: 503 until embeddings are served, then 200. `decoding`: whether /v1/decode is served too."""
        decoding = "ok" if self.decoding_ready else "compiling" if self.config.decode.enabled else "disabled"
        status = "ok" if self.ready else "compiling"
        return to_response({"status": status, "decoding": decoding}, 200 if self.ready else 503)

    def _endpoint(
        self, handler: _Handler, error_response: Callable[[RequestError], Response] = openai_api.error_response
    ) -> _Handler:
        async def respond(request: Request) -> Response:
            started, self.in_flight = time.monotonic(), self.in_flight + 1
            task = asyncio.current_task()
            assert task is not None
            self._tasks.add(task)
            try:
                self._check_admission(request)
                response = await handler(request)
            except ClientDisconnect:
                response = Response(status_code=499)  # only counted
            except asyncio.CancelledError:
                if not self.cancelled:
                    raise
                task.uncancel()
                message = f"the server is stopping: the request took longer than {self.config.shutdown_timeout} s"
                response = error_response(RequestError(503, message, "stopping"))
            except Exception as error:
                response = error_response(_to_request_error(error))
            finally:
                self.in_flight -= 1
                self._tasks.discard(task)
            seconds = time.monotonic() - started
            self.telemetry.request(handler.__name__, response.status_code, seconds)
            if self.config.access_log:
                access_log.log(request, response.status_code, seconds)
            return response

        return respond

    def _check_admission(self, request: Request) -> None:
        if self.key is not None:
            scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(credentials.strip().encode(), self.key.encode()):
                raise RequestError(401, "no valid API key: send `Authorization: Bearer KEY`", "invalid_api_key")
        if request.method == "POST" and not self.ready:
            raise RequestError(503, "the model is being compiled; /health returns 200 when it is ready", "not_ready")
        if self.in_flight > self.config.max_requests:
            raise RequestError(429, f"more than {self.config.max_requests} concurrent requests", "rate_limit_exceeded")

    async def _read(self, request: Request, keys: Mapping[str, type]) -> dict[str, Any]:
        """Returns the JSON object in the body of a request, checked against `keys` (name -> type)."""
        too_large = RequestError(
            413, f"a request must not exceed {self.config.max_body_bytes} bytes", "request_too_large"
        )
        if int(request.headers.get("content-length", 0)) > self.config.max_body_bytes:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.config.client_timeout):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > self.config.max_body_bytes:
                        raise too_large
        except TimeoutError:
            raise RequestError(408, f"the request was not received within {self.config.client_timeout:g} s") from None
        if len(body) < _LONG_BODY:
            return openai_api.parse(body, keys, self.name)
        return await asyncio.to_thread(openai_api.parse, body, keys, self.name)

    def _require_decoding(self) -> None:
        if not self.decoding_ready:
            raise RequestError(503, "decoding is being compiled; /health says when it is ready", "not_ready")

    def _instruction(self, body: Mapping[str, Any]) -> str:
        instruction: str = body.get("instruction", self.config.instruction)
        return instruction

    async def _tokenize(
        self, request: Request, texts: Sequence[str], instruction: str, truncate: bool | None = None
    ) -> list[np.ndarray]:
        ids = await asyncio.to_thread(self.engine.tokenize, texts, instruction, truncate)
        request.state.inputs, request.state.tokens = len(ids), sum(map(len, ids))
        return ids

    async def _result(self, request: Request, key: str, future: Future) -> Any:
        """Waits for the results of the inputs in `key`. Raises if the client disconnects or the time limit passes."""
        work = asyncio.wrap_future(future)
        disconnected = asyncio.ensure_future(request.receive())  # the body was read: the next message is a disconnect
        try:
            timeout = self.config.request_timeout
            await asyncio.wait({work, disconnected}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return self.engine.require_finite(work.result(), key)
            if disconnected.done():
                raise ClientDisconnect
            raise RequestError(503, f"no result within {timeout:g} s", "timeout")
        finally:
            disconnected.cancel()
            work.cancel()

    async def _not_found(self, request: Request, error: Any) -> Response:
        if self.config.access_log:
            access_log.log(request, error.status_code)
        message = f"{request.method} {one_line(request.url.path, 200)}: {error.detail}"
        return openai_api.error_response(RequestError(error.status_code, message, "unknown_url"))


def _to_request_error(error: Exception) -> RequestError:
    """Returns the error of the response for an exception of a handler; prints the traceback of an unexpected one."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, InputError):
        return RequestError(400, str(error))
    if isinstance(error, QueueFull):
        return RequestError(429, f"too busy: {error}", "rate_limit_exceeded")
    traceback.print_exception(error)
    return RequestError(500, "internal error; see the log of the server")
