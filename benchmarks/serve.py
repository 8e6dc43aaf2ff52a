"""Load test of the server, compared with `model.encode` on the same texts.

    python -m benchmarks.serve MODEL [key=value ...] [--texts 512] [--concurrency 1 16 64] [--per-request 1 8]

Starts `python -m launch.serve MODEL key=value ...` in a separate process. --concurrency clients send every text once
per round, --per-request texts per request; a client sends its next request when the previous one is answered. After
the server has stopped, `model.encode` encodes all texts in one call. Prints the throughput of both, request latencies,
failed requests, the server's memory, and the largest difference of its vectors from those of `model.encode`.

Texts consist of common words, with the lengths of a mixed corpus of queries and passages (benchmarks.lengths), or are
read from --file. On a CPU the clients use part of its time.
"""

import argparse
import asyncio
import base64
import contextlib
import signal
import statistics
import subprocess
import sys
import time

import httpx
import numpy as np
import orjson

from benchmarks import lengths, side
from llm2vec_gen_jax.config import ServeConfig, options
from llm2vec_gen_jax.data.texts import read_texts

WORDS = "the of and to in is that it was for on are as with his they at be this from have or by one had not but".split()
COLUMNS = {
    "side": ("", "{}"),
    "texts_per_second": ("texts/s", "{:,.1f}"),
    "of_encode": ("of encode", "{:.0%}"),
    "p50": ("p50 ms", "{:,.0f}"),
    "p99": ("p99 ms", "{:,.0f}"),
    "requests": ("requests", "{:,}"),
    "errors": ("errors", "{}"),
    "batch": ("requests in a batch", "{:.1f}"),
    "memory": ("server's MiB", lambda x: f"{x[0] / 2**20:,.0f} to {x[1] / 2**20:,.0f}"),
    "difference": ("largest difference", "{:.1e}"),
}


def main():
    arguments = parse()
    config = options.load(ServeConfig, None, arguments.settings)
    texts = read_texts(arguments.file, "text")[: arguments.texts] if arguments.file else common_words(arguments.texts)
    rows, vectors = [], []
    with server(arguments, "ready to decode: " if config.decode.enabled else "ready: ") as url:
        load(url, texts, arguments.concurrency[-1], arguments.per_request[-1])  # warm-up
        for per_request in arguments.per_request:
            for concurrency in arguments.concurrency:
                row, found = measure(url, texts, concurrency, per_request, arguments.rounds)
                rows.append(row)
                vectors.append(found)
                print(f"{row['side']}: {row['texts_per_second']:.2f} texts/s", file=sys.stderr, flush=True)
    expected, seconds, tokens = encode(arguments, config, texts)
    per_second = len(texts) / seconds
    for row, found in zip(rows, vectors):
        row["of_encode"] = row["texts_per_second"] / per_second
        row["difference"] = np.nanmax(np.abs(found - expected), initial=0)  # NaN: a request that failed
    rows.append({"side": "model.encode", "texts_per_second": per_second, "of_encode": 1.0})
    notes = [f"{len(texts)} texts of {tokens / len(texts):.0f} tokens on average, medians of {arguments.rounds} rounds"]
    side.show(f"Serving, {arguments.model}", COLUMNS, rows, notes, arguments)


def parse():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model directory")
    parser.add_argument("settings", nargs="*", help="key=value arguments of launch.serve")
    parser.add_argument("--texts", type=int, default=512, help="number of texts")
    parser.add_argument("--file", help=".txt, or .jsonl[.gz] with a `text` key")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 16, 64], help="numbers of concurrent clients")
    parser.add_argument("--per-request", type=int, nargs="+", default=[1, 8], help="numbers of texts per request")
    parser.add_argument("--rounds", type=int, default=3, help="number of rounds; medians are reported")
    parser.add_argument("--output", help=".jsonl file to which the rows are appended")
    return parser.parse_args()


def common_words(count):
    """Returns texts of common words, with as many words as the texts of a mixed corpus have tokens."""
    random = np.random.default_rng(0)
    return [" ".join(random.choice(WORDS, length)) for length in lengths.mixed(random, count)[0]]


