"""Encoding, compared with the published PyTorch package.

    python -m benchmarks.encode [--preset cpu|gpu] [--model NAME ...] [--queries FILE]
    python -m benchmarks.encode --task FOLDER [--questions 400] [--paragraphs 200] [--instruction TEXT]

By default: random weights of real shapes, on a mixed corpus of queries and passages, passed as token ids (tokenization
is excluded). With --task: the weights of the default backbone and real texts of FOLDER (queries.jsonl and corpus.jsonl
with a `text` key, BEIR's layout, or test.jsonl with pairs); tokenization is included in the time of both sides, and the
vectors are compared. With --instruction, which stands before every text, this package also runs without sharing it. The
published package encodes batches sorted by length, as in its evaluation. All run in separate processes, alternately.

--preset cpu (the default): SmolLM2-135M, 32 texts in batches of 8 (so that few sorted texts have as little padding as
many), float32 and bfloat16. --preset gpu: Qwen3-8B, 8,192 texts in batches of 64, bfloat16.
"""

import pathlib
import tempfile

import jax
import numpy as np

from benchmarks import lengths, side
from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.jsonl import read_jsonl
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.planning import flops
from llm2vec_gen_jax.pretrained import export, model_directory
from llm2vec_gen_jax.pretrained.backbone import load_backbone

CPU = {"model": ["smollm2-135m"], "batch_size": [8], "rounds": 5, "texts": 32, "dtypes": ["float32", "bfloat16"]}
GPU = {"model": ["qwen3-8b"], "batch_size": [64], "rounds": 5, "texts": 8192, "dtypes": ["bfloat16"]}


def add_options(parser):
    parser.add_argument("--texts", type=int, help="size of the mixed corpus")
    parser.add_argument("--task", type=pathlib.Path, help="task folder, for real weights and texts")
    parser.add_argument("--questions", type=int, default=200, help="number of questions of the task")
    parser.add_argument("--paragraphs", type=int, default=100, help="number of paragraphs of the task")
    parser.add_argument("--instruction", default="", help="text before every text of the task")


def main():
    arguments = side.parse(__doc__, {"cpu": CPU, "gpu": GPU}, add_options)
    if arguments.task:
        return encode_task(arguments)
    corpus, where = lengths.mixed(np.random.default_rng(0), arguments.texts, arguments.queries)
    for name, shape, architecture in side.shapes(arguments):
        for batch_size in arguments.batch_size:
            for dtype in arguments.dtypes:
                spec = {"architecture": shape, "num_tokens": side.NUM_TOKENS, "lengths": corpus.tolist()}
                spec |= {"batch_size": batch_size, "dtype": dtype}
                title = f"{name}, batch {batch_size}, {dtype}"
                compare(title, architecture, spec, spec, corpus + side.NUM_TOKENS, [where], arguments)
    return None


def encode_task(arguments):
    """Compares both packages on the texts of a task, including the vectors."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        texts, backbone = read_texts(arguments), write_model(folder)
        ids = backbone.tokenizer.encode(texts, lengths.QUERY_LIMIT)
        real = np.array([len(row) + side.NUM_TOKENS for row in ids])
        for dtype in arguments.dtypes:
            spec = {"folder": str(folder / "model"), "texts": texts, "batch_size": 32, "dtype": dtype}
            names = "ours", "theirs", "not shared"
            ours, theirs, unshared = (spec | {"vectors": str(folder / f"{name}.npy")} for name in names)
            others = [unshared | {"shared": False}] if arguments.instruction else []
            compared = others + ([] if arguments.no_peer else [theirs])

            def differ():
                for spec in compared:  # noqa: B023
                    a, b = (np.load(each["vectors"]) for each in (ours, spec))  # noqa: B023
                    cosine = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
                    least, largest = f"least cosine {cosine.min():.6f}", f"largest difference {np.abs(a - b).max():.1e}"
                    yield f"ours and {pathlib.Path(spec['vectors']).stem}: {least}, {largest}"

            title = f"smollm2-135m, {arguments.task.name}, {dtype}"
            compare(title, backbone.architecture, ours, theirs, real, [], arguments, differ, others)


def compare(title, architecture, ours_spec, peer_spec, real, notes, arguments, more_notes=list, other_specs=()):
    """Runs both packages alternately and prints a table. real: lengths, including the compression tokens.

    other_specs: of this package without sharing prefixes.
    """
    dtype = ours_spec["dtype"]
    ours = side.Side(f"ours, {dtype}", ours_spec | {"kind": "encode"}, {}, arguments, ours=True)
    sides = [ours]
    for spec in other_specs:
        sides.append(side.Side(f"ours, not shared, {dtype}", spec | {"kind": "encode"}, {}, arguments, ours=True))
    if not arguments.no_peer:
        extra = {"kind": "encode"} | side.of_peer(arguments)
        sides.append(side.Side(f"published, {dtype}", peer_spec | extra, {}, arguments))
    try:
        side.take_turns(sides, [[{}] * len(sides)] * arguments.rounds)
    finally:
        for each in sides:
            each.quit()
    work = {"samples": len(real), "tokens": int(real.sum()), "flops": flops.forward_flops(architecture, real)}
    peak, table = side.peak_flops(sides), []
    for each in sides:
        works = [work | {"computed_tokens": result["computed_tokens"]} for result in each.results]
        table.append(side.speed_row(each, works, peak, ours))
    notes = [
        *notes,
        f"medians of {arguments.rounds} rounds over {len(real):,} texts of {real.mean():.0f} tokens on average, "
        f"including the {side.NUM_TOKENS} compression tokens",
        f"MFU: FLOPs of one causal pass over the real tokens, the same for both sides; of {side.describe_peak(peak)}",
        *more_notes(),
    ]
    side.show(f"Encoding, {title}", side.SPEED | side.OURS_IS, table, notes, arguments)


def read_texts(arguments):
    """Returns the first questions and paragraphs of the task, or texts of pairs, shuffled, after the instruction."""
    pairs = arguments.task / "test.jsonl"
    if pairs.exists():
        texts = [row[key] for _, row in read_jsonl(pairs) for key in ("sentence1", "sentence2")][: arguments.questions]
    else:
        texts = [row["text"] for _, row in read_jsonl(arguments.task / "queries.jsonl")][: arguments.questions]
        texts += [row["text"] for _, row in read_jsonl(arguments.task / "corpus.jsonl")][: arguments.paragraphs]
    order = np.random.default_rng(0).permutation(len(texts))
    return [f"{arguments.instruction} {texts[row]}".lstrip() for row in order]


def write_model(folder):
    """Writes folder/backbone and an untrained folder/model, which both packages read. Returns the backbone."""
    mesh = sharding.make_mesh(config.MeshConfig(), jax.devices()[:1])
    export.save_backbone(load_backbone("smollm2-135m", "float32", mesh), folder / "backbone")
    backbone = load_backbone(str(folder / "backbone"), "float32", mesh)
    model = LLM2VecGenModel(backbone.architecture, side.NUM_TOKENS, 0, backbone.architecture.hidden_size)
    trainable = model.init(jax.random.key(0), backbone.frozen)
    model_directory.save(folder / "model", model, trainable, backbone, {})
    return backbone


if __name__ == "__main__":
    side.run(main)
