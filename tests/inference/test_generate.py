"""Generation: token for token what torch generates, with a cache, in any batch, from ids or soft prompts."""

import dataclasses
import functools

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax import config
from llm2vec_gen_jax.data.buckets import pad
from llm2vec_gen_jax.inference import generate
from llm2vec_gen_jax.inference.generate import Sampling
from llm2vec_gen_jax.model.attention import CAUSAL
from llm2vec_gen_jax.model.backbone import Backbone
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from llm2vec_gen_jax.pretrained.tokenizer import Tokenizer

QUESTIONS = (
    "Hi",
    "What is the capital of France?",
    "Name three primary colors.",
    "Why is the sky blue? Explain it to a child in one sentence.",
    "def fibonacci(n):",
    "Translate to French: good morning, how are you today?",
    "I have 12 apples, eat 5 and buy 30 more. How many do I have? Think step by step.",
    "2+2",
)
PROMPTS = [np.random.default_rng(n).integers(4, 260, n).tolist() for n in (9, 1, 4)]
GREEDY, SAMPLED = Sampling(10), Sampling(10, temperature=1.5, top_p=0.9)


def stopping_at(backbone, stop_ids):
    """The backbone with other ids that end a row."""
    tokenizer = Tokenizer(backbone.tokenizer.hf)
    tokenizer.stop_ids = list(stop_ids)
    return dataclasses.replace(backbone, tokenizer=tokenizer)


@pytest.fixture(scope="module")
def endless(tiny):
    """The tiny Qwen3, whose rows never end."""
    return stopping_at(tiny("qwen3"), [])


def embed(backbone, ids):
    return np.asarray(backbone.frozen["embedding"])[np.array(ids)]


# Greedy


def test_smollm2_greedy_equals_torch_token_for_token(smollm2, smollm2_torch):
    """Eight chat prompts of different lengths: right-padded in one batch here, left-padded there."""
    import torch

    prompts = [smollm2.tokenizer.chat_prompt(question, 256) for question in QUESTIONS]
    assert len({len(prompt) for prompt in prompts}) > 4
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    expected = smollm2_torch.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=24, do_sample=False, eos_token_id=2, pad_token_id=2
    )[:, longest:]
    found = generate.generate(smollm2, prompts, Sampling(24))
    for row, wanted in zip(found, expected.tolist(), strict=True):
        assert row == (wanted[: wanted.index(2)] if 2 in wanted else wanted)
    assert smollm2.tokenizer.decode(found[1]) == "The capital of France is Paris."


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_cache_equals_no_cache(family, tiny):
    """Every token is the argmax of one plain pass over all the tokens before it."""
    backbone = stopping_at(tiny(family), [])
    found = generate.generate(backbone, PROMPTS, GREEDY)
    whole = [prompt + row for prompt, row in zip(PROMPTS, found, strict=True)]
    model = Backbone(backbone.architecture)

    @jax.jit
    def argmax(params, ids_BT):
        positions_BT = np.broadcast_to(np.arange(ids_BT.shape[1]), ids_BT.shape)
        x_BTD = model.apply(params, ids_BT, method="embed")
        hidden_BTD, _ = model.apply(params, x_BTD, positions_BT, CAUSAL)
        return model.apply(params, hidden_BTD, method="logits").argmax(axis=-1)

    following = np.asarray(argmax({"params": backbone.frozen}, pad(whole, 24)))
    for b, (prompt, row) in enumerate(zip(PROMPTS, found, strict=True)):
        assert len(row) == GREEDY.max_new_tokens
        assert row == following[b, len(prompt) - 1 : len(prompt) - 1 + len(row)].tolist()
    assert len({token for row in found for token in row}) > 5  # not one token for ever


def test_soft_prompts_that_are_embeddings_equal_ids(endless):
    ids = [prompt[:4] for prompt in (PROMPTS[0], PROMPTS[2])]
    found = generate.generate_from_soft_prompts(endless, embed(endless, ids), GREEDY)
    assert found == generate.generate(endless, ids, GREEDY)


def test_stop_ids_end_their_rows_only(endless):
    """Every row is cut before its first stop id, and the others go on as they would."""
    full = generate.generate(endless, PROMPTS, GREEDY)
    stops = {full[0][4], full[1][7]}
    expected = [row[: min((n for n, token in enumerate(row) if token in stops), default=10)] for row in full]
    assert 0 < min(map(len, expected)) < 10
    found = generate.generate(stopping_at(endless, stops), PROMPTS, GREEDY)
    assert found == expected
    assert [generate.ended(row, GREEDY) for row in found] == [len(row) < 10 for row in expected]


def test_first_token_that_is_a_stop_gives_an_empty_row(endless):
    first = generate.generate(endless, PROMPTS, GREEDY)[0][0]
    assert generate.generate(stopping_at(endless, [first]), PROMPTS[:1], GREEDY) == [[]]


def test_mesh_of_eight_devices_generates_the_same(endless, tiny_folder):
    """Three rows over four data shards: the batch is filled up and the filling dropped."""
    mesh = sharding.make_mesh(config.MeshConfig(2, 2, 2))
    sharded = stopping_at(load_backbone(str(tiny_folder("qwen3")), "float32", mesh), [])
    expected = generate.generate(endless, PROMPTS, SAMPLED, seed=1)
    assert generate.generate(sharded, PROMPTS, SAMPLED, seed=1) == expected


