"""Supervised losses: the published functions and texts, live; sharded as on one device; free where the weight is 0."""

import json
import pathlib
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import LossConfig, options
from llm2vec_gen_jax.data import batches
from llm2vec_gen_jax.data.examples import tokenize
from llm2vec_gen_jax.inference.instruct import instruct
from llm2vec_gen_jax.model.layers import Dropout
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.tokenizer import Tokenizer
from llm2vec_gen_jax.training import losses, supervised
from llm2vec_gen_jax.training.examples import load_training_data
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train
from tests.conftest import tiny_tokenizer, write_jsonl

B, E, K = 8, 6, 3
INPUTS = ("question", "positive", "negative")
# Ours: the arguments after the inputs; theirs: the same by name.
CONTRASTIVE = {
    f"contrastive_{function}_{scale}_{hardness}".replace(".", ""): (function, scale, hardness)
    for function, scale, hardness in [
        ("cosine", 20.0, 0.0),
        ("cosine", 5.0, 0.7),
        ("dot_product", 1.0, 0.0),
        ("dot_product", 0.3, 0.4),
    ]
}
MARGIN = {"margin_small": 2.0, "margin_middle": 3.5, "margin_wide": 10.0}
RECORDS = [
    {
        "question": f" What is {number}?\n",
        "answer": f"It is {'abcdefgh'[number % 8] * (1 + number % 6)}. ",
        "negative_question": f"What is not {number}? ",
        "negative_answer": f" It is {'xyz'[number % 3] * (1 + number % 9)}.",
    }
    for number in range(24)
]
SPECIAL = [f"<question{number}>" for number in range(1, K + 1)]
EVERYTHING = LossConfig(repeat=0.5, negative=0.7, margin=0.3, margin_threshold=20.0, contrastive=0.2)
PARTS = "repeat_alignment negative_alignment negative_repeat_alignment margin contrastive".split()


def inputs(same=0):
    """{name: (B, E)}; the first `same` negatives are copies of questions, at distance 0."""
    found = dict(zip(INPUTS, np.random.default_rng(0).normal(size=(3, B, E)).astype(np.float32)))
    found["negative"][:same] = found["question"][:same]
    return found


@pytest.fixture(scope="module")
def theirs(peer_python, tmp_path_factory):
    """What the published package computes of the inputs and collates of the records."""
    folder = tmp_path_factory.mktemp("peer-losses")
    tiny_tokenizer().save_pretrained(folder)
    np.savez(folder / "inputs.npz", **inputs(same=2))
    names = ("function", "scale", "hardness_weighting_alpha")
    cases = {name: ["margin", {"margin_threshold": threshold}] for name, threshold in MARGIN.items()}
    cases |= {name: ["contrastive", dict(zip(names, values))] for name, values in CONTRASTIVE.items()}
    request = {
        "inputs": "inputs.npz",
        "losses": cases | {"mse": ["mse", {}]},
        "ranks": 2,
        "tokenizer": "tokenizer.json",
        "pad_token": "<|endoftext|>",
        "max_length": 40,
        "special_tokens": SPECIAL,
        "samples": RECORDS[:4],
    }
    (folder / "request.json").write_text(json.dumps(request))
    script = pathlib.Path(__file__).parents[1] / "parity" / "peer_losses.py"
    command = [peer_python, script, folder / "request.json", folder / "out.npz"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return dict(np.load(folder / "out.npz"))


def compute(name, question, positive, negative):
    if name in MARGIN:
        return supervised.margin(question, negative, MARGIN[name])
    if name in CONTRASTIVE:
        return supervised.contrastive(question, positive, negative, *CONTRASTIVE[name])
    return losses.alignment(question, positive)


def mesh_of(devices):
    return sharding.make_mesh(config.MeshConfig(), jax.devices()[:devices])


# Against the published package


@pytest.mark.parametrize("devices", [1, 8])
@pytest.mark.parametrize("name", [*MARGIN, *CONTRASTIVE, "mse"])
def test_losses_and_gradients_are_the_published_ones(theirs, name, devices):
    """One process there that holds the whole batch, or two that gather; one device here, or eight."""
    arrays = sharding.put_batch(list(inputs(same=2).values()), mesh_of(devices))
    value, gradients = jax.jit(jax.value_and_grad(lambda arrays: compute(name, *arrays)))(arrays)
    for prefix in ("", "gathered_"):
        np.testing.assert_allclose(value, theirs[prefix + name], rtol=1e-5)
        for key, gradient in zip(INPUTS, gradients):
            expected = theirs[f"{prefix}{name}_{key}"]
            np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * max(1e-3, np.abs(expected).max()))
    assert any(np.abs(gradient).max() > 1e-3 for gradient in gradients)


