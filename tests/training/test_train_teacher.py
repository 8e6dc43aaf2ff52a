"""Teachers trained here: the losses are PyTorch's, the batches are what they say, the adapters load in peft."""

import dataclasses
import json
import pathlib
import shutil
import signal
import time

import jax
import jax.numpy as jnp
import numpy as np
import peft as their_peft
import pytest
import torch
import transformers

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.formats import peft
from llm2vec_gen_jax.model import lora
from llm2vec_gen_jax.model.layers import Dropout
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import memory
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from llm2vec_gen_jax.teachers.encoder import pool_rows
from llm2vec_gen_jax.training import llm2vec
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train_teacher import train_teacher
from tests.conftest import one_device_mesh

FAMILIES = ["llama3", "qwen2", "qwen3"]
RANK, ALPHA = 3, 6.0
SENTENCES = [f"Sentence number {n} is about {'cats dogs rivers tea'.split()[n % 4]} and {n * n}." for n in range(40)]
WORDS = (
    "corpus.path=corpus.txt",
    "mntp.steps=4",
    "mntp.batch_size=8",
    "mntp.max_length=16",
    "mntp.rank=2",
    "simcse.steps=3",
    "simcse.batch_size=8",
    "simcse.rank=2",
    "train.output=teacher",
    "train.log_every=1",
    "train.checkpoint_every=1",
)


@pytest.fixture(params=FAMILIES)
def both(request, tiny, tiny_folder, tmp_path):
    """(model, frozen, LoRA tree with its scale, the torch model with the same LoRA) of a tiny backbone."""
    backbone = tiny(request.param)
    tree = lora.init(backbone.architecture, RANK, jax.random.key(0))
    tree = jax.tree.map(lambda x: x + 0.2 * jax.random.normal(jax.random.key(1), x.shape), tree)
    peft.save(tmp_path / "adapter", tree, RANK, ALPHA, "tiny")
    base = transformers.AutoModel.from_pretrained(tiny_folder(request.param), attn_implementation="eager")
    theirs = their_peft.PeftModel.from_pretrained(base, tmp_path / "adapter", is_trainable=True).eval()
    causal_lm = transformers.AutoModelForCausalLM.from_pretrained(tiny_folder(request.param))
    model = LLM2VecGenModel(backbone.architecture, 1, 0, backbone.architecture.hidden_size)
    return model, backbone.frozen, tree, theirs, causal_lm.lm_head.weight


def bidirectional(theirs, ids, lengths):
    """Last hidden states of right-padded rows that see all of their real tokens."""
    unseen = torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1])
    mask = mask.masked_fill(unseen[:, None, None, :], torch.finfo(torch.float32).min)
    return theirs(input_ids=torch.tensor(ids, dtype=torch.long), attention_mask=mask).last_hidden_state


def same_gradients(ours, theirs):
    """Compares the gradient of a LoRA tree with that of peft's parameters."""
    named = {name.replace(".default", ""): p.grad.numpy() for name, p in theirs.named_parameters() if p.requires_grad}
    ours = peft.tensors_of(ours)
    assert ours.keys() == named.keys()
    for key, value in ours.items():
        assert np.abs(value - named[key]).max() <= 1e-3 * np.abs(named[key]).max() + 1e-7, key


def test_mntp_is_a_plain_pytorch_computation(both):
    model, frozen, tree, theirs, head = both
    settings = config.MntpConfig(batch_size=4, max_length=24, rank=RANK)
    ids = [np.random.default_rng(n).integers(4, 260, 50) for n in range(8)]
    batch = llm2vec.MaskedBlocks(ids, settings, 99, 260, 0, 0, 1)[3]

    def loss(tree):
        return llm2vec.mntp(model, lora.scaled(tree, ALPHA / RANK), frozen, jax.tree.map(jnp.asarray, batch))

    value, gradients = jax.jit(jax.value_and_grad(loss))(tree)
    hidden = bidirectional(theirs, batch["text"], batch["text_lengths"])
    place, label = torch.tensor(batch["positions"]).long(), torch.tensor(batch["label"]).long()
    before = hidden.gather(1, (place - 1)[..., None].expand(-1, -1, hidden.shape[-1]))
    expected = torch.nn.functional.cross_entropy((before @ head.T).flatten(0, 1), label.flatten())
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    same_gradients(gradients, theirs)


def test_simcse_is_a_plain_pytorch_computation_without_dropout(both):
    model, frozen, tree, theirs, _ = both
    random = np.random.default_rng(0)
    lengths = np.array([5, 9, 3, 9], np.int32)
    batch = {"text": random.integers(4, 260, (4, 9)).astype(np.int32), "text_lengths": lengths}

    def loss(tree):
        updates = lora.scaled(tree, ALPHA / RANK)
        return llm2vec.simcse(model, updates, frozen, jax.tree.map(jnp.asarray, batch), 20.0)

    value, gradients = jax.jit(jax.value_and_grad(loss))(tree)
    hidden = bidirectional(theirs, batch["text"], lengths)
    real = (torch.arange(9) < torch.tensor(lengths)[:, None]).float()[..., None]
    pooled = (hidden * real).sum(dim=1) / real.sum(dim=1)
    cosines = torch.nn.functional.cosine_similarity(pooled[:, None], pooled[None], dim=-1)
    expected = torch.nn.functional.cross_entropy(20 * cosines, torch.arange(4))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5, atol=2e-6)  # float32's step at a logit of 20
    same_gradients(gradients, theirs)


