"""The backbone: equal to torch, from folders, on every mesh, wired to every field of its config."""

import dataclasses
import re

import jax
import numpy as np
import pytest

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.data.buckets import pad
from llm2vec_gen_jax.formats import hf, weights
from llm2vec_gen_jax.inference import generate
from llm2vec_gen_jax.model import architecture as architecture_lib
from llm2vec_gen_jax.model.attention import CAUSAL, AttentionMask, KVCache
from llm2vec_gen_jax.model.backbone import Backbone, abstract_params
from llm2vec_gen_jax.parallel import sharding
from tests.conftest import FAMILIES, one_device_mesh, tiny_torch_model, torch_outputs
from tests.helpers.backbones import (
    ROWS,
    assert_same_outputs,
    assert_same_weights,
    load,
    mesh_of,
    outputs,
    run,
    save_folder,
)

VARIANTS = {
    **{family: (family, {}) for family in FAMILIES},
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-wide-heads": ("llama", {"head_dim": 12}),
    "qwen2-untied": ("qwen2", {"tie_word_embeddings": False}),
    "qwen3-untied-ungrouped": ("qwen3", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
}


# Equal to torch


@pytest.mark.parametrize("variant", VARIANTS)
def test_hidden_states_and_logits_equal_torch(variant, tmp_path):
    family, changes = VARIANTS[variant]
    model = tiny_torch_model(family, **changes)
    backbone = load(save_folder(tmp_path, model))
    assert backbone.architecture.tied_embeddings == model.config.tie_word_embeddings
    causal, bidirectional = (torch_outputs(model, ROWS, causal) for causal in (True, False))
    assert np.abs(causal[0][0] - bidirectional[0][0]).max() > 0.1  # torch did run bidirectionally
    assert_same_outputs(outputs(backbone, causal=True), causal, 1e-4)
    assert_same_outputs(outputs(backbone, causal=False), bidirectional, 1e-4)


def test_smollm2_equals_torch(smollm2, smollm2_torch):
    """To 1e-4 of the largest value: hidden states reach 50, logits 40."""
    texts = ["The capital of France is", "Hi", "def add(a, b):\n    return a + b  # 1234567890 is long"]
    rows = smollm2.tokenizer.encode(texts, 64)
    for causal in (True, False):
        expected = torch_outputs(smollm2_torch, rows, causal)
        assert_same_outputs(outputs(smollm2, rows, causal), expected, 1e-4)


def test_bfloat16_is_close_to_float32(tiny):
    backbone = tiny("qwen3")
    params = jax.tree.map(lambda x: x.astype("bfloat16"), backbone.frozen)
    rounded = [[x.astype(np.float32) for x in row] for row in outputs(backbone, params=params)]
    assert_same_outputs(rounded, outputs(backbone), 0.1)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other compilers slice bfloat16")
def test_a_bfloat16_pass_makes_no_float32_copy_of_the_layers(tiny):
    backbone = tiny("qwen3")
    params = jax.tree.map(lambda x: x.astype("bfloat16"), backbone.frozen)
    ids, lengths = np.ones((2, 8), np.int32), np.full(2, 8, np.int32)
    program = run.lower(backbone.architecture, params, ids, lengths).compile().as_text()
    for leaf in jax.tree.leaves(params["layers"]):
        if leaf.ndim > 2:  # a matrix for each layer
            assert f"f32[{','.join(map(str, leaf.shape))}]" not in program


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="other compilers slice bfloat16")
def test_bfloat16_of_all_layers_is_never_converted_at_once(tiny):
    """What the backward pass keeps, and the keys and values of generation."""
    backbone, B, T, N = tiny("qwen3"), 5, 11, 6
    L, model = backbone.architecture.num_layers, Backbone(backbone.architecture)
    params = jax.tree.map(lambda x: x.astype("bfloat16"), backbone.frozen)
    positions_BT = np.broadcast_to(np.arange(T), (B, T))

    def total(x_BTD, params):
        return model.apply({"params": params}, x_BTD, positions_BT, CAUSAL)[0].astype("float32").sum()

    x_BTD = np.ones((B, T, backbone.architecture.hidden_size), "bfloat16")
    backward = jax.jit(jax.grad(total)).lower(x_BTD, params)
    prompt, lengths_B = np.ones((B, T), np.int32), np.full(B, T, np.int32)
    decode = jax.jit(generate.continue_prompts, static_argnums=(0, 1, 2, 3)).lower(
        model, generate.Sampling(N), (0,), False, params, prompt, lengths_B, np.arange(B), np.uint32(0)
    )
    for lowered, width in ((backward, T), (decode, T + N)):
        loops = lowered.compile().as_text().split("ENTRY")[0]  # once, before or after the layers, it may be
        stacks = re.findall(rf"= \w+\[{L},{B},[\d,]*{width}[\d,]*\]\S* convert\(", loops)
        assert f"[{L},{B}," in loops and not stacks


