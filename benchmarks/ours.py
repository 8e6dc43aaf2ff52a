"""Worker process for this package, on random weights: `python -m benchmarks.ours SPEC.json`, see side.Side.

SPEC.json: kind (train | encode | generate), architecture (a config.json), dtype, batch_size, num_tokens, cache (a
folder of compiled programs, or null), and the keys that the class of the kind documents.
"""

import json
import os
import sys
import time
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.data import batches, buckets, examples
from llm2vec_gen_jax.inference import encode, generate
from llm2vec_gen_jax.model.architecture import from_hf_config
from llm2vec_gen_jax.model.backbone import abstract_params
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import devices, sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone
from llm2vec_gen_jax.teachers import encoder
from llm2vec_gen_jax.training.optimizer import make_optimizer
from llm2vec_gen_jax.training.step import new_state
from llm2vec_gen_jax.training.train import CompressionTrainer


def main():
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    devices.prepare()  # as every command does
    # Libraries may print to stdout: redirect file descriptor 1 to stderr, and keep the real stdout for the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    compiled = [0.0]

    def count_compilation(event, duration, **_):
        compiled[0] += duration if event == "/jax/core/compile/backend_compile_duration" else 0.0

    def answer(work):
        try:
            result = work()
        except (jax.errors.JaxRuntimeError, MemoryError) as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
                raise
            result = {"error": "out of memory"}
        result |= {"peak_bytes": peak_bytes(), "compile_seconds": compiled[0]}
        print(json.dumps(result), file=answers, flush=True)

    if spec["cache"]:
        jax.config.update("jax_compilation_cache_dir", spec["cache"])
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    kind = {"train": Training, "encode": Encoding, "generate": Generation}[spec["kind"]]
    device = {"device": jax.devices()[0].device_kind, "matmul_flops": matmul_flops(jnp.dtype(spec["dtype"]))}
    workers = []
    answer(lambda: workers.append(kind(spec)) or device)
    jax.monitoring.register_event_duration_secs_listener(count_compilation)
    for line in sys.stdin:
        answer(lambda: workers[0].run(**json.loads(line)))  # noqa: B023


