"""The server process of `python -m launch.serve`: socket, compilation and graceful shutdown."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from llm2vec_gen_jax.api import load_configured_model
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import ServeConfig
from llm2vec_gen_jax.serving import access_log
from llm2vec_gen_jax.serving.endpoints import Endpoints

KEY_VARIABLE = "LLM2VEC_GEN_API_KEY"
_RESPONSE_SECONDS = 2  # for clients to read the response that the server is stopping


def serve(path: str, config: ServeConfig) -> None:
    """Loads a model, listens, compiles all programs and serves until SIGTERM or SIGINT.

    Programs of embeddings are compiled first, and served while those of decoding are compiled.

    Raises InputError for an invalid model, address or API key.
    """
    key = os.environ.get(KEY_VARIABLE)
    if key is not None and not key.strip():
        raise InputError(f"{KEY_VARIABLE} is empty: set it to a key, or unset it to serve without authentication")
    if key is not None and not (key.isascii() and key.strip().isprintable()):
        raise InputError(f"{KEY_VARIABLE} must be of printable ASCII characters: HTTP headers cannot contain others")
    with _bind(config) as listener:  # before the model is loaded, so that a port in use is reported at once
        model = load_configured_model(path, config)
        endpoints = Endpoints(model, config, config.name or path, key and key.strip())
        listener.listen()  # before the address is printed: connections are accepted from then on
        host, port = listener.getsockname()[:2]
        print(f"serving {endpoints.name} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
        if key is None and host not in ("127.0.0.1", "::1"):
            print(f"note: requests need no authentication; set {KEY_VARIABLE} to require an API key", flush=True)
        Server(endpoints).run(listener)


class Server:
    """Serves Endpoints on a socket until a signal."""

    def __init__(self, endpoints: Endpoints) -> None:
        self.endpoints, self.config = endpoints, endpoints.config
        self._failure: BaseException | None = None
        self._compilation = threading.Thread(target=self._compile, daemon=True)

    def run(self, listener: socket.socket) -> None:
        """Serves on a listening socket until SIGTERM or SIGINT. Raises what failed in the compilation."""
        settings = uvicorn.Config(
            self.endpoints.app(self._lifespan),
            http=_protocol_class(self.config.client_timeout),
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=self.config.client_timeout,  # type: ignore[arg-type]  # fractions are accepted
            timeout_graceful_shutdown=self.config.shutdown_timeout + _RESPONSE_SECONDS,
        )
        logging.getLogger("uvicorn.error").addFilter(_is_not_cancellation)
        access_log.print_lines()
        self._uvicorn = _UvicornServer(settings, self.config.shutdown_timeout, self.endpoints.cancel_requests)
        # uvicorn handles both signals, and raises them again after its shutdown for the previous handlers.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        self._uvicorn.run(sockets=[listener])
        if self._failure:
            raise self._failure
        # In native code that cannot be interrupted:
        if self._compilation.is_alive() or self.endpoints.engine.batcher.busy:
            sys.stdout.flush()
            os._exit(0)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self._compilation.start()
        yield
        # Nobody waits for what is computed now: it may take no longer than a request would have been waited for.
        timeout = _RESPONSE_SECONDS if self.endpoints.cancelled else self.config.shutdown_timeout
        await asyncio.to_thread(self.endpoints.engine.batcher.close, timeout)

    def _compile(self) -> None:
        endpoints, started = self.endpoints, time.monotonic()
        try:
            count = endpoints.engine.compile_embedding() if self.config.warmup else 0
            endpoints.ready = True
            _report(f"ready: {count} programs compiled", started)
            if self.config.decode.enabled:
                count = endpoints.engine.compile_decoding() if self.config.warmup else 0
                endpoints.decoding_ready = True
                _report(f"ready to decode: {count} more programs compiled", started)
        except BaseException as error:
            self._failure, self._uvicorn.should_exit = error, True


class _UvicornServer(uvicorn.Server):
    """Calls on_timeout() `timeout` seconds after a signal; at uvicorn's own limit, clients get no response."""

    def __init__(self, settings: uvicorn.Config, timeout: float, on_timeout: Callable[[], None]) -> None:
        super().__init__(settings)
        self.timeout, self.on_timeout = timeout, on_timeout

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timer = asyncio.get_running_loop().call_later(self.timeout, self.on_timeout)
        await super().shutdown(sockets)
        timer.cancel()


def _report(event: str, started: float) -> None:
    """Prints an event with the seconds since `started`. The server goes on if nobody reads its output."""
    with contextlib.suppress(OSError):
        print(f"{event} in {time.monotonic() - started:.1f} s", flush=True)


def _is_not_cancellation(record: logging.LogRecord) -> bool:
    """Whether a log record is about anything but a cancelled request, whose client does not read the response."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def _protocol_class(timeout: float) -> type[H11Protocol]:
    """Returns uvicorn's HTTP/1.1 protocol with a time limit for incomplete requests and unread responses."""

    class Protocol(H11Protocol):
        deadline: Any = None

        def connection_made(self, transport):
            super().connection_made(transport)
            self._restart_timer()

        def on_response_complete(self):
            super().on_response_complete()
            self._restart_timer()

        def connection_lost(self, error):
            super().connection_lost(error)
            self.deadline.cancel()

        def _restart_timer(self):
            if self.deadline:
                self.deadline.cancel()
            self.deadline = self.loop.call_later(timeout, self._abort_if_idle, self.cycle)

        def _abort_if_idle(self, cycle):
            if self.cycle is None or self.cycle is cycle and cycle.response_complete:  # no new request since
                self.transport.abort()

    return Protocol


def _bind(config: ServeConfig) -> socket.socket:
    """Returns a bound socket that does not listen yet."""
    listener = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except (OSError, OverflowError) as error:
        listener.close()
        raise InputError(f"host={config.host} port={config.port}: cannot listen there ({error})") from None
    return listener
