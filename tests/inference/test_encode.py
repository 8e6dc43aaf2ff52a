"""Texts to vectors: packing, what packed texts see, compiled shapes, the thread that reads ahead."""

import dataclasses

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference import encode
from llm2vec_gen_jax.model.attention import SHARED, AttentionMask, attend
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from tests.conftest import one_device_mesh
from tests.helpers.embedders import TEXTS, E, embedder_on, unpacked

# Packing


@hypothesis.given(
    st.lists(st.one_of(st.integers(1, 60), st.integers(1, 700)), max_size=200),
    st.sampled_from([1, 4, 32]),
    st.sampled_from([1, 8]),
    st.sampled_from([0, 1, 100, 600]),
)
def test_a_plan_holds_every_text_once_in_a_known_shape(lengths, batch_size, shards, shared):
    lengths = [shared + length for length in lengths]
    batches = encode.pack_batches(lengths, batch_size, shards, shared)
    texts = [text for batch in batches for row in batch.rows for text in row]
    assert sorted(texts) == list(range(len(lengths)))
    assert batches == encode.pack_batches(lengths, batch_size, shards, shared)
    known = encode.shapes(max(lengths, default=1), batch_size, shards)
    for batch in batches:
        assert (batch.height, batch.width) in known and batch.height % shards == 0
        assert 0 < len(batch.rows) <= batch.height
        assert all(shared + sum(lengths[text] - shared for text in row) <= batch.width for row in batch.rows)


@pytest.mark.parametrize("queries, passages", [(2000, 1000), (200, 100), (1000, 1000), (2000, 0), (0, 1000)])
def test_at_least_92_percent_of_computed_tokens_are_real(queries, passages):
    random = np.random.default_rng(0)
    lengths = [*random.normal(20, 4, queries), *random.normal(410, 80, passages)]
    lengths = np.clip(lengths, 11, 512).astype(int).tolist()
    real = sum(lengths) / encode.computed_tokens(encode.pack_batches(lengths, 32, 1))
    assert real >= 0.92


@hypothesis.given(st.lists(st.integers(0, 250), min_size=1, max_size=24))
@hypothesis.settings(max_examples=12)
def test_packed_is_unpacked(embedder, lengths):
    texts = ["abcdefg "[number % 8] * length for number, length in enumerate(lengths)]
    expected, expected_prompts = unpacked(embedder, texts)
    found, prompts = embedder.encode(texts, batch_size=2, return_soft_prompts=True)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(prompts, expected_prompts, atol=1e-5)
    np.testing.assert_allclose(embedder.encode(texts, batch_size=2), expected, atol=1e-5)  # the mean before the heads


@pytest.mark.parametrize("family, prompt", [("llama3", ""), ("qwen2", "An instruction:")])
def test_packed_is_unpacked_with_lora(tiny, family, prompt):
    plain, changed = embedder_on(tiny(family)), embedder_on(tiny(family), rank=2)
    expected, _ = unpacked(changed, [f"{prompt} {text}" if prompt else text for text in TEXTS])
    found = changed.encode(TEXTS, prompt=prompt)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - plain.encode(TEXTS, prompt=prompt)).max() > 1e-2


# A prefix that the texts share


@pytest.mark.parametrize(
    "ids, shared",
    [
        ([], 0),
        ([[]], 0),
        ([[7, 8]], 2),
        ([[7, 8, 9], [7, 8]], 2),
        ([[7, 8, 9], [7, 8, 1, 9], [7, 8, 9]], 2),
        ([[7, 8], [8, 8]], 0),
        ([[7, 8], []], 0),
    ],
)
def test_the_longest_common_prefix(ids, shared):
    assert encode.shared_prefix([np.array(row, np.int32) for row in ids]) == shared


@hypothesis.given(st.integers(1, 120), st.lists(st.integers(0, 120), min_size=1, max_size=24))
@hypothesis.settings(max_examples=12)
def test_a_text_after_a_shared_instruction_is_the_text_after_it_alone(embedder, instruction, lengths):
    instruction = ("Retrieve: " * 12)[:instruction]
    texts = ["abcdefg "[number % 8] * length for number, length in enumerate(lengths)]
    expected, expected_prompts = unpacked(embedder, [f"{instruction} {text}" for text in texts])
    options = {"prompt": instruction, "batch_size": 2}
    found, prompts = embedder.encode(texts, return_soft_prompts=True, **options)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(prompts, expected_prompts, atol=1e-5)
    np.testing.assert_allclose(embedder.encode(texts, **options), expected, atol=1e-5)


def test_rows_hold_an_instruction_once(embedder, monkeypatch):
    batches, arrange = [], encode.arrange
    monkeypatch.setattr(encode, "arrange", lambda batch, *rest: batches.append(batch) or arrange(batch, *rest))
    texts = [f"{number:03} a short text" for number in range(300)]
    embedder.encode(texts, prompt="An instruction:")
    assert {batch.shared for batch in batches} == {len("An instruction: ")}
    lengths = [len(f"An instruction: {text}") + embedder.model.num_appended for text in texts]
    assert encode.computed_tokens(batches) < 0.7 * encode.computed_tokens(encode.pack_batches(lengths, 32, 1))


