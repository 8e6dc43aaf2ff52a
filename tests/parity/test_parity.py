"""One model directory, two frameworks: the same weights and texts give the published package's numbers, run live."""

import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen, config
from llm2vec_gen_jax.data import batches
from llm2vec_gen_jax.data.examples import tokenize
from llm2vec_gen_jax.formats import hf, peft
from llm2vec_gen_jax.inference.generate import Sampling, generate_from_soft_prompts
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from llm2vec_gen_jax.training import losses
from llm2vec_gen_jax.training.optimizer import make_optimizer, make_schedule
from llm2vec_gen_jax.training.step import new_state, train_step
from tests.conftest import one_device_mesh

SUFFIX = "<|end_of_text|>"  # the published package ends every answer with this literal
TEXTS = [
    "What is the capital of France?",
    "x",
    "",
    "  two leading spaces",
    "emoji 🙂👍🏽 and 12345 digits",
    "法国的首都是哪里？",
    "line one\n\nline two\t tab",
    "a long text about a river that flows to the sea; " * 60,
]
PAIRS = [
    {"question": "What is the capital of France?", "answer": "The capital of France is Paris."},
    {"question": "  Strip me ", "answer": " Both sides are stripped.  "},
    {"question": "y", "answer": "Ja."},
    {"question": "Write a long list. " * 12, "answer": "One item, then another item 7, 8 and 9. " * 6},
]
REQUEST = {
    "texts": TEXTS,
    "max_length": 512,
    "pairs": PAIRS,
    "targets": "targets.npy",
    "learning_rate": 1e-3,
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "schedule_steps": 100,
    "warmup_steps": 2,
    "trajectory_steps": 5,
    "recon_weight": 1.0,
    "align_weight": 1.0,
    "decode_texts": TEXTS[:3],
    "max_new_tokens": 12,
}
# Of the real model. AdamW's first steps are signs of gradients: on it a large rate turns rounding into other losses
# within a few steps, so it takes the published rate and warm-up. Its texts are cut earlier, which takes less time.
REAL = {"learning_rate": 5e-4, "warmup_steps": 100, "schedule_steps": 20_000, "max_length": 256}


BACKBONES = ("llama3", "qwen2", "qwen3", "qwen3-lora", "smollm2")


def write_model(folder, source, rank):
    """Writes a backbone and a model directory on it, targets and the request into a folder."""
    # transformers 4.56 cannot read what 5 saves, nor a GGUF: both sides read the folder that we write.
    hf.save(folder / "backbone", source.frozen, source.architecture, source.tokenizer.save, source.tokenizer.stop_ids)
    backbone = load_backbone(str(folder / "backbone"), "float32", one_device_mesh())
    E = 24
    model = LLM2VecGenModel(backbone.architecture, 10, 2, E, lora_rank=rank, lora_scale=2.0 * bool(rank))
    trainable = model.init(jax.random.key(1), backbone.frozen)
    if rank:  # a fresh LoRA changes nothing yet
        grown = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), trainable["lora"])
        trainable["lora"] = grown
    model_directory.save(folder / "model", model, trainable, backbone, {})
    np.save(folder / "targets.npy", np.random.default_rng(0).normal(size=(len(PAIRS), E)).astype(np.float32))