def test_texts_are_the_published_ones(theirs):
    tokenizer = Tokenizer(tiny_tokenizer())
    settings = config.DataConfig(max_query_length=40)
    examples = tokenize(RECORDS[:4], tokenizer, settings, K, supervised.texts(EVERYTHING))
    found = {"query": examples.query, "repeat_answer": examples.extra["repeat"]}
    found |= {"negative_query": examples.extra["negative"]}
    found |= {"negative_repeat_answer": examples.extra["negative_repeat"]}
    for kind, texts in found.items():
        ids, mask = theirs[f"{kind}_input_ids"], theirs[f"{kind}_attention_mask"]
        expected = [row[real == 1][:-K].tolist() for row, real in zip(ids, mask)]
        assert [text.tolist() for text in texts] == expected
    assert tokenizer.decode(found["repeat_answer"][0]) == "Repeat this text word by word. It is "[: 40 - K]


def test_large_dot_products_are_finite():
    arrays = {name: 100 * value for name, value in inputs().items()}
    contrastive = jax.value_and_grad(lambda x: supervised.contrastive(*x, "dot_product", 1.0, 0.1))
    value, gradients = contrastive(list(arrays.values()))
    assert np.isfinite(value) and all(np.isfinite(gradient).all() for gradient in gradients)


def test_zero_vectors_have_a_finite_gradient():
    arrays = [jnp.zeros((2, E))] * 3
    gradients = jax.grad(lambda x: supervised.contrastive(*x, "cosine", 20.0, 0.5) + supervised.margin(x[0], x[2], 1.0))
    assert all(np.isfinite(gradient).all() for gradient in gradients(arrays))


# What is needed, and only that


@pytest.mark.parametrize(
    "weights, texts, columns",
    [
        ({}, [], []),
        ({"repeat": 1.0}, ["repeat"], []),
        ({"negative": 1.0}, ["negative"], ["negative_answer", "negative_question"]),
        ({"negative": 1.0, "alignment": 0.0}, [], []),
        ({"repeat": 1.0, "alignment": 0.0}, [], []),
        ({"margin": 1.0}, ["negative"], ["negative_question"]),
        ({"contrastive": 1.0}, ["repeat", "negative_repeat"], ["negative_answer"]),
        (
            {"negative": 1.0, "repeat": 1.0},
            ["repeat", "negative", "negative_repeat"],
            ["negative_answer", "negative_question"],
        ),
    ],
)
def test_texts_and_columns_are_those_that_a_loss_reads(weights, texts, columns):
    weights = LossConfig(**weights)
    assert list(supervised.texts(weights)) == texts
    assert sorted(supervised.columns(weights)) == sorted(["question", "answer", *columns])
    assert ("negative_target" in supervised.targets(weights)) == bool(weights.alignment and weights.negative)


