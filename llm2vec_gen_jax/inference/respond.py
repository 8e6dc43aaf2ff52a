"""Responses of the LLM to queries: greedy or sampled, in length-sorted batches, resumable."""

import os
import pathlib
from collections.abc import Sequence

import jax
import numpy as np

from llm2vec_gen_jax.common import locks, progress
from llm2vec_gen_jax.common.errors import InputError, not_finite, quote
from llm2vec_gen_jax.common.files import fingerprint
from llm2vec_gen_jax.common.jsonl import JsonlAppender
from llm2vec_gen_jax.config import (
    QuickstartConfig,
    RespondConfig,
    ShardConfig,
    SynthesizeConfig,
    TeacherTrainConfig,
    options,
)
from llm2vec_gen_jax.data.buckets import length_sorted_batches
from llm2vec_gen_jax.data.records import read_records
from llm2vec_gen_jax.inference.generate import Sampling, ended, generate
from llm2vec_gen_jax.inference.openai_engine import respond_by_server
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone, load_backbone


def load_configured_backbone(
    config: QuickstartConfig | RespondConfig | SynthesizeConfig | TeacherTrainConfig,
    devices: Sequence[jax.Device] | None = None,
) -> LoadedBackbone:
    """Loads the backbone of a command's config on its mesh over `devices`, default the local devices."""
    mesh = sharding.make_mesh(config.mesh, devices or jax.local_devices())
    return load_backbone(config.backbone.path, config.backbone.dtype, mesh, config.kernels.attention)


def shard_path(output: str | os.PathLike[str], shard: ShardConfig) -> pathlib.Path:
    """Returns the output path, with the shard's index and count before the suffix if there are several shards."""
    if not 0 <= shard.index < shard.count:
        raise InputError(f"shard.index={shard.index} must be within 0 and shard.count - 1 = {shard.count - 1}")
    path = pathlib.Path(output)
    if path.suffix != ".jsonl":
        raise InputError(f"output={output}: must end in .jsonl (lines are appended; compress it afterwards)")
    if shard.count == 1:
        return path
    return path.with_name(f"{path.stem}.{shard.index:05}-of-{shard.count:05}.jsonl")


def respond(config: RespondConfig, backbone: LoadedBackbone | None = None) -> pathlib.Path:
    """Writes the responses of a RespondConfig, or resumes an interrupted run. Returns the output path.

    One line {id, question, answer, finish} per query, longest prompts first; finish is "stop", or "length" for a
    response truncated at max_new_tokens. With samples=N > 1 there are N lines per query, which also have `sample`,
    counted from 0. A resumed run repeats no line.
    """
    options.require(config, "input", "output")
    if config.samples > 1 and not config.temperature:
        raise InputError(f"samples={config.samples}: greedy responses are identical. Pass a temperature, such as 1")
    path = shard_path(str(config.output), config.shard)
    with locks.locked(path, "output"):
        _respond(path, config, backbone)
    return path


def _respond(path, config, backbone):
    records = read_records(config.input, ("question",), limit=config.limit)
    for number, record in enumerate(records):
        record.setdefault("id", number)
    if len({record["id"] for record in records}) < len(records):
        raise InputError(f"{config.input}: the ids are not unique. Make them unique: resuming identifies lines by id")
    if config.engine == "openai":
        return respond_by_server(path, config, records)
    backbone = backbone or load_configured_backbone(config)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    run = {
        "command": "respond",
        "backbone": backbone.identity,
        "input": fingerprint(records),
        "sampling": [config.max_new_tokens, config.temperature, config.top_p, config.seed],
        "batch": [config.batch_size, config.max_prompt_length],
        "shard": [config.shard.index, config.shard.count],
    }
    if config.samples > 1:
        run["samples"] = config.samples
    queries = range(config.shard.index, len(records), config.shard.count)
    prompts = {
        row: backbone.tokenizer.chat_prompt(records[row]["question"], config.max_prompt_length) for row in queries
    }
    samples = [(row, sample) for row in queries for sample in range(config.samples)]
    lengths = [len(prompts[row]) for row, _ in samples]
    with JsonlAppender(path, run, config.overwrite) as output:
        done = {(row["id"], row.get("sample", 0)) for row in output.rows}
        with progress.bar(len(samples), "response", "respond", initial=len(done)) as bar:
            for batch in length_sorted_batches(lengths, config.batch_size):
                items = [samples[index] for index in batch]
                missing = [(records[row]["id"], sample) not in done for row, sample in items]
                if not any(missing):
                    continue
                # A partially written batch is recomputed completely, which gives the same answers.
                padding = config.batch_size - len(items)
                ids = [prompts[row] for row, _ in items] + [[0]] * padding
                numbers = np.array([row + sample * len(records) for row, sample in items] + [0] * padding)
                answers = generate(backbone, ids, sampling, config.seed, numbers)
                new = [
                    records[row]
                    | ({"sample": sample} if config.samples > 1 else {})
                    | {
                        "answer": backbone.tokenizer.decode(answer).strip(),
                        "finish": "stop" if ended(answer, sampling) else "length",
                    }
                    for (row, sample), answer, is_missing in zip(items, answers, missing)
                    if is_missing and answer is not None
                ]
                output.append(new)
                bar.update(len(new))
                for (row, _), answer, is_missing in zip(items, answers, missing):
                    if is_missing and answer is None:
                        name = f"{config.input}: question {records[row]['id']!r}, {quote(records[row]['question'])}"
                        raise not_finite(name, backbone.dtype)
