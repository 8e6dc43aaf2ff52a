"""The HTTP side of `python -m launch.serve`: OpenAI's embeddings API, decoding, health and metrics.

Requests and errors have the shape of https://platform.openai.com/docs/api-reference/embeddings.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import signal
import socket
import sys
import threading
import time
import traceback

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError, one_line, quote
from llm2vec_gen_jax.inference import postprocess
from llm2vec_gen_jax.serving import openai_api
from llm2vec_gen_jax.serving.batcher import QueueFull
from llm2vec_gen_jax.serving.engine import Engine
from llm2vec_gen_jax.serving.openai_api import RequestError, to_response
from llm2vec_gen_jax.serving.telemetry import Telemetry

KEY_VARIABLE = "LLM2VEC_GEN_API_KEY"
_LONG_BODY = 1 << 16  # bytes: parsed in a thread
_LAST_ANSWERS = 2  # seconds in which clients must read the answer that the server is stopping


def serve(path, config):
    """Loads a model, listens, compiles, and answers until SIGTERM or SIGINT. config: a ServeConfig.

    Raises InputError for a model, an address or an API key that cannot be used.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        raise InputError(f"{KEY_VARIABLE} is empty: give it a value, or unset it to serve without a key")
    if key is not None and not (key.isascii() and key.strip().isprintable()):
        raise InputError(
            f"{KEY_VARIABLE} must be of printable ASCII characters: clients cannot send others in a header"
        )
    with _bound(config) as listener:  # before the model is loaded: a taken port is known at once
        model = LLM2VecGen.from_pretrained(path, config.dtype, mesh=config.mesh, attention=config.kernels.attention)
        server = Server(model, config, config.name or path, key and key.strip())
        listener.listen()  # from the line on that names the address: who connects waits for the first answer
        host, port = listener.getsockname()[:2]
        print(f"serving {server.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        if key is None and host not in ("127.0.0.1", "::1"):
            print(f"note: anyone who reaches this address can use it; set {KEY_VARIABLE} to ask for a key", flush=True)
        server.run(listener)


class Server:
    """A model behind HTTP. name: what requests call it. key: what they must bring, if anything."""

    def __init__(self, model, config, name, key):
        self.model, self.config, self.name, self.key = model, config, name, key
        self.telemetry = Telemetry(self)
        self.engine = Engine(model, config, self.telemetry.batch)
        self.created, self.in_flight, self.tasks = int(time.time()), 0, set()
        self.ready, self.failure, self.expired = False, None, False
        routes = [
            Route("/v1/embeddings", self._endpoint(self.embeddings), methods=["POST"]),
            Route("/v1/models", self._endpoint(self.models)),
            Route("/v1/models/{name:path}", self._endpoint(self.models)),
            Route("/health", self.health),
            Route("/metrics", self.telemetry.page),
        ]
        if config.decode.enabled:
            routes.append(Route("/v1/decode", self._endpoint(self.decode), methods=["POST"]))
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: _not_found}, lifespan=self._lifespan)

    def run(self, listener):
        """Answers on a bound socket until SIGTERM or SIGINT."""
        settings = uvicorn.Config(
            self.app,
            http=_protocol(self.config.client_timeout),
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=self.config.client_timeout,
            timeout_graceful_shutdown=self.config.shutdown_timeout + _LAST_ANSWERS,
        )
        logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
        self.uvicorn = _UvicornServer(settings, self.config.shutdown_timeout, self._expire)
        # uvicorn catches both, and when all is finished raises them again for whoever was there before.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self.uvicorn.run(sockets=[listener])
        if self.failure:
            raise self.failure
        if not self.ready or self.engine.batcher.busy:  # in native code, which cannot be interrupted, for nobody
            sys.stdout.flush()
            os._exit(0)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app):
        threading.Thread(target=self._warmup, daemon=True).start()
        yield
        await asyncio.to_thread(self.engine.batcher.close, _LAST_ANSWERS if self.expired else None)

    def _expire(self):
        """Ends all requests that are being read or answered."""
        self.expired = True
        for task in self.tasks:
            task.cancel()

    def _warmup(self):
        started = time.monotonic()
        try:
            count = self.engine.warmup() if self.config.warmup else 0
        except BaseException as error:
            self.failure, self.uvicorn.should_exit = error, True
            return
        self.ready = True
        print(f"ready: {count} programs compiled in {time.monotonic() - started:.1f} s", flush=True)

    # What is common to all requests

    def _endpoint(self, handler):
        async def answer(request):
            started, self.in_flight = time.monotonic(), self.in_flight + 1
            self.tasks.add(task := asyncio.current_task())
            try:
                self._admit(request)
                response = await handler(request)
            except RequestError as refused:
                response = refused.response()
            except InputError as error:
                response = RequestError(400, str(error)).response()
            except ClientDisconnect:
                response = Response(status_code=499)  # nobody reads it; for the metrics
            except asyncio.CancelledError:
                if not self.expired:
                    raise
                task.uncancel()
                message = f"the server is stopping, and gave this request {self.config.shutdown_timeout} s"
                response = RequestError(503, message, "stopping").response()
            except Exception:
                traceback.print_exc()
                response = RequestError(500, "the server failed on this request; its log says how").response()
            finally:
                self.in_flight -= 1
                self.tasks.discard(task)
            self.telemetry.request(handler.__name__, response.status_code, time.monotonic() - started)
            return response

        return answer

    def _admit(self, request):
        if self.key is not None:
            scheme, _, given = request.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), self.key.encode()):
                raise RequestError(401, "no valid API key: send `Authorization: Bearer KEY`", "invalid_api_key")
        if request.method == "POST" and not self.ready:
            raise RequestError(503, "the model is being compiled; /health says when it is ready", "not_ready")
        if self.in_flight > self.config.max_requests:
            raise RequestError(429, f"more than {self.config.max_requests} requests at a time", "rate_limit_exceeded")

    async def _read(self, request, keys):
        """Returns the object that a request holds, checked to have only these keys (name -> type)."""
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
            raise RequestError(408, f"the request took longer than {self.config.client_timeout:g} s to come") from None
        if len(body) < _LONG_BODY:
            return openai_api.parse(body, keys, self.name)
        return await asyncio.to_thread(openai_api.parse, body, keys, self.name)

    async def _ids(self, texts, body):
        instruction = body.get("instruction", self.config.instruction)
        return await asyncio.to_thread(self.engine.tokenize, texts, instruction)

    async def _result(self, request, key, submit, *options):
        """Returns the results of submit(*options), of `key`, unless the queue is full or the client leaves."""
        try:
            work = asyncio.wrap_future(submit(*options))
        except QueueFull as full:
            raise RequestError(429, f"too busy: {full}", "rate_limit_exceeded") from None
        gone = asyncio.ensure_future(request.receive())  # the body was read: what comes next is the end
        try:
            timeout = self.config.request_timeout
            await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                return self.engine.check(work.result(), key)
            if gone.done():
                raise ClientDisconnect
            raise RequestError(503, f"no answer within {timeout:g} s", "timeout")
        finally:
            gone.cancel()
            work.cancel()

    # The endpoints

    async def embeddings(self, request):
        """POST /v1/embeddings: OpenAI's, with `instruction` and `soft_prompts` besides."""
        body = await self._read(request, openai_api.EMBEDDING_KEYS)
        size, most = body.get("dimensions"), self.model.get_embedding_dimension()
        if size is not None and not 1 <= size <= most:
            raise RequestError(400, f"'dimensions' must be within 1 and {most}, found {size}", param="dimensions")
        encoding, soft = body.get("encoding_format", "float"), body.get("soft_prompts", False)
        if encoding not in ("float", "base64"):
            message = f"'encoding_format' must be float or base64, not {quote(encoding)}"
            raise RequestError(400, message, param="encoding_format")
        if soft and not self.config.decode.enabled:
            raise RequestError(400, "this server does not decode (decode.enabled=false)", param="soft_prompts")
        most = min(self.config.max_inputs, self.config.decode.max_inputs) if soft else self.config.max_inputs
        ids = await self._ids(openai_api.texts_of(body.get("input"), most), body)
        found = await self._result(request, "input", self.engine.embed, ids, soft)
        return await asyncio.to_thread(self._embeddings, ids, found, size, encoding, soft)

    def _embeddings(self, ids, found, size, encoding, soft):
        show = openai_api.to_base64 if encoding == "base64" else np.ascontiguousarray
        embeddings = np.stack([row[0] if soft else row for row in found])
        data = [
            {"object": "embedding", "index": number, "embedding": show(row)}
            for number, row in enumerate(postprocess.finish(embeddings, size, self.config.normalize))
        ]
        if soft:
            for item, (_, prompts) in zip(data, found):
                item["soft_prompts"] = show(prompts)
        read = sum(map(len, ids))
        self.telemetry.read(len(ids), read)
        usage = {"prompt_tokens": read, "total_tokens": read}
        data = openai_api.to_list(data)
        return to_response({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def decode(self, request):
        """POST /v1/decode: the text that the LLM reads out of texts' embeddings, or of soft prompts."""
        body = await self._read(request, openai_api.DECODING_KEYS)
        settings = self.config.decode
        if ("input" in body) == ("soft_prompts" in body):
            raise RequestError(
                400,
                "give one of 'input' (texts) and 'soft_prompts' (of /v1/embeddings with \"soft_prompts\": true); "
                "an embedding alone, their mean, cannot be decoded",
            )
        most = body.get("max_tokens", settings.max_new_tokens)
        if not 1 <= most <= settings.max_new_tokens:
            raise RequestError(400, f"'max_tokens' must be within 1 and {settings.max_new_tokens}", param="max_tokens")
        read = 0
        if "input" in body:
            ids = await self._ids(openai_api.texts_of(body["input"], settings.max_inputs), body)
            read = sum(map(len, ids))
            prompts = [prompts for _, prompts in await self._result(request, "input", self.engine.embed, ids, True)]
        else:
            openai_api.check_count(body["soft_prompts"], settings.max_inputs, "soft_prompts")
            shape = self.model.model.num_tokens, self.model.model.architecture.hidden_size
            prompts = await asyncio.to_thread(openai_api.soft_prompts_of, body["soft_prompts"], shape)
        (key,) = body.keys() & {"input", "soft_prompts"}
        rows = await self._result(request, key, self.engine.decode, prompts, most, body.get("seed", 0))
        rows = [row[:most] for row in rows]
        texts = [self.model.backbone.tokenizer.decode(row) for row in rows]
        data = [{"object": "decoding", "index": number, "text": text} for number, text in enumerate(texts)]
        written = sum(map(len, rows))
        usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
        return to_response({"object": "list", "data": data, "model": self.name, "usage": usage})

    async def models(self, request):
        """GET /v1/models and /v1/models/NAME."""
        model = {"id": self.name, "object": "model", "created": self.created, "owned_by": "llm2vec_gen_jax"}
        name = request.path_params.get("name")
        if name is None:
            return to_response({"object": "list", "data": [model]})
        if name != self.name:
            raise openai_api.unknown_model(name, self.name)
        return to_response(model)

    async def health(self, request):
        """GET /health: 200 when everything is compiled, 503 before."""
        return to_response({"status": "ok" if self.ready else "compiling"}, 200 if self.ready else 503)


class _UvicornServer(uvicorn.Server):
    """Calls expire() `timeout` seconds after a signal: at its own limit, uvicorn cuts connections without an answer."""

    def __init__(self, settings, timeout, expire):
        super().__init__(settings)
        self.timeout, self.expire = timeout, expire

    async def shutdown(self, sockets=None):
        expiry = asyncio.get_running_loop().call_later(self.timeout, self.expire)
        await super().shutdown(sockets)
        expiry.cancel()


def _is_no_cancellation(record):
    """Whether a log record is of anything but a request that was cancelled: a client that reads no answer."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _protocol(timeout):
    """HTTP/1.1 of uvicorn, which has no limit for requests that never come whole, nor for answers nobody reads."""

    class Protocol(H11Protocol):
        deadline = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self._wait()

        def on_response_complete(self):
            super().on_response_complete()
            self._wait()

        def connection_lost(self, error):
            super().connection_lost(error)
            self.deadline.cancel()

        def _wait(self):
            if self.deadline:
                self.deadline.cancel()
            self.deadline = self.loop.call_later(timeout, self._expire, self.cycle)

        def _expire(self, cycle):
            if self.cycle is None or self.cycle is cycle and cycle.response_complete:  # no request has begun since
                self.transport.abort()

    return Protocol


def _bound(config):
    """Returns a socket that is bound and does not listen yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"host={config.host} port={config.port}: cannot listen there ({error})") from None
    return listener


async def _not_found(request, error):
    message = f"{request.method} {one_line(request.url.path, 200)}: {error.detail}"
    return RequestError(error.status_code, message, "unknown_url").response()
