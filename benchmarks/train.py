"""Training steps, compared with the published PyTorch package, on random weights of real shapes.

    python -m benchmarks.train [--preset cpu|gpu] [--model NAME ...] [--queries FILE]

Both packages train on the same pairs, alternately, in separate processes: this package in batches of its schedule over
16,384 pairs, the published package in random batches of the same pairs. Query lengths are those of real queries
(--queries) or similar; answer lengths are log-normal with mean 300. The published package runs its teacher in every
step; this package computes each target once, before training, and that time is reported separately.

--preset cpu (the default): SmolLM2-135M, float32 and bfloat16, batch 4, five rounds of one step. --preset gpu:
Qwen3-8B, bfloat16, batch 32, five rounds of ten steps; each package has the GPU to itself and is restarted for every
round.
"""

import numpy as np

from benchmarks import lengths, side
from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.data.batches import BatchSchedule
from llm2vec_gen_jax.planning.flops import training_flops

PAIRS, WHOLE_RUN = 16_384, 160_000
CPU = {"model": ["smollm2-135m"], "batch_size": [4], "rounds": 5, "steps": 1, "dtypes": ["float32", "bfloat16"]}
HOURS = {"hours": (f"h for {WHOLE_RUN:,}", "{:,.1f}")}
GPU = {"model": ["qwen3-8b"], "batch_size": [32], "rounds": 5, "steps": 10, "dtypes": ["bfloat16"]}


def add_options(parser):
    parser.add_argument("--steps", type=int, help="steps per round")
    parser.add_argument(
        "--checkpointing",
        nargs="+",
        default=["off", "on"],
        help="gradient checkpointing of the published package: off, on",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of launch.train for this package"
    )


def main():
    arguments = side.parse(__doc__, {"cpu": CPU, "gpu": GPU}, add_options)
    random = np.random.default_rng(0)
    queries, where = lengths.queries(random, PAIRS, arguments.queries)
    pairs = queries, lengths.ANSWERS.sample(random, PAIRS), f"{where}; answers {lengths.ANSWERS}"
    for name, shape, architecture in side.shapes(arguments):
        for batch_size in arguments.batch_size:
            for dtype in arguments.dtypes:
                compare(name, shape, architecture, batch_size, dtype, pairs, arguments)


def compare(name, shape, architecture, batch_size, dtype, pairs, arguments):
    """Runs this package and the variants of the peer alternately, and prints a table."""
    queries, answers, where = pairs
    words = [f"train.batch_size={batch_size}", f"compression.num_tokens={side.NUM_TOKENS}", *arguments.set]
    config = options.load(config_lib.TrainConfig, None, words)
    batches, recut = rounds_of(config, queries, answers, arguments)
    spec = {
        "kind": "train",
        "architecture": shape,
        "dtype": dtype,
        "batch_size": batch_size,
        "num_tokens": side.NUM_TOKENS,
        "queries": queries.tolist(),
        "answers": answers.tolist(),
    }
    extra = {"settings": words, "shapes": shapes_of(batches), "steps": sum(map(len, batches))}
    sides = [ours := side.Side(f"ours, {dtype}", spec | extra, {}, arguments, ours=True)]
    for checkpointing in [] if arguments.no_peer else arguments.checkpointing:
        label = f"published, {dtype}, checkpointing {checkpointing}"
        extra = side.of_peer(arguments) | {"checkpointing": checkpointing == "on"}
        sides.append(side.Side(label, spec | extra, {"batches": recut[0][:1]}, arguments))
    steps, rows = arguments.steps, np.concatenate([batch.rows for part in batches for batch in part])
    try:
        commands = [{"first": first, "last": first + steps} for first in range(0, len(batches) * steps, steps)]
        theirs = [[{"batches": parts}] * (len(sides) - 1) for parts in recut]
        side.take_turns(sides, [[command, *others] for command, others in zip(commands, theirs)])
        targets = ours.run({"targets": rows.tolist()})
    finally:
        for each in sides:
            each.quit()

    def work(parts, computed):
        rows = np.concatenate(parts)
        tokens, thoughts = int(queries[rows].sum() + answers[rows].sum()), config.compression.num_thought_tokens
        lora = bool(config.lora.rank)
        flops = training_flops(architecture, queries[rows], answers[rows], side.NUM_TOKENS, thoughts, lora)
        return {"samples": len(rows), "tokens": tokens, "computed_tokens": int(computed) * batch_size, "flops": flops}

    our_work = [work([batch.rows for batch in part], sum(batch.T + batch.S for batch in part)) for part in batches]
    their_work = [work(part, sum(queries[rows].max() + answers[rows].max() for rows in part)) for part in recut]
    peak = side.peak_flops(sides)
    table = [side.speed_row(each, our_work if each is ours else their_work, peak, ours, WHOLE_RUN) for each in sides]
    notes = [
        f"{where}; medians of {arguments.rounds} rounds of {steps} steps on the same pairs; tokens are those of "
        "queries and answers, without padding and without appended tokens",
        "MFU: FLOPs of one forward pass over the queries, and of compression tokens and answers forward and backward, "
        f"at their real lengths, the same for both sides; of {side.describe_peak(peak)}",
    ]
    if targets:
        each = table[0]["target_seconds_per_sample"] = targets["seconds"] / len(rows)
        ratios = [side.ratio(ours, other, each * len(rows) / len(batches)) for other in sides[1:]]
        speedups = ", ".join(f"{ratio:.2f}x" for ratio in ratios if ratio)
        counted = f"; if added to every step, as in a single epoch, the speedup is {speedups}" if speedups else ""
        notes.append(f"ours computes its targets before training, in {each:.4f} s per sample{counted}")
    side.show(
        f"Training, {name}, batch {batch_size}, {dtype}", side.SPEED | HOURS | side.OURS_IS, table, notes, arguments
    )


def rounds_of(config, queries, answers, arguments):
    """Returns by round (the Batches of the schedule; the same rows in random batches, as lists)."""
    settings, size = config.data, config.train.batch_size
    plan = BatchSchedule(queries, answers, size, settings.max_buckets, settings.shuffle, settings.seed)
    every, steps = range(arguments.rounds * arguments.steps), arguments.steps
    batches = [[plan[step] for step in every[first : first + steps]] for first in every[::steps]]
    random = np.random.default_rng(1)
    recut = [random.permutation(np.concatenate([batch.rows for batch in part])) for part in batches]
    return batches, [rows.reshape(-1, size).tolist() for rows in recut]


def shapes_of(batches):
    """Returns few [T, S] that cover every padded length of the batches: each program depends on only one of the two."""
    T, S = (sorted({int(getattr(batch, name)) for part in batches for batch in part}) for name in ("T", "S"))
    longer = max(len(T), len(S))
    # Descending, so that the first needs the most memory.
    return [[T[min(number, len(T) - 1)], S[min(number, len(S) - 1)]] for number in reversed(range(longer))]


if __name__ == "__main__":
    side.run(main)
