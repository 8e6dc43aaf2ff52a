"""Generation of responses, compared with transformers, which generated the published data; on random weights.

    python -m benchmarks.generate [--preset cpu|gpu] [--model NAME ...] [--queries FILE]

Compares the decoding of launch.respond with transformers' `generate` in the environment of the published package: both
greedy, on the same prompts in one batch (of similar lengths, as respond sorts them), with a fixed number of new
tokens. Each step reads at least all weights and all previous keys and values, so the memory bandwidth bounds the rate;
the table shows the ratio to that bound. The decoding time is the time for all tokens minus that for the first, which
includes the prompts.

--preset cpu (the default): SmolLM2-135M, batches of 8 and 32. --preset gpu: Qwen3-8B, a batch of 256.
"""

import concurrent.futures
import os
import statistics
import time

import numpy as np

from benchmarks import lengths, side
from llm2vec_gen_jax.parallel import chips
from llm2vec_gen_jax.planning import flops

CPU = {"model": ["smollm2-135m"], "batch_size": [8, 32], "rounds": 5, "new_tokens": 32, "dtypes": ["float32"]}
GPU = {"model": ["qwen3-8b"], "batch_size": [256], "rounds": 5, "new_tokens": 256, "dtypes": ["bfloat16"]}
TEMPLATE = 32  # tokens that a chat template adds to a query, as for SmolLM2
AROUND = 16  # batches of queries from which one is selected
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}

COLUMNS = {
    "side": ("", "{}"),
    "new_tokens_per_second": ("new tokens/s", "{:,.0f}"),
    "prefill_seconds": ("prefill s", "{:.2f}"),
    "decoding_tokens_per_second": ("decoding, tokens/s", "{:,.0f}"),
    "bound_tokens_per_second": ("bandwidth bound", "{:,.0f}"),
    "of_bound": ("of the bound", "{:.0%}"),
    "peak_bytes": side.SPEED["peak_bytes"],
    "compile_seconds": side.SPEED["compile_seconds"],
    "ours_is": side.OURS_IS["ours_is"],
}


def main():
    arguments = side.parse(
        __doc__,
        {"cpu": CPU, "gpu": GPU},
        lambda parser: parser.add_argument("--new-tokens", type=int, help="number of new tokens per prompt"),
    )
    for name, shape, architecture in side.shapes(arguments):
        for batch_size in arguments.batch_size:
            for dtype in arguments.dtypes:
                compare(name, shape, architecture, batch_size, dtype, arguments)


def compare(name, shape, architecture, batch_size, dtype, arguments):
    """Runs both alternately and prints a table."""
    queries, where = lengths.queries(np.random.default_rng(0), AROUND * batch_size, arguments.queries)
    # launch.respond sorts queries by length: select the batch around the mean.
    queries.sort()
    middle = min(int(np.searchsorted(queries, queries.mean())), len(queries) - batch_size // 2)
    prompts, N = queries[middle - batch_size // 2 :][:batch_size] + TEMPLATE, arguments.new_tokens
    spec = {"kind": "generate", "architecture": shape, "dtype": dtype, "batch_size": batch_size}
    spec |= {"num_tokens": side.NUM_TOKENS, "prompts": prompts.tolist()}
    command = {"new_tokens": N}
    sides = [ours := side.Side(f"ours, {dtype}", spec, command, arguments, ours=True)]
    if not arguments.no_peer:
        sides.append(side.Side(f"transformers, {dtype}", spec | side.of_peer(arguments), command, arguments))
    try:
        side.take_turns(sides, [[command] * len(sides)] * arguments.rounds)
    finally:
        for each in sides:
            each.quit()
    chip = None if ours.failed else chips.chip_of(ours.ready["device"])
    bandwidth = chip.bandwidth if chip else read_bandwidth()
    # The first token results from the prompts, the others from N - 1 steps.
    read = flops.decoding_bytes(architecture, prompts, N - 1, SIZES[dtype])
    bound = batch_size * (N - 1) / (read / bandwidth)
    table = [row(each, ours, batch_size, N, bound) for each in sides]
    for each in table:
        each |= {"bandwidth": bandwidth, "bytes_read": read}
    account = "by its data sheet" if chip else "measured: all cores reading a large array"
    notes = [
        f"prompts: {where}, sorted, a batch around the mean, with {TEMPLATE} tokens of a chat template: "
        f"{prompts.min()} to {prompts.max()}, {prompts.mean():.0f} on average; {N} new tokens each; medians of "
        f"{arguments.rounds} rounds",
        f"bound: {read / (N - 1) / 2**30:.2f} GiB of weights, keys and values a step; memory reads "
        f"{bandwidth / 1e9:,.1f} GB/s, {account}",
    ]
    side.show(f"Generation, {name}, batch {batch_size}, {dtype}", COLUMNS, table, notes, arguments)


def row(each, ours, batch_size, new_tokens, bound):
    """Returns the table row of a side."""
    if each.failed:
        return {"side": each.name, "error": each.failed}

    def decoding(answer):
        return answer["seconds"] - answer["prefill_seconds"]

    rate = statistics.median(batch_size * (new_tokens - 1) / decoding(answer) for answer in each.results)
    return {
        "side": each.name,
        "device": each.ready["device"],
        "attention": each.ready.get("attention"),
        "samples": batch_size,
        "new_tokens": each.results[0]["new_tokens"],
        "new_tokens_per_second": statistics.median(answer["new_tokens"] / answer["seconds"] for answer in each.results),
        "prefill_seconds": statistics.median(answer["prefill_seconds"] for answer in each.results),
        "decoding_tokens_per_second": rate,
        "bound_tokens_per_second": bound,
        "of_bound": rate / bound,
        "peak_bytes": each.peak_bytes,
        "compile_seconds": each.compile_seconds,
        "ours_is": None if each is ours else side.ratio(ours, each),
        "seconds": [answer["seconds"] for answer in each.results],
    }


def read_bandwidth():
    """Returns the memory bandwidth of all cores in bytes per second: the best of five passes over 512 MiB."""
    parts = [np.ones(2**27 // os.cpu_count(), np.float32) for _ in range(os.cpu_count())]
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(len(parts)) as pool:
        for _ in range(5):
            started = time.perf_counter()
            list(pool.map(lambda part: part.dot(part), parts))
            best = max(best, sum(part.nbytes for part in parts) / (time.perf_counter() - started))
    return best


if __name__ == "__main__":
    side.run(main)