def test_dropout_makes_the_two_passes_differ_and_a_key_repeats_them(tiny):
    backbone = tiny("qwen3")
    model = LLM2VecGenModel(backbone.architecture, 1, 0, 32)
    tree = lora.init(backbone.architecture, RANK, jax.random.key(0))
    ids, lengths = jnp.full((4, 8), 7), jnp.full(4, 8)
    keys = jax.random.split(jax.random.key(3), backbone.architecture.num_layers)

    def pooled(keys, *rates):
        return model.mean_pool(backbone.frozen, ids, lengths, False, tree, Dropout(keys, *rates))

    rows = pooled(keys, 0.0, 0.3)
    assert np.abs(rows - rows[0]).max(axis=1)[1:].min() > 1e-3  # equal texts, other zeros
    np.testing.assert_array_equal(rows, pooled(keys, 0.0, 0.3))
    assert np.abs(rows - pooled(jax.vmap(jax.random.fold_in, (0, None))(keys, 1), 0.0, 0.3)).max() > 1e-3
    np.testing.assert_allclose(pooled(keys, 0.0, 0.0)[1], pooled(keys, 0.0, 0.0)[0], atol=1e-6)


@pytest.mark.parametrize("masking, shares", [("bert", (0.8, 0.1, 0.1)), ("all", (1.0, 0.0, 0.0))])
def test_masked_blocks(masking, shares):
    settings = config.MntpConfig(batch_size=16, max_length=50, masking=masking)
    stream = np.arange(10, 10 + 50 * 40)
    blocks = llm2vec.MaskedBlocks(np.array_split(stream, 7), settings, 1, 5000, 0, 0, 1)
    shown, seen = [], set()
    for step in range(100):
        batch = blocks[step]
        assert batch["positions"].shape == (16, 10) and batch["positions"].min() >= 1
        assert all(len(set(row)) == 10 for row in batch["positions"])
        original = stream.reshape(40, 50)[blocks.rows(step)]
        np.testing.assert_array_equal(np.take_along_axis(original, batch["positions"], 1), batch["label"])
        untouched = np.ones_like(original, bool)
        np.put_along_axis(untouched, batch["positions"], False, axis=1)
        np.testing.assert_array_equal(batch["text"][untouched], original[untouched])
        hidden = np.take_along_axis(batch["text"], batch["positions"], axis=1)
        shown.append([(hidden == 1).mean(), ((hidden != 1) & (hidden != batch["label"])).mean()])
        seen |= set(batch["positions"].ravel().tolist())
    np.testing.assert_allclose(np.mean(shown, axis=0), shares[:2], atol=0.01)
    assert seen == set(range(1, 50))
    same = llm2vec.MaskedBlocks(np.array_split(stream, 3), settings, 1, 5000, 0, 1, 2)[99]
    np.testing.assert_array_equal(same["text"], blocks[99]["text"][8:])
    assert not np.array_equal(blocks[0]["positions"], blocks[5]["positions"])


def test_all_tokens_but_the_first_can_be_masked():
    settings = config.MntpConfig(batch_size=2, max_length=8, mask_probability=1.0)
    batch = llm2vec.MaskedBlocks([np.arange(5, 45)], settings, 1, 50, 0, 0, 1)[0]
    np.testing.assert_array_equal(batch["positions"], [range(1, 8)] * 2)


def test_sentences_are_split_once_each():
    texts = [
        "One sentence that is long. Another sentence? Yes!\n\n- a line of its own, no stop",
        "One sentence that is long.",
    ]
    expected = ["One sentence that is long.", "- a line of its own, no stop"]
    assert llm2vec.sentences(texts) == expected


# The command


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "corpus.txt").write_text("\n".join(SENTENCES))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(tiny_folder, *words):
    words = (f"backbone.path={tiny_folder('qwen3')}", *WORDS, *words)
    return train_teacher(options.load(config.TeacherTrainConfig, None, words), False)