# Who sees whom


def hidden_of(backbone, x_BTD, visibility, cache=None, start=0):
    """Returns the last hidden states (B, T, D) of embeddings whose positions count from `start`."""
    positions_BT = np.broadcast_to(start + np.arange(x_BTD.shape[1]), x_BTD.shape[:2])
    model, params = Backbone(backbone.architecture), {"params": backbone.frozen}
    return model.apply(params, x_BTD, positions_BT, visibility, cache)[0]


def input_gradient(backbone, visibility):
    """Returns f(x_BTD, probe_BTD): the gradient of sum(probe * last hidden states) with respect to x."""
    return jax.jit(jax.grad(lambda x, probe: (hidden_of(backbone, x, visibility) * probe).sum()))


def positions_read(gradient, x_BTD, position):
    """Which positions of the input the last hidden state at `position` depends on."""
    probe = np.zeros_like(x_BTD)
    probe[:, position] = np.random.default_rng(1).normal(size=x_BTD.shape[2])
    return (np.abs(gradient(x_BTD, probe)).max(axis=(0, 2)) > 0).tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_causality_by_gradient_and_gradient_equals_torch(family, tiny):
    """A token reads itself and what is before it; the layers' own backward rules agree with torch's."""
    import torch

    x, probe = np.random.default_rng(0).normal(size=(2, 2, 9, 32)).astype(np.float32)
    gradient = input_gradient(tiny(family), CAUSAL)
    assert positions_read(gradient, x, 4) == [True] * 5 + [False] * 4
    x_torch = torch.tensor(x, requires_grad=True)
    hidden = tiny_torch_model(family).model(inputs_embeds=x_torch).last_hidden_state
    (hidden * torch.tensor(probe)).sum().backward()
    expected = x_torch.grad.numpy()
    np.testing.assert_allclose(gradient(x, probe), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


def test_bidirectional_tokens_read_all_real_ones(tiny):
    x = np.random.default_rng(0).normal(size=(2, 9, 32)).astype(np.float32)
    gradient = input_gradient(tiny("qwen3"), AttentionMask(causal=False, lengths_B=np.array([7, 7])))
    assert positions_read(gradient, x, 4) == [True] * 7 + [False] * 2


def test_visible_cache_slots_alone_are_read(tiny):
    backbone = tiny("llama")
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(2, 3, 32)).astype(np.float32)
    cache = KVCache(*rng.normal(size=(2, 3, 2, 2, 6, 8)).astype(np.float32))
    visible_BS = np.array([[1, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0]], bool)
    visibility = AttentionMask(causal=True, cache_BS=visible_BS)
    probe = rng.normal(size=32)

    @jax.jit
    @jax.grad
    def gradient(cache):
        return (hidden_of(backbone, x_BTD, visibility, cache, 6) @ probe).sum()

    for array in jax.tree.leaves(gradient(cache)):  # L B G S H
        assert np.isfinite(array).all()
        read_LBS = np.abs(array).max(axis=(2, 4)) > 0
        assert (read_LBS == visible_BS).all()


@pytest.mark.parametrize("causal", [True, False])
def test_padding_changes_nothing(causal, tiny):
    backbone = tiny("qwen2")
    expected = outputs(backbone, causal=causal)
    assert_same_outputs(outputs(backbone, causal=causal, length=19), expected, 1e-5)
    lengths = np.array([len(row) for row in ROWS], np.int32)
    other = np.where(np.arange(12) < lengths[:, None], pad(ROWS, 12), 77)  # another padding id
    hidden, _ = run(backbone.architecture, backbone.frozen, other, lengths, causal)
    for b, row in enumerate(ROWS):
        np.testing.assert_allclose(hidden[b, : len(row)], expected[b][0], atol=1e-5)


# Every field of the architecture is wired


COMPUTES = {
    "norm_eps": ("llama3", 1e-2),
    "rope_theta": ("llama3", 100.0),
    "rope_scaling": ("llama3", None),
    "qkv_bias": ("qwen2", False),
    "qk_norm": ("qwen3", False),
    "tied_embeddings": ("llama", True),
}
SHAPES = {
    "vocab_size": ("llama", 272, "embed_tokens"),
    "hidden_size": ("llama", 40, "embed_tokens"),
    "intermediate_size": ("llama", 56, "mlp"),
    "num_layers": ("llama", 4, "layers.3"),
    "num_heads": ("llama", 6, "q_proj|o_proj"),
    "num_kv_heads": ("llama", 4, "k_proj|v_proj"),
    "head_dim": ("llama", 6, "self_attn"),
    "qkv_bias": ("llama", True, "proj.bias"),
    "qk_norm": ("llama", True, "k_norm"),
    "tied_embeddings": ("qwen2", False, "lm_head"),
}
SCALING = {
    "factor": 4.0,
    "low_freq_factor": 0.1,
    "high_freq_factor": 20.0,
    "original_max_position_embeddings": 1024,
}