def test_splash_attention_shares_no_prefix(embedder):
    ids = embedder.tokenize(["one", "two"], "An instruction:")
    model = dataclasses.replace(embedder.model, execution=Execution(attention="pallas"))
    assert {batch.shared for batch in encode.plan_window(model, embedder.backbone, ids, 32)} == {0}
    assert Execution(platform="gpu").shares_prefix(64, np.dtype("float32"))
    assert not Execution(platform="tpu").shares_prefix(64, np.dtype("float32"))


def test_bfloat16_depends_little_on_the_batch(tiny_folder):
    embedder = embedder_on(load_backbone(str(tiny_folder("llama")), "bfloat16", one_device_mesh()))
    together, alone = embedder.encode(TEXTS[:6]), np.stack([embedder.encode(text) for text in TEXTS[:6]])
    assert (np.abs(together - alone).max(axis=1) <= 2e-2 * np.abs(alone).max(axis=1)).all()


def test_no_text_of_a_row_sees_another(embedder):
    packed = [*encode.arrange(encode.Batch(1, 64, [[0, 1, 2]]), embedder.tokenize(["one", "two", "three"]), 1, 4)][0]
    model, frozen = embedder.model, embedder.backbone.frozen

    def embeddings(tokens, ids_BT=packed.ids_BT):
        return model.encode_packed(
            embedder.trainable | {"tokens": tokens}, frozen, packed.replace(ids_BT=ids_BT), False
        )

    tokens = embedder.trainable["tokens"]
    before, _ = embeddings(tokens)
    other_ids = packed.ids_BT.copy()
    other_ids[0, len("one") + 4 + 1] = 99  # in the second text
    after, _ = embeddings(tokens, other_ids)
    np.testing.assert_array_equal(before[0, [0, 2]], after[0, [0, 2]])
    assert np.abs(before[0, 1] - after[0, 1]).max() > 1e-3


def test_eight_devices_give_the_same_vectors(embedder, tiny_folder):
    mesh = sharding.make_mesh(config.MeshConfig(data=4, fsdp=2))
    sharded = embedder_on(load_backbone(str(tiny_folder("qwen3")), "float32", mesh))
    for prompt in ("", "An instruction:"):
        expected = embedder.encode(TEXTS, prompt=prompt)
        np.testing.assert_allclose(sharded.encode(TEXTS, prompt=prompt), expected, atol=1e-5)
    assert sharded.encode("one").shape == (E,)


@pytest.mark.parametrize("T", [5, 64, 65, 200, 600])
def test_blocks_and_segments_are_a_masked_softmax(T):
    random = np.random.default_rng(T)
    q_BTNH = random.normal(size=(2, T, 4, 8)).astype(np.float32)
    k_BTGH, v_BTGH = random.normal(size=(2, 2, T, 2, 8)).astype(np.float32)
    segments_BT = np.sort(random.integers(1, 5, (2, T)))
    segments_BT[1, : T // 5] = SHARED
    visibility = AttentionMask(causal=True, segments_BT=segments_BT)
    found = attend(q_BTNH, k_BTGH, v_BTGH, visibility, None, Execution())
    scores = np.einsum("btnh,bsnh->bnts", q_BTNH, k_BTGH.repeat(2, axis=2)) / 8**0.5
    keys = segments_BT[:, None, :]
    seen = np.tril(np.ones((T, T), bool)) & ((segments_BT[:, :, None] == keys) | (keys == SHARED))
    weights = np.where(seen[:, None], np.exp(scores), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(found, np.einsum("bnts,bsnh->btnh", weights, v_BTGH.repeat(2, axis=2)), atol=1e-5)


# Compilation


def test_nothing_compiles_after_the_warm_up(embedder, caplog):
    embedder.warmup(batch_size=3, max_length=300)
    random = np.random.default_rng(0)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        for size in (1, 2, 5, 30, 100):
            texts = ["x" * length for length in random.integers(0, 400, size)]
            embedder.encode(texts, batch_size=3, max_length=300)
    assert not caplog.messages


def test_a_mixed_corpus_compiles_few_shapes(embedder):
    random = np.random.default_rng(1)
    count = encode._encode.jitted(embedder.backbone.execution)._cache_size
    before = count()
    for _ in range(6):
        lengths = np.clip([*random.normal(14, 5, 60), *random.normal(300, 90, 30)], 0, 508).astype(int)
        embedder.encode(["x" * length for length in lengths], batch_size=5)
    found = count() - before
    assert found <= len(encode.shapes(512, 5, 1)) <= 16


# A thread ahead


def test_ahead_keeps_order_and_brings_exceptions():
    def failing():
        yield from range(10)
        raise InputError("late")

    assert list(encode.ahead(range(100))) == list(range(100))
    seen = []
    with pytest.raises(InputError, match="late"):
        for item in encode.ahead(failing()):
            seen.append(item)
    assert seen == list(range(10))


def test_ahead_makes_no_more_than_it_may_and_stops_when_left():
    made = []

    def items():
        for number in range(1000):
            made.append(number)
            yield number

    stream = encode.ahead(items(), depth=3)
    assert next(stream) == 0
    stream.close()
    assert len(made) <= 6
