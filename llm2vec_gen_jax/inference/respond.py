"""Responses of the LLM to queries: greedy or sampled, in length-sorted batches, resumable."""

import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

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
    hub_options,
    options,
)
from llm2vec_gen_jax.data.buckets import length_sorted_batches
from llm2vec_gen_jax.data.records import read_records
from llm2vec_gen_jax.inference.generate import Sampling, ended, generate
from llm2vec_gen_jax.inference.openai_engine import Response, Sample, Server
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone, load_backbone


def load_configured_backbone(
    config: QuickstartConfig | RespondConfig | SynthesizeConfig | TeacherTrainConfig,
    devices: Sequence[jax.Device] | None = None,
) -> LoadedBackbone:
    """Loads the backbone of a command's config on its mesh over `devices`, default the local devices."""
    mesh = sharding.make_mesh(config.mesh, devices or jax.local_devices())
    hub = hub_options(config, config.backbone.revision)
    return load_backbone(config.backbone.path, config.backbone.dtype, mesh, config.kernels.attention, hub)


def shard_path(output: str | os.PathLike[str], shard: ShardConfig) -> pathlib.Path:
    """Returns the output path, with the shard's index and count before the suffix if there are several shards."""
    shard.check()
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
    options.require(config)
    if config.samples > 1 and not config.temperature:
        raise InputError(f"samples={config.samples}: greedy responses are identical. Pass a temperature, such as 1")
    path = shard_path(str(config.output), config.shard)
    with locks.locked(path, "output"):
        _respond(path, config, backbone)
    return path


def _respond(path: pathlib.Path, config: RespondConfig, backbone: LoadedBackbone | None) -> None:
    records = read_records(str(config.input), ("question",), limit=config.limit, hub=hub_options(config))
    for number, record in enumerate(records):
        record.setdefault("id", number)
    if len({record["id"] for record in records}) < len(records):
        raise InputError(f"{config.input}: the ids are not unique. Make them unique: resuming identifies lines by id")
    rows = range(config.shard.index, len(records), config.shard.count)
    samples = [(row, sample) for row in rows for sample in range(config.samples)]
    engine: Engine
    if config.engine == "openai":
        engine = Server(config, records)
    else:
        engine = _BackboneEngine(config, records, rows, backbone)
    run: dict[str, Any] = {
        "command": "respond",
        **engine.record,
        "input": fingerprint(records),
        "sampling": [config.max_new_tokens, config.temperature, config.top_p, config.seed],
        "shard": [config.shard.index, config.shard.count],
    }
    if config.samples > 1:
        run["samples"] = config.samples
    with JsonlAppender(path, run, config.overwrite) as output:
        done = {(row["id"], row.get("sample", 0)) for row in output.rows}
        is_missing = [(records[row]["id"], sample) not in done for row, sample in samples]
        with progress.bar(len(samples), "response", "respond", initial=len(done)) as bar:
            for responses in engine.respond(samples, is_missing):
                new = [
                    records[row]
                    | ({"sample": sample} if config.samples > 1 else {})
                    | {"answer": answer, "finish": "length" if is_truncated else "stop"}
                    for (row, sample), answer, is_truncated in responses
                ]
                output.append(new)
                bar.update(len(new))


class Engine(Protocol):
    """What generates responses. record: what identifies it in the run record of the output."""

    record: dict[str, Any]

    def respond(self, samples: Sequence[Sample], is_missing: Sequence[bool]) -> Iterator[list[Response]]:
        """Yields lists of the responses to the missing ones of `samples`, each as soon as it is there."""


class _BackboneEngine:
    """Generates with the backbone of a RespondConfig, in length-sorted batches."""

    def __init__(
        self,
        config: RespondConfig,
        records: Sequence[dict[str, Any]],
        rows: Sequence[int],
        backbone: LoadedBackbone | None,
    ) -> None:
        """rows: the records to respond to. backbone: that of the config, if it is already loaded."""
        self.config, self.records, self.backbone = config, records, backbone or load_configured_backbone(config)
        self.record = {
            "backbone": self.backbone.identity,
            "batch": [config.batch_size, config.max_prompt_length],
        }
        tokenizer = self.backbone.tokenizer
        self.prompts = {row: tokenizer.chat_prompt(records[row]["question"], config.max_prompt_length) for row in rows}

    def respond(self, samples: Sequence[Sample], is_missing: Sequence[bool]) -> Iterator[list[Response]]:
        config, records, backbone = self.config, self.records, self.backbone
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
        for batch in length_sorted_batches([len(self.prompts[row]) for row, _ in samples], config.batch_size):
            if not any(is_missing[index] for index in batch):
                continue
            # A partially written batch is recomputed completely, which gives the same answers.
            padding = config.batch_size - len(batch)
            ids = [self.prompts[samples[index][0]] for index in batch] + [[0]] * padding
            numbers = [row + sample * len(records) for row, sample in (samples[index] for index in batch)]
            answers = generate(backbone, ids, sampling, config.seed, np.array(numbers + [0] * padding))
            missing = [(samples[index], answer) for index, answer in zip(batch, answers) if is_missing[index]]
            yield [
                (sample, backbone.tokenizer.decode(answer).strip(), not ended(answer, sampling))
                for sample, answer in missing
                if answer is not None
            ]
            for (row, _), answer in missing:
                if answer is None:
                    name = f"{config.input}: question {records[row]['id']!r}, {quote(records[row]['question'])}"
                    raise not_finite(name, backbone.dtype)