def test_repeat_instructions_are_those_of_instruct(tmp_path, tiny_folder):
    """An answer after the lines of a file is the question that `instruct` writes for that text."""
    lines, answers = ["Summarize:", "", "Find the topic of:"], [f"It is {letter}." for letter in "abcdefgh"]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    write_jsonl(tmp_path / "records.jsonl", [{"question": f"{text}?", "answer": text} for text in answers])
    words = [f"backbone.path={tiny_folder('llama')}", f"data.responses={tmp_path / 'records.jsonl'}"]
    words += [f"loss.repeat_instructions={tmp_path / 'lines.txt'}"]

    def examples(*more):
        return load_training_data(options.load(config.TrainConfig, None, [*words, *more])).examples

    data, tokenizer = examples("loss.repeat=1"), Tokenizer(tiny_tokenizer())
    write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in answers])
    settings = config.InstructConfig(str(tmp_path / "texts.jsonl"), str(tmp_path / "instructed.jsonl"))
    settings.instructions = str(tmp_path / "lines.txt")
    rows = [json.loads(line) for line in instruct(settings).read_text().splitlines()]
    assert [row["question"] for row in rows] == [
        f"{lines[n % 3]} {row['answer']}".strip() for n, row in enumerate(rows)
    ]
    found = [tokenizer.decode(ids) for ids in data.extra["repeat"]]
    assert found == [f"{lines[n % 3]} {answer}".strip() for n, answer in enumerate(answers)]
    with pytest.raises(InputError, match="lines.txt: no loss uses them. Set loss.repeat"):
        examples()
    (tmp_path / "lines.txt").write_text("a\nb\na\n")
    with pytest.raises(InputError, match="loss.repeat_instructions=.*, line 3: 'a' is repeated"):
        examples("loss.repeat=1")


def examples_of(weights, records=RECORDS):
    settings = config.DataConfig(max_query_length=64)
    examples = tokenize(records, Tokenizer(tiny_tokenizer()), settings, K, supervised.texts(weights))
    for seed, name in enumerate(supervised.targets(weights)):
        setattr(examples, name, np.random.default_rng(seed).normal(size=(len(examples), E)).astype(np.float32))
    return examples


def plan_of(examples, batch_size=8):
    lengths = [[len(ids) for ids in side] for side in (examples.query, examples.answer)]
    extra = [max(map(len, texts)) for texts in zip(*examples.extra.values())]
    return batches.BatchSchedule(*lengths, batch_size, 2, True, 0, extra)


def test_batches_carry_extra_texts_only_when_used():
    plain = examples_of(LossConfig())
    batch = batches.Batches(plain, plan_of(plain), 0, 1)[0]
    assert set(batch) == {"query", "query_lengths", "answer", "answer_lengths", "target"}
    examples = examples_of(EVERYTHING)
    plan = plan_of(examples)
    for step in range(3):
        whole = batches.Batches(examples, plan, 0, 1)[step]
        parts = [batches.Batches(examples, plan, process, 2)[step] for process in range(2)]
        for name, array in whole.items():
            np.testing.assert_array_equal(array, np.concatenate([part[name] for part in parts]))
        rows = plan[step].rows
        np.testing.assert_array_equal(whole["negative_target"], examples.negative_target[rows])
        assert whole["extra"].shape == (8, 3, plan[step].extra)
        assert plan[step].extra == min(edge for edge in plan.extra_edges if edge >= whole["extra_lengths"].max())
        for number, texts in enumerate(examples.extra.values()):
            for row, ids, length in zip(rows, whole["extra"][:, number], whole["extra_lengths"][:, number]):
                assert ids[:length].tolist() == texts[row].tolist() and not ids[length:].any()
        real, computed = batches.count_tokens(whole)
        texts = [examples.query, examples.answer, *examples.extra.values()]
        assert real == sum(len(ids[row]) for ids in texts for row in rows)
        assert computed == sum(whole[name].size for name in ("query", "answer", "extra"))


def test_a_record_without_a_negative_answer_is_left_out_where_it_is_read():
    records = [RECORDS[0] | {"negative_answer": " "}, RECORDS[1]]
    assert examples_of(EVERYTHING, records).row.tolist() == [1]
    without = [{name: record[name] for name in ("question", "answer")} for record in records]
    assert examples_of(LossConfig(), without).row.tolist() == [0, 1]


