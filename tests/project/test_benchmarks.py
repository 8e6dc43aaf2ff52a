"""Each benchmark, run for real on a tiny architecture: its figures agree with one another and with own arithmetic."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import lengths
from llm2vec_gen_jax.common.files import read_json
from llm2vec_gen_jax.model.architecture import from_hf_config
from llm2vec_gen_jax.planning.flops import decoding_bytes, forward_flops, training_flops

ROOT = pathlib.Path(__file__).parents[2]
ROUNDS = 2


@pytest.fixture
def benchmark(tiny_folder, tmp_path):
    """(name, words) -> the rows of a benchmark on the tiny Qwen3, beside the peer where its environment is given."""

    def run(name, *words):
        env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)}
        words = [*words, "--architecture", str(tiny_folder("qwen3") / "config.json"), "--rounds", str(ROUNDS)]
        words += ["--dtypes", "float32", "--threads", "1", "--output", str(tmp_path / "rows.jsonl")]
        words += [] if os.environ.get("LLM2VEC_GEN_PEER_PYTHON") else ["--no-peer"]
        command = [sys.executable, "-m", f"benchmarks.{name}", "--preset", "cpu", *words]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
        table = [line for line in done.stdout.splitlines() if line.startswith("|")]
        assert len(table) == len(rows) + 2 and len({line.count("|") for line in table}) == 1  # Markdown
        for row in rows:
            assert "error" not in row and row["peak_bytes"] > 0 and len(row["seconds"]) == ROUNDS
            assert {"date", "command", "host", "device"} <= set(row)
        return rows, from_hf_config(read_json(tiny_folder("qwen3") / "config.json"), "tiny")

    return run


@pytest.mark.slow
def test_training(benchmark):
    rows, architecture = benchmark("train", "--batch-size", "4", "--steps", "1", "--checkpointing", "off")
    for row in rows:
        assert row["samples"] == ROUNDS * 4
        assert row["tokens"] == rows[0]["tokens"] and row["flops"] == rows[0]["flops"]  # the same pairs
        per_second = row["tokens"] / sum(row["seconds"])
        assert min(row["tokens_per_second"], per_second) > 0 and 0 <= row["padding"] < 1 and 0 < row["mfu"] < 1
    mean = rows[0]["tokens"] / rows[0]["samples"]
    assert 36 <= mean <= lengths.QUERY_LIMIT + lengths.ANSWER_LIMIT
    # Between that of texts of no length and that of all tokens read forward and backward.
    least, most = (training_flops(architecture, [0], [0], 10), training_flops(architecture, [502], [512], 10))
    assert least < rows[0]["flops"] / rows[0]["samples"] < most
    assert rows[0]["compile_seconds"] > 0 and rows[0]["target_seconds_per_sample"] > 0


@pytest.mark.slow
def test_encoding(benchmark):
    rows, architecture = benchmark("encode", "--texts", "6", "--batch-size", "2")
    texts = lengths.mixed(np.random.default_rng(0), 6)[0] + 10
    for row in rows:
        assert row["samples"] == 6 * ROUNDS and row["tokens"] == texts.sum() * ROUNDS
        assert np.isclose(row["flops"], ROUNDS * sum(forward_flops(architecture, [length]) for length in texts))


@pytest.mark.slow
def test_generation(benchmark):
    rows, architecture = benchmark("generate", "--new-tokens", "5", "--batch-size", "3")
    for row in rows:
        assert row["new_tokens"] == 3 * 5
        assert row["of_bound"] == pytest.approx(row["decoding_tokens_per_second"] / row["bound_tokens_per_second"])
        assert row["bound_tokens_per_second"] == pytest.approx(3 * 4 / (row["bytes_read"] / row["bandwidth"]))
    assert rows[0]["bytes_read"] > 4 * 4 * architecture.num_parameters


def test_flops_are_those_of_every_pair_of_tokens(tiny):
    """An independent count, token by token, of a query, ten compression tokens and an answer."""
    a, T, S, K = tiny("qwen3").architecture, 7, 5, 10
    weights = a.num_layers * (
        2 * a.hidden_size * a.head_dim * (a.num_heads + a.num_kv_heads)
        + 3 * a.hidden_size * a.intermediate_size
        + 2 * a.hidden_size
        + 2 * a.head_dim
    )
    weights += a.hidden_size
    per_pair = 4 * a.num_layers * a.num_heads * a.head_dim

    def forward(first, last):
        """Tokens first ... last - 1 of a text; half of a token's product with itself is counted."""
        return sum(2 * weights + per_pair * (place + 0.5) for place in range(first, last))

    backward = sum(2 * weights + 2 * per_pair * (place + 0.5) for place in [*range(T, T + K), *range(K + S)])
    heads = 2 * 2 * S * a.vocab_size * a.hidden_size
    wanted = forward(0, T + K) + forward(0, K + S) + backward + heads
    assert training_flops(a, [T], [S], K) == pytest.approx(wanted)
    assert training_flops(a, [T, T], [S, S], K) == pytest.approx(2 * wanted)


def test_decoding_reads_the_weights_and_the_cache_so_far(tiny):
    a = tiny("qwen3").architecture
    slot = 2 * a.num_layers * a.num_kv_heads * a.head_dim
    weights = a.num_parameters  # tied: the table is read as the output matrix
    assert decoding_bytes(a, [3, 5], 2, 4) == 4 * (2 * weights + slot * (3 + 5 + 4 + 6))


@pytest.mark.parametrize("what, mean", [(lengths.QUERIES, 48.6), (lengths.ANSWERS, 300)], ids=["queries", "answers"])
def test_synthetic_lengths_have_the_mean_that_is_told(what, mean):
    found = what.sample(np.random.default_rng(1), 200_000)
    assert found.min() == what.least and found.max() == what.most and found.mean() == pytest.approx(mean, rel=0.02)
