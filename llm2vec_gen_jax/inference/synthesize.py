"""Queries that the LLM itself writes: it continues its chat template from where a user would write (Magpie)."""

import numpy as np

from llm2vec_gen_jax.common import locks, progress
from llm2vec_gen_jax.common.errors import InputError, not_finite
from llm2vec_gen_jax.common.jsonl import JsonlAppender
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.inference.generate import Sampling, ended, generate
from llm2vec_gen_jax.inference.respond import load_configured_backbone, shard_path

_SHORTEST = 10  # characters; shorter samples are greetings and fragments
_PATIENCE = 50  # batches without a single new query after which the backbone is given up


def synthesize(config, backbone=None):
    """Writes the queries of a SynthesizeConfig; an interrupted run goes on where it stopped. Returns the path.

    Sample i depends on (backbone, seed, i) alone. Samples that did not end by themselves, are too short, or were
    written before are left out. Raises InputError for bad settings.
    """
    options.require(config, "output")
    path = shard_path(config.output, config.shard)
    with locks.locked(path, "output"):
        _synthesize(path, config, backbone)
    return path


def _synthesize(path, config, backbone):
    backbone = backbone or load_configured_backbone(config)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    if not sampling.temperature:
        raise InputError("temperature=0 would write the same query for ever: use a positive temperature")
    shard = config.shard
    wanted = len(range(shard.index, config.count, shard.count))
    run = {
        "command": "synthesize",
        "backbone": backbone.identity,
        "seed": config.seed,
        "batch_size": config.batch_size,
        "sampling": [config.max_new_tokens, config.temperature, config.top_p],
        "shard": [shard.index, shard.count],
    }
    prompt = backbone.tokenizer.user_turn()
    with JsonlAppender(path, run, config.overwrite) as output:
        seen = {_key(row["question"]) for row in output.rows}
        last = output.rows[-1]["id"] if output.rows else -1
        batch, without = (last // shard.count) // config.batch_size if output.rows else 0, 0
        with progress.bar(wanted, "query", "synthesize", initial=len(output.rows)) as bar:
            while len(output.rows) < wanted:
                numbers = (batch * config.batch_size + np.arange(config.batch_size)) * shard.count + shard.index
                samples = generate(backbone, [prompt] * config.batch_size, sampling, config.seed, numbers)
                rows = []
                for number, ids in zip(numbers.tolist(), samples):
                    if ids is None:
                        raise not_finite(f"{path}: sample {number}", backbone.dtype)
                    question = backbone.tokenizer.decode(ids).strip()
                    good = number > last and ended(ids, sampling) and len(question) >= _SHORTEST
                    if good and _key(question) not in seen and len(output.rows) + len(rows) < wanted:
                        seen.add(_key(question))
                        rows.append({"id": number, "question": question})
                output.append(rows)
                bar.update(len(rows))
                batch, without = batch + 1, 0 if rows else without + 1
                if without == _PATIENCE:
                    raise InputError(
                        f"{_PATIENCE} batches gave no new query: is {backbone.name} an instruct model? Otherwise "
                        "raise max_new_tokens or temperature"
                    )


def _key(question):
    return " ".join(question.lower().split())