def test_the_adapters_load_in_peft_with_the_same_vectors(place, tiny, tiny_folder):
    folders = run(tiny_folder, "mntp.learning_rate=0.01", "simcse.learning_rate=0.01")
    assert folders == [pathlib.Path("teacher/mntp"), pathlib.Path("teacher/simcse")]
    backbone = load_backbone(str(tiny_folder("qwen3")), "float32", one_device_mesh())

    def pooled(ids):
        return pool_rows(backbone.architecture, backbone.frozen, False, ids, (len(ids), 9), backbone.execution)

    before = pooled([[9] * 6])
    theirs = transformers.AutoModel.from_pretrained(tiny_folder("qwen3"), attn_implementation="eager")
    for folder in folders:
        merged = peft.merge(backbone.frozen, [folder], backbone.architecture)
        backbone = dataclasses.replace(backbone, frozen=merged)
        theirs = their_peft.PeftModel.from_pretrained(theirs, folder).merge_and_unload().eval()
    ids = np.random.default_rng(0).integers(4, 260, (3, 9))
    lengths = np.array([9, 4, 7])
    ours = pooled([row[:length] for row, length in zip(ids, lengths)])
    with torch.no_grad():
        hidden = bidirectional(theirs, ids, lengths)
    expected = [hidden[row, :length].mean(dim=0).numpy() for row, length in enumerate(lengths)]
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    assert np.abs(pooled([[9] * 6]) - before).max() > 1e-2
    for stage, steps in (("mntp", 4), ("simcse", 3)):
        records = read_metrics(pathlib.Path(f"teacher/{stage}-run"))
        assert [row["step"] for row in records] == list(range(1, steps + 1))
        assert all(np.isfinite(row["loss"]) for row in records)


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_adapters(launch, place, tiny_folder):
    words = (f"backbone.path={tiny_folder('llama3')}", *WORDS, "simcse.steps=30")
    whole = launch(place, "train_teacher", *words, "train.output=whole")
    assert whole.wait(300) == 0, whole.stderr.read()
    killed = launch(place, "train_teacher", *words)
    for _ in range(3000):
        time.sleep(0.02)
        steps = [path.name for path in (place / "teacher" / "simcse-run" / "checkpoints").glob("[1-9]*")]
        if any(step.isdigit() and int(step) >= 2 for step in steps):
            break
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (place / "teacher" / "simcse").exists()
    again = launch(place, "train_teacher", *words)
    out, err = again.communicate(timeout=300)
    assert again.returncode == 0, err
    assert "teacher/mntp: already finished" in out and "resuming teacher/simcse-run" in out
    for stage in ("mntp", "simcse"):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            assert (place / "teacher" / stage / name).read_bytes() == (place / "whole" / stage / name).read_bytes()


def test_bad_input_is_named(place, tiny_folder):
    (place / "short.txt").write_text("\n".join(f"Number {number}." for number in range(40)))
    for word, expected in (
        ("corpus.path=none.txt", "none.txt: no such file"),
        ("mntp.mask_token=two words", "mntp.mask_token='two words' is 9 tokens"),
        ("mntp.max_length=4000", "lower one of them"),
        ("simcse.batch_size=400", "the corpus has 40 texts"),
        ("mntp.masking=al", "did you mean 'all'"),
        ("corpus.path=short.txt", "the corpus has 0 texts"),
    ):
        with pytest.raises(InputError, match=expected):
            run(tiny_folder, word, "train.overwrite=true")
        assert not list(place.glob("teacher/*/metrics.jsonl")), "before any training"
    run(tiny_folder, "train.overwrite=true", "simcse.steps=0")
    with pytest.raises(InputError, match="holds another run .*mntp.rank: 2 -> 4"):
        run(tiny_folder, "mntp.rank=4")


def test_a_run_is_not_resumed_with_another_corpus(place, tiny_folder):
    run(tiny_folder, "simcse.steps=0")
    shutil.rmtree(place / "teacher" / "mntp")  # as if the command had been stopped before its last word
    (place / "corpus.txt").write_text("\n".join(SENTENCES).replace("cats", "bats"))
    with pytest.raises(InputError, match="is of another run .*data"):
        run(tiny_folder, "simcse.steps=0")


@pytest.mark.slow
def test_without_a_corpus_the_backbone_writes_it(place):
    """The real backbone, a handful of responses: what it writes is what it is trained on."""
    words = ("corpus.queries=8", "corpus.max_new_tokens=24", "mntp.steps=1", "mntp.batch_size=8", "mntp.max_length=16")
    words += ("simcse.steps=1", "simcse.batch_size=8", "train.output=own", "train.adapter_dtype=bfloat16")
    words += ("mntp.dropout=0", "simcse.dropout=0")  # a minute of random numbers
    train_teacher(options.load(config.TeacherTrainConfig, None, words), False)
    assert len((place / "own" / "responses.jsonl").read_text().splitlines()) == 8
    size = (place / "own" / "simcse" / "adapter_model.safetensors").stat().st_size
    assert size < 11e6
    settings = json.loads((place / "own" / "simcse" / "adapter_config.json").read_text())
    assert settings["r"] == 16 and len(settings["target_modules"]) == 7


def test_what_fits_the_device_decides_what_the_backward_pass_keeps(tiny_folder, tmp_path, monkeypatch, messages):
    monkeypatch.chdir(tmp_path)
    pathlib.Path("corpus.txt").write_text("\n".join(SENTENCES * 4))
    words = (*WORDS, f"backbone.path={tiny_folder('qwen3')}", "mntp.steps=1", "simcse.steps=0", "train.overwrite=true")
    for limit, expected in ((1e12, 0), (1, 1)):
        monkeypatch.setattr(memory, "limit", lambda mesh, limit=limit: limit)
        train_teacher(options.load(config.TeacherTrainConfig, None, words), show_progress=False)
        assert messages().count("train.remat=block, chosen by the memory of the largest batch") == expected