@contextlib.contextmanager
def server(arguments, last):
    """Starts the server, yields its URL after a line that starts with `last`, and ends it with SIGTERM."""
    command = [sys.executable, "-m", "launch.serve", arguments.model, "port=0", "name=served", "access_log=false"]
    command += arguments.settings
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        url = next((line.split()[-1] for line in process.stdout if line.startswith("serving ")), None)
        if not any(line.startswith(last) for line in process.stdout):
            sys.exit("error: the server did not start")
        yield url.removesuffix("/v1")
    finally:
        process.send_signal(signal.SIGTERM)
        if process.wait() != 0:
            print(f"the server ended with {process.returncode}", file=sys.stderr)


def measure(url, texts, concurrency, per_request, rounds):
    """Returns (a row of the table, vectors (n, E))."""
    before, done = metrics(url), []
    for _ in range(rounds):
        done.append(load(url, texts, concurrency, per_request))
    after = metrics(url)
    times = [1000 * took for _, took_all, _, _ in done for took in took_all]
    failed = [status for *_, errors in done for status in errors]
    batches, requests = (
        after[name] - before.get(name, 0)
        for name in ('batch_requests_count{kind="embed"}', 'batch_requests_sum{kind="embed"}')
    )
    row = {
        "side": f"{concurrency} clients, {per_request} texts each",
        "texts_per_second": len(texts) / statistics.median(seconds for seconds, *_ in done),
        "p50": np.percentile(times, 50),
        "p99": np.percentile(times, 99),
        "requests": len(times),
        "errors": ", ".join(f"{failed.count(status)} of {status}" for status in sorted(set(failed))) or 0,
        "batch": requests / batches,
        "memory": [found["process_resident_memory_bytes"] for found in (before, after)],
    }
    return row, done[-1][2]


def load(url, texts, concurrency, per_request):
    """Sends every text once. Returns (seconds, seconds by request, vectors (n, E), statuses of failed requests)."""

    async def run():
        starts, times, errors, found = iter(range(0, len(texts), per_request)), [], [], {}

        async def client_loop(client):
            for start in starts:
                body = {"input": texts[start : start + per_request], "encoding_format": "base64"}
                began = time.perf_counter()
                response = await client.post(f"{url}/v1/embeddings", content=orjson.dumps(body))
                times.append(time.perf_counter() - began)
                if response.status_code == 200:
                    for item in orjson.loads(response.content)["data"]:
                        vector = np.frombuffer(base64.b64decode(item["embedding"]), "<f4")
                        found[start + item["index"]] = vector
                else:
                    errors.append(response.status_code)

        limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        async with httpx.AsyncClient(timeout=600, limits=limits) as client:
            began = time.perf_counter()
            await asyncio.gather(*(client_loop(client) for _ in range(concurrency)))
            seconds = time.perf_counter() - began
        vectors = np.full((len(texts), len(next(iter(found.values()), [0]))), np.nan, np.float32)
        for number, vector in found.items():
            vectors[number] = vector
        return seconds, times, vectors, errors

    return asyncio.run(run())


def metrics(url):
    """Returns {name with labels: value} of the server's metrics."""
    lines = httpx.get(f"{url}/metrics", timeout=600).text.splitlines()
    pairs = [line.removeprefix("llm2vec_gen_").rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def encode(arguments, config, texts):
    """Returns (vectors, seconds, tokens) of model.encode with the server's settings."""
    from llm2vec_gen_jax import LLM2VecGen

    model = LLM2VecGen.from_pretrained(arguments.model, config.dtype, mesh=config.mesh)
    settings = {"batch_size": config.batch_size, "max_length": config.max_length}
    settings |= {"prompt": config.instruction, "normalize_embeddings": config.normalize}
    model.warmup(config.batch_size, config.max_length)
    seconds = []
    for _ in range(arguments.rounds):
        began = time.perf_counter()
        vectors = model.encode(texts, **settings)
        seconds.append(time.perf_counter() - began)
    tokens = sum(map(len, model.tokenize(texts, config.instruction, model.text_length(config.max_length))))
    return vectors, statistics.median(seconds), tokens


if __name__ == "__main__":
    side.run(main)
