"""Training steps of this package, as a worker of benchmarks/train_step.py; the protocol is peer_step.py's.

python -m benchmarks.our_step HF_BACKBONE_DIR PAIRS.jsonl --dtype float32|bfloat16 --batch-size 8
"""

import argparse
import itertools
import json
import pathlib
import sys
import tempfile
import time

import jax
import numpy as np

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax import data, optim, sharding, teacher
from llm2vec_gen_jax.loading import load_backbone
from llm2vec_gen_jax.train import Method
from llm2vec_gen_jax.trainer import new_state


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("backbone")
    parser.add_argument("pairs")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch-size", type=int, default=8)
    arguments = parser.parse_args()
    config = config_lib.TrainConfig(
        backbone=config_lib.BackboneConfig(arguments.backbone, arguments.dtype),
        data=config_lib.DataConfig(responses=arguments.pairs),
        train=config_lib.TrainSettings(batch_size=arguments.batch_size),
    )
    backbone = load_backbone(arguments.backbone, arguments.dtype, sharding.make_mesh(config.mesh))
    records = data.read_records(arguments.pairs, ("question", "answer"))
    examples = data.tokenize(records, backbone.tokenizer, config.data, 10)
    with tempfile.TemporaryDirectory() as folder:
        pairs = pathlib.Path(folder) / "pairs.jsonl"
        pairs.write_text("")  # only its folder is used: the targets are written beside it
        for first in (0, 64):  # the first time compiles
            started = time.perf_counter()
            few = [records[row]["answer"].strip() for row in range(first, first + 64)]
            targets, _ = teacher.targets_of(backbone, config, few, pairs)
            seconds = (time.perf_counter() - started) / len(few)
    # The step's cost does not depend on the targets' values: 64 of them serve all examples.
    examples.target = np.resize(targets, (len(examples), targets.shape[1]))
    method = Method(config, backbone, examples)
    optimizer = optim.make_optimizer(config.optimizer)
    state = jax.jit(lambda trainable: new_state(trainable, optimizer))(method.init())
    state = compile_all(method, state, arguments.batch_size)
    shapes = {"query": method.plan.query_edges, "answer": method.plan.answer_edges}
    say(ready=True, peak_rss_mb=peak_rss_mb(), target_seconds_per_sample=round(seconds, 4), **shapes)
    position, batches = 0, data.Batches(examples, method.plan, 0, 1)
    for command in sys.stdin:
        if command.split()[0] == "quit":
            break
        steps = int(command.split()[1])
        real = computed = 0
        started = time.perf_counter()
        for number in range(position, position + steps):
            batch = batches[number]
            state, metrics = method.step(state, sharding.put_batch(batch, backbone.mesh))
            appended = 2 * 10 * arguments.batch_size  # compression tokens and soft prompts
            real += int(batch["query_lengths"].sum() + batch["answer_lengths"].sum()) + appended
            computed += batch["query"].size + batch["answer"].size + appended
        loss = float(metrics["loss"])
        seconds = time.perf_counter() - started
        position += steps
        say(
            seconds=round(seconds, 3),
            samples=steps * arguments.batch_size,
            real_tokens=real,
            computed_tokens=computed,
            peak_rss_mb=peak_rss_mb(),
            loss=loss,
        )


def compile_all(method, state, batch_size):
    """Runs every padded length once: in a real run compilation is a matter of the first minutes."""
    ones = np.ones(batch_size, np.int32)
    edges = itertools.zip_longest(method.plan.query_edges, method.plan.answer_edges, fillvalue=8)
    for T, S in [*edges][::-1]:
        batch = {"query": np.zeros((batch_size, T), np.int32), "query_lengths": ones}
        batch |= {"answer": np.zeros((batch_size, S), np.int32), "answer_lengths": ones}
        batch["target"] = method.examples.target[:batch_size]
        state, _ = method.step(state, sharding.put_batch(batch, method.backbone.mesh))
    return state


def peak_rss_mb():
    """Peak resident memory of this process alone (ru_maxrss would include the parent's before exec)."""
    status = pathlib.Path("/proc/self/status").read_text()
    return round(int(status.split("VmHWM:")[1].split()[0]) / 1024, 1)


def say(**values):
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    main()
