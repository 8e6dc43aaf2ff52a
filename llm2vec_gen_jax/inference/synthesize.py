"""Synthetic queries: the LLM completes the user turn of its chat template (Magpie, Xu et al. 2024)."""

import pathlib

import numpy as np

from llm2vec_gen_jax.common import locks, progress
from llm2vec_gen_jax.common.errors import InputError, not_finite
from llm2vec_gen_jax.common.jsonl import JsonlAppender
from llm2vec_gen_jax.config import SynthesizeConfig, options
from llm2vec_gen_jax.data.texts import comparison_key
from llm2vec_gen_jax.inference.generate import Sampling, ended, generate
from llm2vec_gen_jax.inference.respond import load_configured_backbone, shard_path
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone

_MIN_LENGTH = 10  # characters; shorter samples are greetings and fragments
_PATIENCE = 50  # batches without a new query before giving up


def synthesize(config: SynthesizeConfig, backbone: LoadedBackbone | None = None) -> pathlib.Path:
    """Writes the queries of a SynthesizeConfig, or resumes an interrupted run. Returns the output path.

    Sample i depends on (backbone, its dtype, seed, i) only. Samples without a stop token, short ones and duplicates are
    discarded. Raises InputError for invalid settings.
    """
    options.require(config)
    path = shard_path(str(config.output), config.shard)
    with locks.locked(path, "output"):
        _synthesize(path, config, backbone)
    return path


def _synthesize(path, config, backbone):
    backbone = backbone or load_configured_backbone(config)
    sampling = Sampling(config.max_new_tokens, config.temperature, config.top_p)
    if not sampling.temperature:
        raise InputError("temperature=0 would always generate the same query: use a positive temperature")
    shard = config.shard
    target = len(range(shard.index, config.count, shard.count))
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
        seen = {comparison_key(row["question"]) for row in output.rows}
        last = output.rows[-1]["id"] if output.rows else -1
        batch, without = (last // shard.count) // config.batch_size if output.rows else 0, 0
        with progress.bar(target, "query", "synthesize", initial=len(output.rows)) as bar:
            while len(output.rows) < target:
                numbers = (batch * config.batch_size + np.arange(config.batch_size)) * shard.count + shard.index
                samples = generate(backbone, [prompt] * config.batch_size, sampling, config.seed, numbers)
                rows = []
                for number, ids in zip(numbers.tolist(), samples):
                    if ids is None:
                        raise not_finite(f"{path}: sample {number}", backbone.dtype)
                    question = backbone.tokenizer.decode(ids).strip()
                    valid = number > last and ended(ids, sampling) and len(question) >= _MIN_LENGTH
                    if valid and comparison_key(question) not in seen and len(output.rows) + len(rows) < target:
                        seen.add(comparison_key(question))
                        rows.append({"id": number, "question": question})
                output.append(rows)
                bar.update(len(rows))
                batch, without = batch + 1, 0 if rows else without + 1
                if without == _PATIENCE:
                    raise InputError(
                        f"no new query in {_PATIENCE} batches: is {backbone.name} an instruct model? Otherwise "
                        "raise max_new_tokens or temperature"
                    )
