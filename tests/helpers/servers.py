"""Server processes and requests to them, shared by the tests of the server."""

import asyncio
import contextlib
import json
import pathlib
import subprocess
import sys
import time

import pytest

from tests.helpers.processes import Process, environment

for needed in ("httpx", "orjson", "prometheus_client", "starlette", "uvicorn"):
    pytest.importorskip(needed, reason="needs requirements-serve.txt")
httpx = pytest.importorskip("httpx")

ROOT = pathlib.Path(__file__).parents[2]
MOST_NEW = 8
SMALL = ["port=0", "name=tiny", "max_length=100", "batch_size=2", "access_log=false"]
SMALL += [f"decode.max_new_tokens={MOST_NEW}", "decode.batch_size=2"]


class Running:
    """A server in its own process. url: its address."""

    def __init__(self, folder, *arguments, key=None, stderr=None):
        command = [sys.executable, "-m", "launch.serve", str(folder), *SMALL, *arguments]
        self.process = Process(
            command,
            env=environment(**({"LLM2VEC_GEN_API_KEY": key} if key else {})),
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        self.url = self.process.stdout.readline().split()[-1].removesuffix("/v1")

    def ready(self):
        assert self.process.stdout.readline().startswith("ready: ")
        return self

    def ready_to_decode(self):
        assert self.ready().process.stdout.readline().startswith("ready to decode: ")
        return self

    def post(self, path, content, **options):
        """Sends an object as JSON, or bytes unchanged. Returns the response."""
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        return httpx.post(f"{self.url}/v1/{path}", content=content, timeout=120, **options)

    def metric(self, name):
        """Returns the sum of a metric over its labels; 0 if it is missing."""
        lines = httpx.get(f"{self.url}/metrics", timeout=120).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"llm2vec_gen_{name}"))

    def until(self, name, value):
        """Waits until a metric has a value."""
        for _ in range(1200):
            if self.metric(name) == value:
                return
            time.sleep(0.05)
        raise AssertionError(f"{name} stays {self.metric(name)}")

    def memory(self, name):
        """Returns the memory of the process in bytes: VmRSS (current) or VmHWM (peak)."""
        status = pathlib.Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split(f"{name}:")[1].split()[0]) * 1024

    def address(self):
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def healthy(self):
        assert self.process.poll() is None
        return httpx.get(f"{self.url}/health", timeout=120).json()["status"] == "ok"


def ask_in_process(endpoints):
    """ask(method, path, content, headers) returns the response of Endpoints in this process."""
    app = endpoints.app()

    def ask(method, path, content=b"", headers=None):
        async def one():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
                return await client.request(method, path, content=content, headers=headers)

        return asyncio.run(one())

    return ask


@contextlib.contextmanager
def running(*arguments, **options):
    server = Running(*arguments, **options)
    try:
        yield server
    finally:
        server.process.kill()
        server.process.communicate()


def check_refusal(response, status, *expected, code=None):
    """Checks an error response in OpenAI's format."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"} and isinstance(error["type"], str)
    for part in expected:
        assert part in error["message"]
    if code:
        assert error["code"] == code