# The sum


@pytest.fixture(scope="module", params=[0, 2], ids=["frozen", "lora"])
def method(request, tiny):
    """(model, trainable, frozen) without and with a LoRA."""
    backbone = tiny("qwen3")
    model = LLM2VecGenModel(backbone.architecture, K, 1, E, request.param, 2.0)
    trainable = model.init(jax.random.key(0), backbone.frozen)
    if request.param:  # a fresh LoRA changes nothing
        trainable["lora"] = jax.tree.map(lambda x: x + 0.05, trainable["lora"])
    return model, trainable, backbone.frozen


def total(method, weights, batch, dropout=None):
    """losses.loss_fn with its gradients, as a training step calls it."""
    model, trainable, frozen = method
    if not model.lora_rank:
        ids = {name: batch[name] for name in ("query", "extra") if name in batch}
        batch = batch | {
            name: model.prefill(frozen, x, batch[f"{name}_lengths"], x.shape[-1] + 8) for name, x in ids.items()
        }
    return jax.jit(
        lambda trainable, batch: jax.value_and_grad(losses.loss_fn, has_aux=True)(
            trainable, model, frozen, batch, weights, dropout
        )
    )(trainable, batch)


def test_the_sum_is_the_published_one_of_plain_embeddings(method):
    """Against scripts/train.py's sum, written out, of embeddings that `encode` gives text by text."""
    model, trainable, frozen = method
    examples = examples_of(EVERYTHING)
    batch = batches.Batches(examples, plan_of(examples), 0, 1)[0]
    (loss, parts), gradients = total(method, EVERYTHING, batch)
    encode = jax.jit(lambda ids, lengths: model.encode(trainable, frozen, ids, lengths)[0])
    query = encode(batch["query"], batch["query_lengths"])
    texts = [encode(batch["extra"][:, number], batch["extra_lengths"][:, number]) for number in range(3)]
    repeat, negative, negative_repeat = texts
    mse, w = losses.alignment, EVERYTHING
    expected = {
        "alignment": (w.alignment, mse(query, batch["target"])),
        "repeat_alignment": (w.alignment * w.repeat, mse(repeat, batch["target"])),
        "negative_alignment": (w.alignment * w.negative, mse(negative, batch["negative_target"])),
        "negative_repeat_alignment": (
            w.alignment * w.negative * w.repeat,
            mse(negative_repeat, batch["negative_target"]),
        ),
        "margin": (w.margin, supervised.margin(query, negative, w.margin_threshold)),
        "contrastive": (w.contrastive, supervised.contrastive(query, repeat, negative_repeat, "cosine", 20.0, 0.0)),
    }
    for name, (_, value) in expected.items():
        np.testing.assert_allclose(parts[f"{name}_loss"], value, rtol=1e-4)
    assert set(parts) == {f"{name}_loss" for name in (*expected, "reconstruction")}
    added = sum(weight * parts[f"{name}_loss"] for name, (weight, _) in expected.items())
    np.testing.assert_allclose(loss, added + w.reconstruction * parts["reconstruction_loss"], rtol=1e-5)
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in jax.tree.leaves(gradients))


@pytest.mark.parametrize("name, weights", [("margin", {"margin": 1.0}), ("contrastive", {"contrastive": 1.0})])
def test_a_loss_alone_trains_the_tokens(method, name, weights):
    weights = LossConfig(reconstruction=0, alignment=0, margin_threshold=20.0, **weights)
    examples = examples_of(weights)
    (loss, parts), gradients = total(method, weights, batches.Batches(examples, plan_of(examples), 0, 1)[0])
    assert set(parts) == {"reconstruction_loss", "alignment_loss", f"{name}_loss"}
    assert loss == parts[f"{name}_loss"] > 0
    assert gradients["tokens"].any() and gradients["alignment"]["kernel"].any()