# Sampling


def test_a_sample_does_not_depend_on_its_batch(endless):
    """Seed and row id fix it: not the other rows, its place among them, or how far the batch is padded."""
    expected = generate.generate(endless, PROMPTS, SAMPLED, seed=3, row_ids=[7, 8, 9])
    assert len(set(map(tuple, expected))) == 3
    assert generate.generate(endless, PROMPTS[1:2], SAMPLED, seed=3, row_ids=[8]) == expected[1:2]
    turned = generate.generate(endless, [[33] * 20, *PROMPTS[::-1]], SAMPLED, seed=3, row_ids=[1, 9, 8, 7])
    assert turned[1:] == expected[::-1]


def test_seed_and_row_id_each_change_the_sample(endless):
    prompts = [PROMPTS[0]] * 3
    first = generate.generate(endless, prompts, SAMPLED, seed=0)
    assert len(set(map(tuple, first))) == 3
    assert first == generate.generate(endless, prompts, SAMPLED, seed=0)
    assert all(a != b for a, b in zip(first, generate.generate(endless, prompts, SAMPLED, seed=1)))


def test_every_step_draws_anew(endless):
    """Where all tokens are as good as equally likely, rows repeat one token if noise is reused."""
    for row in generate.generate(endless, PROMPTS, Sampling(10, temperature=1e4)):
        assert len(set(row)) > 5


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (2.0, 0.7)])
def test_samples_follow_the_distribution(temperature, top_p, tiny):
    """Frequencies of 4,000 first tokens against softmax(logits / temperature), cut to its nucleus."""
    backbone = stopping_at(tiny("llama3"), [])
    rows = generate.generate(backbone, [[65]] * 4000, Sampling(1, temperature, top_p))
    counts_V = np.bincount(np.ravel(rows), minlength=264)
    model = Backbone(backbone.architecture)
    params = {"params": backbone.frozen}
    hidden_BTD, _ = model.apply(params, embed(backbone, [[65]]), np.zeros((1, 1), np.int32), CAUSAL)
    logits_V = np.asarray(model.apply(params, hidden_BTD, method="logits"))[0, 0].astype(np.float64)
    logits_V = np.where(in_nucleus(logits_V / temperature, top_p), logits_V / temperature, -np.inf)
    expected_V = softmax(logits_V)
    assert not counts_V[expected_V == 0].any()
    # The total variation of 4,000 draws from V outcomes is about sqrt(V / (2 pi 4000)) at most.
    assert np.abs(counts_V / 4000 - expected_V).sum() / 2 < 0.1


# The nucleus


def softmax(logits_V):
    exp_V = np.exp(logits_V - logits_V.max())
    return exp_V / exp_V.sum()


def in_nucleus(logits_V, top_p):
    """Which tokens belong to the nucleus: sorted, the first ones up to the one that makes the total top_p."""
    probability_V = softmax(logits_V)
    order = np.argsort(-probability_V)
    before = np.cumsum(probability_V[order]) - probability_V[order]
    kept = np.zeros(len(logits_V), bool)
    kept[order[before < top_p]] = True
    return kept


@functools.partial(jax.jit, static_argnums=1)
def nucleus(logits_BV, top_p):
    return generate._nucleus(logits_BV, top_p)


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(st.integers(0, 9999), st.floats(0.01, 30.0), st.sampled_from([0.01, 0.3, 0.5, 0.95, 0.999]))
def test_nucleus_equals_the_sorted_one(seed, spread, top_p):
    logits_BV = (spread * np.random.default_rng(seed).normal(size=(2, 50))).astype(np.float32)
    found_BV = np.asarray(nucleus(logits_BV, top_p))
    for logits_V, found_V in zip(logits_BV, found_BV, strict=True):
        sums = np.cumsum(np.sort(softmax(logits_V.astype(np.float64)))[::-1])
        hypothesis.assume(np.abs(sums - top_p).min() > 1e-6)  # rounding may decide a tie either way
        expected_V = in_nucleus(logits_V.astype(np.float64), top_p)
        assert (np.isfinite(found_V) == expected_V).all()
        assert (found_V[expected_V] == logits_V[expected_V]).all()


def test_nucleus_of_a_large_vocabulary():
    """The real vocabulary's size: the total just reaches top_p, and would not without the last token kept."""
    logits_BV = 3 * np.random.default_rng(0).normal(size=(1, 49152)).astype(np.float32)
    probability_V = softmax(logits_BV[0].astype(np.float64))
    kept_V = probability_V[np.isfinite(np.asarray(nucleus(logits_BV, 0.95))[0])]
    assert kept_V.sum() >= 0.95 - 1e-5
    assert kept_V.sum() - kept_V.min() < 0.95 + 1e-5


def test_full_nucleus_keeps_everything():
    logits_BV = np.random.default_rng(0).normal(size=(2, 50)).astype(np.float32)
    np.testing.assert_array_equal(generate._nucleus(logits_BV, 1.0), logits_BV)
