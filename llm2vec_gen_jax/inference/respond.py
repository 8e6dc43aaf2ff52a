"""The LLM's own responses to queries: greedy or sampled, in length-sorted batches, resumable line by line."""

import pathlib

import jax
import numpy as np

from llm2vec_gen_jax.common import locks, progress
from llm2vec_gen_jax.common.errors import InputError, not_finite, quote
from llm2vec_gen_jax.common.files import fingerprint
from llm2vec_gen_jax.common.jsonl import JsonlAppender
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.data.records import read_records
from llm2vec_gen_jax.inference.generate import Sampling, ended, generate
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import load_backbone


def load_configured_backbone(config, devices=None):
    """Loads the backbone of a command's config on its mesh over `devices`, default this process's own."""
    mesh = sharding.make_mesh(config.mesh, devices or jax.local_devices())
    return load_backbone(config.backbone.path, config.backbone.dtype, mesh, config.kernels.attention)


def shard_path(output, shard):
    """Returns the output path; of one of many shards, with its number before the suffix."""
    if not 0 <= shard.index < shard.count:
        raise InputError(f"shard.index={shard.index} must be within 0 and shard.count - 1 = {shard.count - 1}")
    path = pathlib.Path(output)
    if path.suffix != ".jsonl":
        raise InputError(f"output={output}: must end in .jsonl (lines are appended; compress it afterwards)")
    if shard.count == 1:
        return path
    return path.with_name(f"{path.stem}.{shard.index:05}-of-{shard.count:05}.jsonl")


def respond(config, backbone=None):
    """Writes the responses of a RespondConfig; an interrupted run goes on where it stopped. Returns the path.

    One line {id, question, answer, finish} per query, longest prompts first; finish is "stop", or "length" for a
    response cut at max_new_tokens. Every query is answered once, however often the run is killed and repeated; with
    samples=N N times, in lines that also have `sample`, from 0.
    """
    options.require(config, "input", "output")
    if config.samples > 1 and not config.temperature:
        raise InputError(f"samples={config.samples}: greedy responses are all alike. Pass a temperature, such as 1")
    path = shard_path(config.output, config.shard)
    with locks.locked(path, "output"):
        _respond(path, config, backbone)
    return path


def _respond(path, config, backbone):
    records = read_records(config.input, ("question",), limit=config.limit)
    for number, record in enumerate(records):
        record.setdefault("id", number)
    if len({record["id"] for record in records}) < len(records):
        raise InputError(f"{config.input}: the ids are not unique, so a resumed run could not tell lines apart")
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
    mine = [(row, sample) for row in queries for sample in range(config.samples)]
    mine.sort(key=lambda item: -len(prompts[item[0]]))
    with JsonlAppender(path, run, config.overwrite) as output:
        done = {(row["id"], row.get("sample", 0)) for row in output.rows}
        with progress.bar(len(mine), "response", "respond", initial=len(done)) as bar:
            for start in range(0, len(mine), config.batch_size):
                items = mine[start : start + config.batch_size]
                missing = [(records[row]["id"], sample) not in done for row, sample in items]
                if not any(missing):
                    continue
                # A batch that was cut off half-way is computed whole again: its numbers do not change.
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
                    for (row, sample), answer, wanted in zip(items, answers, missing)
                    if wanted and answer is not None
                ]
                output.append(new)
                bar.update(len(new))
                for (row, _), answer, wanted in zip(items, answers, missing):
                    if wanted and answer is None:
                        name = f"{config.input}: question {records[row]['id']!r}, {quote(records[row]['question'])}"
                        raise not_finite(name, backbone.dtype)