def test_dropout_of_the_extra_texts_is_their_own(tiny):
    backbone = tiny("qwen3")
    model = LLM2VecGenModel(backbone.architecture, K, 0, E, 2, 2.0)
    trainable = jax.tree.map(lambda x: x + 0.05, model.init(jax.random.key(0), backbone.frozen))
    ids, lengths = np.full((2, 8), 9, np.int32), np.full(2, 8, np.int32)
    batch = {"extra": ids[:, None], "extra_lengths": lengths[:, None]}
    keys = jax.random.split(jax.random.key(3), model.architecture.num_layers)
    for rate, equal in ((0.0, True), (0.3, False)):
        dropout = Dropout(keys, rate, 0.0)
        extra = supervised.embed(trainable, model, backbone.frozen, batch, dropout)[:, 0]
        query, _ = model.encode(trainable, backbone.frozen, ids, lengths, dropout)
        assert np.allclose(extra, query, rtol=1e-5) == equal


# Training


def run(tmp_path, tiny, tiny_folder, name, *words, devices=1, records=RECORDS):
    if not (tmp_path / "responses.jsonl").exists():
        write_jsonl(tmp_path / "responses.jsonl", records)
    words = (
        f"backbone.path={tiny_folder('qwen3')}",
        f"data.responses={tmp_path / 'responses.jsonl'}",
        f"train.output={tmp_path / name}",
        f"compression.num_tokens={K}",
        "train.batch_size=8",
        "train.steps=3",
        "train.log_every=1",
        *words,
    )
    backbone = tiny("qwen3") if devices == 1 else None
    train(options.load(config.TrainConfig, None, words), False, backbone)
    return read_metrics(tmp_path / name)


WORDS = ("loss.repeat=0.5", "loss.negative=0.7", "loss.margin=0.3", "loss.contrastive=0.2", "loss.margin_threshold=20")


@pytest.mark.slow
def test_a_run_on_eight_devices_is_that_on_one(tmp_path, tiny, tiny_folder):
    one = run(tmp_path, tiny, tiny_folder, "one", *WORDS)
    eight = run(tmp_path, tiny, tiny_folder, "eight", *WORDS, "mesh.fsdp=2", devices=8)
    losses_of = [f"{part}_loss" for part in ("reconstruction", "alignment", *PARTS)]
    for left, right in zip(one, eight, strict=True):
        assert set(losses_of) <= set(left)
        for name in ("loss", "grad_norm", *losses_of):
            np.testing.assert_allclose(left[name], right[name], rtol=1e-4)
    assert one[-1]["loss"] != one[0]["loss"]


def test_metrics_hold_extra_parts_only_when_used(tmp_path, tiny, tiny_folder):
    records = [{name: record[name] for name in ("question", "answer")} for record in RECORDS]
    plain = run(tmp_path, tiny, tiny_folder, "plain", records=records)
    assert not any(f"{part}_loss" in row for row in plain for part in PARTS)
    repeated = run(tmp_path, tiny, tiny_folder, "repeated", "loss.repeat=1")
    assert all(f"{part}_loss" in row for row in repeated for part in PARTS[:1])
    assert not any(f"{part}_loss" in row for row in repeated for part in PARTS[1:])
    with pytest.raises(InputError, match="line 1: no column 'negative_question'"):
        run(tmp_path, tiny, tiny_folder, "negative", "loss.margin=1")


def test_a_file_of_targets_has_none_of_negatives(tmp_path, tiny, tiny_folder):
    np.save(tmp_path / "targets.npy", np.zeros((len(RECORDS), E), np.float32))
    words = ("teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}")
    with pytest.raises(InputError, match="loss.negative=0"):
        run(tmp_path, tiny, tiny_folder, "negative", *words, "loss.negative=1")
    assert "margin_loss" in run(tmp_path, tiny, tiny_folder, "margin", *words, "loss.margin=1")[-1]