def matmul_flops(dtype, size=2048):
    """Returns the FLOPs per second of a product of two square matrices, the best of five."""
    x = jnp.ones((size, size), dtype)
    product, best = jax.jit(jnp.matmul), np.inf
    for _ in range(6):
        started = time.perf_counter()
        product(x, x).block_until_ready()
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_bytes():
    """Returns the peak memory in bytes: of the accelerator, or of this process on a CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats:
        return stats["peak_bytes_in_use"]
    with open("/proc/self/status") as status:  # getrusage would include the size of the parent
        return int(status.read().split("VmHWM:")[1].split()[0]) * 1024


def random_backbone(spec):
    """Returns a LoadedBackbone with random weights, created on the device."""
    architecture = from_hf_config(spec["architecture"], "architecture")
    mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
    boxed, dtype = abstract_params(architecture), jnp.dtype(spec["dtype"])
    shapes, tree = jax.tree.flatten_with_path(nn.unbox(boxed))
    shardings = jax.tree.leaves(sharding.param_shardings(boxed, mesh))
    key = jax.random.key(0, impl="rbg")  # the hardware generator: fast enough for 8B weights

    def make(number, path, shape):
        if "norm" in jax.tree_util.keystr(path):
            return jnp.ones(shape, dtype)
        return 0.02 * jax.random.normal(jax.random.fold_in(key, number), shape, dtype)

    weights = [
        jax.jit(make, static_argnums=(0, 1, 2), out_shardings=put)(number, path, x.shape)
        for number, ((path, x), put) in enumerate(zip(shapes, shardings))
    ]
    frozen = jax.block_until_ready(jax.tree.unflatten(tree, weights))
    nothing_stops = types.SimpleNamespace(stop_ids=())
    return LoadedBackbone("random", architecture, frozen, nothing_stops, "random", Execution(mesh))


def random_ids(lengths, vocab_size):
    """Returns an int32 array of random ids for each length."""
    random = np.random.default_rng(0)
    return [random.integers(0, vocab_size, length).astype(np.int32) for length in lengths]


class Training:
    """spec: queries, answers (lengths by row), settings (KEY=VALUE of a TrainConfig), steps, and shapes [[T, S]] that
    cover the padded lengths of these steps."""

    def __init__(self, spec):
        self.backbone, self.batch_size = random_backbone(spec), spec["batch_size"]
        a = self.backbone.architecture
        ids = [random_ids(spec[name], a.vocab_size) for name in ("queries", "answers")]
        target = np.broadcast_to(np.zeros(a.hidden_size, np.float32), (len(ids[0]), a.hidden_size))
        self.examples = examples.Examples(*ids, np.arange(len(ids[0])), target)
        words = [f"train.batch_size={self.batch_size}", f"compression.num_tokens={spec['num_tokens']}"]
        config = options.load(config_lib.TrainConfig, None, [*words, *spec["settings"]])
        self.trainer = CompressionTrainer(config, self.backbone, self.examples)
        optimizer = make_optimizer(config.optimizer)
        self.state = jax.jit(lambda trainable: new_state(trainable, optimizer))(self.trainer.init())
        self.batches = batches.Batches(self.examples, self.trainer.schedule, 0, 1)
        self.shapes, self.steps = spec["shapes"], spec["steps"]

    def run(self, first=None, last=None, targets=None):
        """Trains steps first ... last - 1, or computes the targets of rows, or (no arguments) compiles everything."""
        if targets is not None:
            return self._targets(targets)
        if first is None:
            return self._compile_all()
        started = time.perf_counter()
        for batch in batches.iterate(self.batches, first, last):
            metrics = self._step(batch)
        loss = float(metrics["loss"])
        return {"seconds": time.perf_counter() - started, "loss": loss}

    def _compile_all(self):
        """Compiles as before the first step of a run, then runs every padded length once."""
        ones, started = np.ones(self.batch_size, np.int32), time.perf_counter()
        self.train_step = self.trainer.compile(self.state, range(self.steps), False)
        for T, S in self.shapes:
            batch = {"query": np.zeros((self.batch_size, T), np.int32), "query_lengths": ones}
            batch |= {"answer": np.zeros((self.batch_size, S), np.int32), "answer_lengths": ones}
            metrics = self._step(batch | {"target": self.examples.target[: self.batch_size]})
        jax.block_until_ready(metrics)
        return {"seconds": time.perf_counter() - started}

    def _step(self, batch):
        self.state, metrics = self.train_step(self.state, sharding.put_batch(batch, self.backbone.mesh))
        return metrics

    def _targets(self, rows):
        """Computes the targets of the answers, as once before training. Times the second of two passes."""
        answers = sorted((self.examples.answer[row] for row in rows), key=len, reverse=True)
        edges = np.array(buckets.choose_edges([len(ids) for ids in answers], 8))
        for _ in range(2):
            started = time.perf_counter()
            for start in range(0, len(answers), self.batch_size):
                batch = answers[start : start + self.batch_size]
                shape = self.batch_size, int(edges[np.searchsorted(edges, len(batch[0]))])
                a, frozen, execution = self.backbone.architecture, self.backbone.frozen, self.backbone.execution
                encoder.pool_rows(a, frozen, False, batch, shape, execution)
            seconds = time.perf_counter() - started
        return {"seconds": seconds}


class Encoding:
    """spec: lengths of the texts; or folder (a model directory), texts and vectors (the .npy to write).

    shared: false to compute the common prefix of the texts for every text.
    """

    def __init__(self, spec):
        self.spec = spec
        if not spec.get("shared", True):
            encode.shared_prefix = lambda ids: 0
        if "folder" in spec:
            mesh = sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])
            self.embedder = LLM2VecGen.from_pretrained(spec["folder"], dtype=spec["dtype"], mesh=mesh)
            self.ids = self.embedder.tokenize(spec["texts"])
        else:
            backbone, K = random_backbone(spec), spec["num_tokens"]
            a = backbone.architecture
            model = LLM2VecGenModel(a, K, 0, a.hidden_size, execution=backbone.execution)
            init = jax.jit(model.init, out_shardings=sharding.replicated(backbone.mesh))
            trainable = init(jax.random.key(0), backbone.frozen)
            self.embedder = LLM2VecGen(model, trainable, backbone)
            self.ids = random_ids(spec["lengths"], a.vocab_size)

    def run(self):
        """Encodes all texts. computed_tokens includes padding and compression tokens."""
        batch_size, started = self.spec["batch_size"], time.perf_counter()
        if "texts" in self.spec:
            vectors = self.embedder.encode(self.spec["texts"], batch_size=batch_size)
        else:
            windows = [
                (None, self.ids[start : start + encode.WINDOW]) for start in range(0, len(self.ids), encode.WINDOW)
            ]
            with progress.bar(len(self.ids), "text", "encode", enabled=False) as bar:
                for _ in self.embedder.encode_windows(windows, batch_size, False, bar):
                    pass
        seconds = time.perf_counter() - started
        if "vectors" in self.spec:
            np.save(self.spec["vectors"], vectors)
        model, backbone = self.embedder.model, self.embedder.backbone
        plans = (
            encode.plan_window(model, backbone, self.ids[start : start + encode.WINDOW], batch_size)
            for start in range(0, len(self.ids), encode.WINDOW)
        )
        computed = sum(map(encode.computed_tokens, plans))
        return {"seconds": seconds, "computed_tokens": computed}


class Generation:
    """spec: prompts (lengths of one batch)."""

    def __init__(self, spec):
        self.backbone = random_backbone(spec)
        self.ids = random_ids(spec["prompts"], self.backbone.architecture.vocab_size)

    def run(self, new_tokens):
        """Generates new_tokens for every prompt, greedily. prefill_seconds is the time for the first token only."""
        prefill, _ = self._timed(1)
        seconds, rows = self._timed(new_tokens)
        return {"seconds": seconds, "prefill_seconds": prefill, "new_tokens": sum(map(len, rows))}

    def _timed(self, new_tokens):
        started = time.perf_counter()
        rows = generate.generate(self.backbone, [list(ids) for ids in self.ids], generate.Sampling(new_tokens))
        return time.perf_counter() - started, rows


if __name__ == "__main__":
    main()