def changes_output(backbone, architecture):
    expected = outputs(backbone)[0]
    found = outputs(backbone, architecture=architecture)[0]
    return any(np.abs(a - b).max() > 1e-3 for a, b in zip(found, expected, strict=True))


FIELDS = [field.name for field in dataclasses.fields(architecture_lib.Architecture) if field.compare]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_changes_the_output_or_the_shapes(field, tiny, tiny_folder):
    assert field in COMPUTES or field in SHAPES
    if field in COMPUTES:
        family, value = COMPUTES[field]
        assert changes_output(tiny(family), dataclasses.replace(tiny(family).architecture, **{field: value}))
    if field in SHAPES:
        family, value, weight = SHAPES[field]
        architecture = dataclasses.replace(tiny(family).architecture, **{field: value})
        source = hf.SafetensorsSource(tiny_folder(family))
        with pytest.raises(InputError, match=weight):
            weights.load(source, architecture, one_device_mesh(), "float32")


def test_a_rope_scaling_may_be_of_large_whole_numbers(tiny):
    backbone = tiny("llama3")
    scaling = architecture_lib.RopeScaling(2**31, 1, 4, 64)
    whole = dataclasses.replace(backbone.architecture, rope_scaling=scaling)
    scaling = architecture_lib.RopeScaling(float(2**31), 1.0, 4.0, 64)
    assert_same_outputs(
        outputs(backbone, architecture=whole),
        outputs(backbone, architecture=dataclasses.replace(whole, rope_scaling=scaling)),
        1e-6,
    )


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(architecture_lib.RopeScaling)])
def test_every_field_of_the_rope_scaling_changes_the_output(field, tiny):
    backbone = tiny("llama3")
    scaling = dataclasses.replace(backbone.architecture.rope_scaling, **{field: SCALING[field]})
    assert changes_output(backbone, dataclasses.replace(backbone.architecture, rope_scaling=scaling))


def test_number_of_parameters(tiny, smollm2):
    for backbone in (*map(tiny, FAMILIES), smollm2):
        counted = sum(leaf.size for leaf in jax.tree.leaves(backbone.frozen))
        assert backbone.architecture.num_parameters == counted


# Meshes of eight devices


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 8, 1), (8, 1, 1), (-1, 2, 1)])
def test_sharded_equals_one_device(sizes, tiny, tiny_folder):
    rows = [ids for ids in ROWS for _ in range(3)][:8]
    mesh = mesh_of(*sizes)
    backbone = load(tiny_folder("qwen3"), mesh)
    kernel = backbone.frozen["layers"]["gate"]["kernel"]  # L D F
    shard = (3, 32 // mesh.shape["fsdp"], 48 // mesh.shape["tensor"])
    assert {piece.data.shape for piece in kernel.addressable_shards} == {shard}
    assert_same_weights(backbone.frozen, tiny("qwen3").frozen)
    ids, lengths = sharding.put_batch((pad(rows, 12), np.array([len(row) for row in rows], np.int32)), mesh)
    hidden, _ = run(backbone.architecture, backbone.frozen, ids, lengths, True)
    for b, (expected, _) in enumerate(outputs(tiny("qwen3"), rows)):
        np.testing.assert_allclose(hidden[b, : len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize(
    "changes, sizes, message",
    [
        ({}, (1, 1, 8), "layers/key/kernel: its kv_heads dimension of 2 is not divisible by mesh.tensor=8"),
        ({"hidden_size": 36}, (1, 8, 1), "embedding: its embed dimension of 36 is not divisible by mesh.fsdp=8"),
        ({"vocab_size": 261}, (4, 1, 2), "embedding: its vocab dimension of 261 is not divisible by mesh.tensor=2"),
        ({"intermediate_size": 49}, (4, 1, 2), "mlp dimension of 49 is not divisible by mesh.tensor=2"),
    ],
)
def test_dimension_that_does_not_divide_is_named(changes, sizes, message, tiny):
    architecture = dataclasses.replace(tiny("llama").architecture, **changes)
    with pytest.raises(InputError, match=message):
        sharding.param_shardings(abstract_params(architecture), mesh_of(*sizes))


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, -1, 1), (0, 1, 1), (-1, 3, 1), (16, 1, 1)])
def test_mesh_that_does_not_fit_the_devices_is_refused(sizes):
    with pytest.raises(InputError, match=rf"mesh\.data={sizes[0]}"):
        mesh_of(*sizes)