@pytest.fixture(scope="module")
def answered(peer_python, tiny, smollm2, tmp_path_factory):
    """{backbone: its folder} with a model, targets and the published package's numbers, from one process of it."""
    folders = {name: tmp_path_factory.mktemp(f"parity-{name}") for name in BACKBONES}
    arguments = []
    for name, folder in folders.items():
        source = smollm2 if name == "smollm2" else tiny(name.removesuffix("-lora"))
        write_model(folder, source, 4 if name.endswith("-lora") else 0)
        (folder / "request.json").write_text(json.dumps(REQUEST | (REAL if name == "smollm2" else {})))
        arguments += [folder / "model", folder / "request.json", folder / "out.npz"]
    script = pathlib.Path(__file__).with_name("peer_reference.py")
    result = subprocess.run([peer_python, script, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return folders


@pytest.fixture(scope="module", params=BACKBONES)
def both(request, answered):
    """(ours: LLM2VecGen of the directory, theirs: the published package's numbers, targets) of one backbone."""
    if request.param == "smollm2":
        request.getfixturevalue("optimized")
    folder = answered[request.param]
    ours = LLM2VecGen.from_pretrained(folder / "model", dtype="float32", mesh=one_device_mesh())
    asked = json.loads((folder / "request.json").read_text())
    theirs = dict(np.load(folder / "out.npz")) | {"asked": asked, "real": request.param == "smollm2"}
    return ours, theirs, np.load(folder / "targets.npy")


def close(ours, theirs, relative):
    """Largest difference relative to the largest of their values."""
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= relative * np.abs(theirs).max()


def training_batch(ours, targets):
    settings = config.DataConfig(answer_suffix=SUFFIX, shuffle=False)
    examples = tokenize(PAIRS, ours.backbone.tokenizer, settings, ours.model.num_appended)
    examples.target = targets
    plan = batches.BatchSchedule(
        *[[len(ids) for ids in side] for side in (examples.query, examples.answer)], 4, 1, False, 0
    )
    batch = jax.tree.map(jnp.asarray, batches.Batches(examples, plan, 0, 1)[0])
    if ours.model.lora_rank:
        return examples, batch
    prefill = jax.jit(ours.model.prefill, static_argnums=3)
    cache = prefill(ours.backbone.frozen, batch["query"], batch["query_lengths"], plan.query_edges[-1])
    return examples, batch | {"query": cache}


def test_ids_are_those_of_the_published_package(both):
    ours, theirs, targets = both
    ids = ours.backbone.tokenizer.encode(TEXTS, theirs["asked"]["max_length"] - ours.model.num_appended)
    for row, real in zip(ids, [r[m == 1] for r, m in zip(theirs["input_ids"], theirs["attention_mask"])]):
        assert row == real[: -ours.model.num_appended].tolist()
    examples, _ = training_batch(ours, targets)
    for kind, arrays in (("query", examples.query), ("answer", examples.answer)):
        mask = theirs[f"batch_{kind}_attention_mask"]
        real = [r[m == 1] for r, m in zip(theirs[f"batch_{kind}_input_ids"], mask)]
        appended = ours.model.num_appended if kind == "query" else 0
        assert [row.tolist() for row in arrays] == [row[: len(row) - appended].tolist() for row in real]


def test_embeddings_and_soft_prompts(both):
    ours, theirs, _ = both
    embeddings, soft_prompts = ours.encode(TEXTS, max_length=theirs["asked"]["max_length"], return_soft_prompts=True)
    np.testing.assert_allclose(embeddings, theirs["embeddings"], atol=1e-4, rtol=0)
    close(soft_prompts, theirs["soft_prompts"], 1e-4)  # of a residual stream, whose rounding is that of its largest


def test_losses_and_every_gradient(both):
    ours, theirs, targets = both
    _, batch = training_batch(ours, targets)
    weights = config.LossConfig()
    compute = jax.value_and_grad(lambda t, f, b: losses.loss_fn(t, ours.model, f, b, weights), has_aux=True)
    (_, parts), gradients = jax.jit(compute)(ours.trainable, ours.backbone.frozen, batch)
    for name in ("reconstruction", "alignment"):
        np.testing.assert_allclose(parts[f"{name}_loss"], theirs[f"{name}_loss"], rtol=1e-4)
        close(gradients[name]["kernel"].T, theirs[f"grad_{name}_weight"], 1e-3)
        close(gradients[name]["bias"], theirs[f"grad_{name}_bias"], 1e-3)
    # Through the 30 layers of the real model rounding is of that size: with all of a layer kept for the backward pass
    # instead of computed again, our own gradient differs by 7e-4 of its largest value.
    close(gradients["tokens"], theirs["grad_tokens"], 2e-3 if theirs["real"] else 1e-3)
    lora = {name.removeprefix("lora:"): value for name, value in theirs.items() if name.startswith("lora:")}
    found = peft.tensors_of(gradients.get("lora", {}))
    assert found.keys() == lora.keys() and bool(lora) == bool(ours.model.lora_rank)
    for name, value in lora.items():
        close(found[name], value, 1e-3)


def test_five_steps_of_adamw(both):
    ours, theirs, targets = both
    keys = ("learning_rate", "schedule_steps", "warmup_steps", "weight_decay", "max_grad_norm")
    settings = config.OptimizerConfig(**{key: theirs["asked"][key] for key in keys})
    optimizer, schedule = make_optimizer(settings), make_schedule(settings)
    _, batch = training_batch(ours, targets)
    step = jax.jit(
        lambda state, frozen, batch: train_step(
            state, frozen, batch, model=ours.model, optimizer=optimizer, loss_config=config.LossConfig()
        )
    )
    state = new_state(ours.trainable, optimizer)
    trajectory, norms = [], []
    for _ in range(REQUEST["trajectory_steps"]):
        state, metrics = step(state, ours.backbone.frozen, batch)
        trajectory.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    assert abs(trajectory[-1] - trajectory[0]) > 5e-3 * trajectory[0]  # far enough for a wrong update to show
    np.testing.assert_allclose(trajectory, theirs["trajectory"], rtol=1e-3)
    # Before any update; then rounding grows tenfold a step on the real model: compiled without optimisations, our own
    # norms are 1e-4 off at the third step and 2.5e-3 at the fifth.
    np.testing.assert_allclose(norms[:2], theirs["trajectory_grad_norm"][:2], rtol=1e-3)
    np.testing.assert_allclose(norms, theirs["trajectory_grad_norm"], rtol=5e-2 if theirs["real"] else 1e-2)
    np.testing.assert_allclose([schedule(n) for n in range(5)], theirs["trajectory_learning_rate"], rtol=1e-5)


def test_greedy_decoding_from_soft_prompts(both):
    ours, theirs, _ = both
    _, soft_prompts = ours.encode(REQUEST["decode_texts"], return_soft_prompts=True)
    decoded = generate_from_soft_prompts(ours.backbone, soft_prompts, Sampling(REQUEST["max_new_tokens"]))
    stop = ours.backbone.tokenizer.stop_ids
    expected = [[n for n in row.tolist() if n >= 0 and n not in stop] for row in theirs["decoded_ids"]]
    assert decoded == expected
