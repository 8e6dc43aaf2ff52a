"""Responses of a server with OpenAI's chat completions API: vLLM, SGLang, llama.cpp, TGI, or a hosted service."""

import contextlib
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from llm2vec_gen_jax.common.errors import InputError, first_line, nearest, quote
from llm2vec_gen_jax.common.files import install_command
from llm2vec_gen_jax.config import RespondConfig, options

# The client waits 0.5 to 8 s before each, about a minute in total, or as long as the server asks, up to two minutes.
_RETRIES = 10

Sample = tuple[int, int]  # row of the records, number of the sample
Response = tuple[Sample, str, bool]  # sample, answer, whether the answer is truncated


class Server:
    """A respond.Engine that asks the server at config.endpoint for the model config.model, or for its only one.

    Busy and failing servers are retried. Raises InputError if there is no such server or model, for an invalid key, and
    for a request that is refused.
    """

    def __init__(self, config: RespondConfig, records: Sequence[dict[str, Any]]) -> None:
        options.require(config, "endpoint")
        try:
            import openai
        except ImportError as error:
            raise InputError(f"engine=openai needs the openai package: {install_command('openai')} ({error})") from None
        self.config, self.records, self.openai = config, records, openai
        self.client = openai.OpenAI(
            base_url=config.endpoint,
            api_key=os.environ.get(config.api_key_env) or "none",  # local servers accept any
            timeout=config.request_timeout,
            max_retries=_RETRIES,
            http_client=_http_client(),
        )
        try:
            models = [model.id for model in self.client.with_options(max_retries=0).models.list()]
        except openai.OpenAIError as error:
            raise self._problem(error) from None
        except (ValueError, TypeError, AttributeError) as error:  # not a list of models
            raise InputError(
                f"endpoint={config.endpoint}: no list of models at /models ({first_line(error)})"
            ) from None
        if config.model is None and len(models) != 1:
            raise InputError(f"model is required: {config.endpoint} has {', '.join(models[:20]) or 'none'}")
        self.model = config.model or models[0]
        if self.model not in models:
            suggestion, available = nearest(self.model, models), ", ".join(models[:20]) or "none"
            raise InputError(f"model={self.model}: not a model of {config.endpoint}{suggestion} (it has {available})")
        self.record = {"engine": "openai", "model": self.model}

    def respond(self, samples: Sequence[Sample], is_missing: Sequence[bool]) -> Iterator[list[Response]]:
        """Yields the responses in the order of completion, with config.concurrency requests at a time.

        After an error no request is started; the responses of those that run are yielded before it is raised.
        """
        missing: queue.SimpleQueue[Sample] = queue.SimpleQueue()
        for sample, needed in zip(samples, is_missing):
            if needed:
                missing.put(sample)
        results: queue.SimpleQueue[Response | Exception | None] = queue.SimpleQueue()  # None: a thread has ended
        stopped = threading.Event()

        def work() -> None:
            with contextlib.suppress(queue.Empty):
                while not stopped.is_set():
                    sample = missing.get_nowait()
                    try:
                        results.put(self._response(sample))
                    except Exception as error:
                        results.put(error)
                        stopped.set()
            results.put(None)

        threads = min(self.config.concurrency, missing.qsize())
        for _ in range(threads):
            # Daemon threads, because Python waits for others at exit: Ctrl-C would last as long as the requests.
            threading.Thread(target=work, daemon=True).start()
        failure = None
        try:
            while threads:
                try:
                    result = results.get(timeout=1)  # a signal just before an unlimited wait would be noticed after it
                except queue.Empty:
                    continue
                if result is None:
                    threads -= 1
                elif isinstance(result, Exception):
                    failure = failure or result
                else:
                    yield [result]
        finally:
            stopped.set()
        if failure:
            raise failure

    def _response(self, sample: Sample) -> Response:
        config, records, (row, number) = self.config, self.records, sample
        seed: Any = {"seed": (config.seed + row + number * len(records)) % 2**31} if config.temperature else {}
        try:
            completion = self.client.chat.completions.create(
                model=self.model,
                messages=[{"role": "user", "content": records[row]["question"]}],
                max_tokens=config.max_new_tokens,
                temperature=config.temperature,
                top_p=config.top_p,
                **seed,
            )
            choice = completion.choices[0]
            # JSON can contain unpaired surrogates, which no file can.
            answer = (choice.message.content or "").encode("utf-8", "replace").decode().strip()
            return sample, answer, choice.finish_reason in ("length", "content_filter")
        except self.openai.OpenAIError as error:
            raise self._problem(error, records[row]) from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"endpoint={config.endpoint}: not a chat completion ({first_line(error)})") from None

    def _problem(self, error: Exception, record: dict[str, Any] | None = None) -> InputError:
        """Returns the error of a failed request. record: that of the request."""
        endpoint, openai = f"endpoint={self.config.endpoint}", self.openai
        if isinstance(error, openai.APITimeoutError):
            return InputError(
                f"{endpoint}: no answer within request_timeout={self.config.request_timeout} seconds. Increase it, or "
                "decrease concurrency"
            )
        if isinstance(error, openai.APIConnectionError):
            cause = error.__cause__ or error
            return InputError(f"{endpoint}: no server there ({first_line(cause)}). Start it, then repeat the command")
        if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            return InputError(
                f"{endpoint}: the server rejects the key in the environment variable {self.config.api_key_env} "
                "(api_key_env=)"
            )
        if isinstance(error, openai.NotFoundError) and record is None:
            return InputError(f"{endpoint}: not the URL of an OpenAI API, which usually ends in /v1")
        of = f", question {record['id']!r}, {quote(record['question'])}" if record else ""
        return InputError(f"{endpoint}{of}: {first_line(error)}")


def _http_client() -> Any:
    """Returns an HTTP client with which the openai package does not repeat a request after request_timeout."""
    import openai

    class Client(openai.DefaultHttpxClient):
        def send(self, request: Any, **options: Any) -> Any:
            try:
                return super().send(request, **options)
            except Exception as error:
                if type(error).__name__ == "ReadTimeout":  # of httpx or httpx2, whichever openai uses
                    raise openai.APITimeoutError(request=request) from error  # openai repeats no errors of its own
                raise

    return Client()
