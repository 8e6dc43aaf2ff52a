"""The method: two ways to encode are one, rows are independent, heads are a chain, frozen stays frozen."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.data.buckets import pad
from llm2vec_gen_jax.model import compressor
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.backbone import abstract_params
from llm2vec_gen_jax.model.execution import REMAT, Execution
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.training import losses
from llm2vec_gen_jax.training.optimizer import make_optimizer
from llm2vec_gen_jax.training.step import new_state, train_step
from tests.conftest import tiny_torch_model, torch_outputs

ROWS = [np.random.default_rng(n).integers(4, 260, n).tolist() for n in (7, 0, 1, 4)]
K, E = 4, 20


@functools.partial(jax.jit, static_argnums=0)
def encode(model, trainable, frozen, ids_BT, lengths_B):
    return model.encode(trainable, frozen, ids_BT, lengths_B)


def method(backbone, num_thought_tokens=0, num_tokens=K):
    """Returns (Model, trainable tree) on a backbone; the tokens are spread widely so that each matters."""
    model = LLM2VecGenModel(backbone.architecture, num_tokens, num_thought_tokens, E)
    trainable = compressor.init_trainable(model.compressor, jax.random.key(0), backbone.frozen["embedding"])
    noise = jax.random.normal(jax.random.key(1), trainable["tokens"].shape)
    return model, {**trainable, "tokens": trainable["tokens"] + 0.3 * noise}


def batch_of(rows, length):
    return pad(rows, length), np.array([len(row) for row in rows], np.int32)


def encode_rows(backbone, model, trainable, rows=ROWS, length=8):
    embedding_BE, soft_prompts_BKD = encode(model, trainable, backbone.frozen, *batch_of(rows, length))
    return np.asarray(embedding_BE), np.asarray(soft_prompts_BKD)


def assert_close(found, expected, tolerance):
    """The tolerance is a share of the expected values' largest."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# One pass and two passes


@pytest.mark.parametrize("family", ["llama3", "qwen3"])
def test_encode_equals_prefix_and_compress(family, tiny):
    """Values, and gradients of both outputs, with an empty row, thought tokens and more slots than tokens."""
    backbone = tiny(family)
    model, trainable = method(backbone, num_thought_tokens=3)
    ids_BT, lengths_B = batch_of(ROWS, 8)
    rng = np.random.default_rng(0)
    probe_BE, probe_BKD = rng.normal(size=(len(ROWS), E)), rng.normal(size=(len(ROWS), K, 32))

    def one_pass(trainable):
        return model.encode(trainable, backbone.frozen, ids_BT, lengths_B)

    def two_passes(trainable):
        cache = model.prefill(backbone.frozen, ids_BT, lengths_B, slots=11)
        return model.compress(trainable, backbone.frozen, cache, lengths_B)

    def evaluate(function):
        def loss(trainable):
            embedding_BE, soft_prompts_BKD = outputs = function(trainable)
            return (embedding_BE * probe_BE).sum() + (soft_prompts_BKD * probe_BKD).sum(), outputs

        gradients, outputs = jax.jit(jax.grad(loss, has_aux=True))(trainable)
        return outputs, gradients

    (expected, expected_gradients), (found, gradients) = evaluate(one_pass), evaluate(two_passes)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, expected)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-4), gradients, expected_gradients)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(gradients))


def test_encode_equals_torch(tiny):
    """Each row alone in torch: query embeddings, then the appended tokens; the heads in numpy."""
    import torch

    backbone = tiny("llama3")
    model, trainable = method(backbone, num_thought_tokens=2)
    torch_model = tiny_torch_model("llama3").model
    kernels = jax.tree.map(np.asarray, trainable)
    embedding_BE, soft_prompts_BKD = encode_rows(backbone, model, trainable)
    for b, row in enumerate(ROWS):
        with torch.no_grad():
            query = torch_model.embed_tokens(torch.tensor(row, dtype=torch.long))
            inputs = torch.cat([query, torch.tensor(kernels["tokens"])])[None]
            h_KD = torch_model(inputs_embeds=inputs).last_hidden_state[0, -K:].numpy()
        r_KD = h_KD @ kernels["reconstruction"]["kernel"] + kernels["reconstruction"]["bias"]
        assert_close(soft_prompts_BKD[b], r_KD, 1e-4)
        e_KE = r_KD @ kernels["alignment"]["kernel"] + kernels["alignment"]["bias"]
        assert_close(embedding_BE[b], e_KE.mean(axis=0), 1e-4)


# Rows are independent


def test_encode_depends_on_neither_padding_nor_other_rows(tiny):
    backbone = tiny("qwen3")
    model, trainable = method(backbone)
    expected = encode_rows(backbone, model, trainable)
    for length in (7, 24):
        found = encode_rows(backbone, model, trainable, ROWS, length)
        jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, expected)
    for b, row in enumerate(ROWS):
        other_rows = [[100 + b] * 8, row, [5, 6]]
        embedding_BE, soft_prompts_BKD = encode_rows(backbone, model, trainable, other_rows)
        assert_close(embedding_BE[1], expected[0][b], 1e-5)
        assert_close(soft_prompts_BKD[1], expected[1][b], 1e-5)
    ids_BT, lengths_B = batch_of(ROWS, 8)
    ids_BT = np.where(np.arange(8) < lengths_B[:, None], ids_BT, 99)  # another padding id
    found = encode(model, trainable, backbone.frozen, ids_BT, lengths_B)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), found, expected)


def test_every_query_token_matters(tiny):
    backbone = tiny("llama")
    model, trainable = method(backbone)
    row = ROWS[0]
    changed = [row[:n] + [row[n] % 200 + 5] + row[n + 1 :] for n in range(len(row))]
    embedding_BE, _ = encode_rows(backbone, model, trainable, [row, *changed])
    assert np.abs(embedding_BE[1:] - embedding_BE[0]).max(axis=1).min() > 1e-3


# Thought tokens, compression tokens, heads


def test_thought_tokens_are_attended_and_not_read(tiny):
    """M thought and K compression tokens are M+K compression tokens of which the last K are read."""
    backbone = tiny("qwen2")
    M = 3
    model, trainable = method(backbone, num_thought_tokens=M)
    embedding_BE, soft_prompts_BKD = encode_rows(backbone, model, trainable)
    assert soft_prompts_BKD.shape == (len(ROWS), K, 32)
    assert embedding_BE.shape == (len(ROWS), E)
    all_read = LLM2VecGenModel(backbone.architecture, M + K, 0, E)
    _, all_BKD = encode_rows(backbone, all_read, trainable)
    assert_close(soft_prompts_BKD, all_BKD[:, M:], 1e-5)
    without = {**trainable, "tokens": trainable["tokens"][M:]}
    _, without_BKD = encode_rows(backbone, LLM2VecGenModel(backbone.architecture, K, 0, E), without)
    assert np.abs(without_BKD - soft_prompts_BKD).max() > 1e-2  # the compression tokens attend to them


def test_appended_tokens_are_causal_in_their_order(tiny):
    """Token j changes soft prompts j and later ones only; thought tokens come first and change all."""
    backbone = tiny("llama")
    M = 2
    model, trainable = method(backbone, num_thought_tokens=M)
    ids_BT, lengths_B = batch_of(ROWS, 8)

    def soft_prompts(tokens):
        changed = {**trainable, "tokens": tokens}
        return model.encode(changed, backbone.frozen, ids_BT, lengths_B)[1].sum(axis=(0, 2))

    jacobian = jax.jit(jax.jacrev(soft_prompts))(trainable["tokens"])  # K, M+K, D
    reads_KM = np.abs(jacobian).max(axis=-1) > 0
    assert (reads_KM == np.tri(K, M + K, M, dtype=bool)).all()


def test_alignment_head_reads_what_the_reconstruction_head_wrote(tiny):
    backbone = tiny("llama")
    model, trainable = method(backbone)
    embedding_BE, soft_prompts_BKD = encode_rows(backbone, model, trainable)
    alignment = jax.tree.map(np.asarray, trainable["alignment"])
    mean_BD = soft_prompts_BKD.mean(axis=1)
    assert_close(embedding_BE, mean_BD @ alignment["kernel"] + alignment["bias"], 1e-5)
    h_BKD = np.random.default_rng(0).normal(size=(2, K, 32)).astype(np.float32)
    silent = {**trainable, "reconstruction": jax.tree.map(jnp.zeros_like, trainable["reconstruction"])}
    embedding_BE, soft_prompts_BKD = model.heads(silent, h_BKD)
    assert not soft_prompts_BKD.any()
    assert_close(embedding_BE, np.broadcast_to(alignment["bias"], (2, E)), 1e-6)


def test_heads_and_tokens_are_float32_with_a_bfloat16_backbone(tiny):
    backbone = tiny("qwen3")
    model, trainable = method(backbone)
    frozen = jax.tree.map(lambda x: x.astype(jnp.bfloat16), backbone.frozen)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    found = encode(model, trainable, frozen, *batch_of(ROWS, 8))
    for array, expected in zip(found, encode_rows(backbone, model, trainable), strict=True):
        assert array.dtype == jnp.float32
        assert_close(array, expected, 0.1)


# The teacher's pooling


@pytest.mark.parametrize("causal", [True, False])
def test_mean_pool_equals_torch(causal, tiny):
    backbone = tiny("qwen3")
    model, _ = method(backbone)
    pool = jax.jit(model.mean_pool, static_argnums=3)
    pooled_BD = np.asarray(pool(backbone.frozen, *batch_of(ROWS, 9), causal))
    torch_model = tiny_torch_model("qwen3")
    for row, pooled_D in zip(ROWS, pooled_BD, strict=True):
        if row:
            ((hidden_TD, _),) = torch_outputs(torch_model, [row], causal)
            assert_close(pooled_D, hidden_TD.mean(axis=0), 1e-4)
        else:
            assert not pooled_D.any()


# Frozen weights are not differentiated and not copied

# Sizes such that no activation has as many elements as a weight.
SMALL = Architecture(
    vocab_size=101,
    hidden_size=24,
    intermediate_size=56,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
    norm_eps=1e-5,
    rope_theta=1e4,
    rope_scaling=None,
    qkv_bias=False,
    qk_norm=False,
    tied_embeddings=False,
)
LARGE = dataclasses.replace(
    SMALL, vocab_size=4096, hidden_size=256, intermediate_size=1024, num_layers=12, head_dim=64, qkv_bias=True
)


def abstract_training(architecture, B, S, num_tokens):
    """Returns (model, state, frozen, batch, optimizer) as shapes: nothing is computed."""
    model = LLM2VecGenModel(architecture, num_tokens, 0, 17)
    frozen = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), abstract_params(architecture))
    frozen = jax.tree.map(lambda box: box.value, frozen, is_leaf=lambda x: hasattr(x, "names"))
    optimizer = make_optimizer(config.OptimizerConfig())

    def start():
        table = jnp.zeros((architecture.vocab_size, architecture.hidden_size))
        trainable = compressor.init_trainable(model.compressor, jax.random.key(0), table)
        return new_state(trainable, optimizer)

    ids = jax.ShapeDtypeStruct((B, 11), jnp.int32)
    lengths = jax.ShapeDtypeStruct((B,), jnp.int32)
    cache = jax.eval_shape(functools.partial(model.prefill, slots=13), frozen, ids, lengths)
    batch = {
        "query_lengths": lengths,
        "answer": jax.ShapeDtypeStruct((B, S), jnp.int32),
        "answer_lengths": lengths,
        "target": jax.ShapeDtypeStruct((B, 17), jnp.float32),
    }
    return model, jax.eval_shape(start), frozen, batch | {"query": cache}, optimizer


def compiled(function, *shapes):
    """The optimised program; only its machine code, which does not run, is not optimised."""
    return jax.jit(function).lower(*shapes).compile({"xla_backend_optimization_level": 0})


def product_sizes(program):
    """The numbers of elements that the matrix products of a compiled program put out."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\].* (?:dot|custom-call)\(", program.as_text())
    return {math.prod(int(size) for size in shape.split(",") if size) for shape in shapes}


def test_no_gradient_of_a_frozen_weight_is_computed():
    """No product in the gradient is of a weight's size; with the weights differentiated too, some are."""
    model, state, frozen, batch, _ = abstract_training(SMALL, B=3, S=7, num_tokens=5)
    weights = config.LossConfig()

    def loss(trainable, frozen, batch):
        return losses.loss_fn(trainable, model, frozen, batch, weights)[0]

    def sizes(argnums):
        return product_sizes(compiled(jax.grad(loss, argnums), state.trainable, frozen, batch))

    kernels = {leaf.size // SMALL.num_layers for leaf in jax.tree.leaves(frozen["layers"]) if leaf.ndim > 2}
    assert kernels == {24 * 40, 24 * 20, 24 * 56}
    assert not sizes(0) & kernels
    assert sizes((0, 1)) >= kernels


@pytest.mark.parametrize("remat", REMAT)
def test_training_step_does_not_copy_the_frozen_weights(remat):
    """Beside its arguments a step takes a layer's memory or so; with the weights' gradients, that of all."""
    model, state, frozen, batch, optimizer = abstract_training(LARGE, B=1, S=2, num_tokens=2)
    model = dataclasses.replace(model, execution=Execution(remat=remat))
    weights = config.LossConfig()
    frozen_bytes = sum(leaf.size * 4 for leaf in jax.tree.leaves(frozen))
    step = functools.partial(train_step, model=model, optimizer=optimizer, loss_config=weights)
    memory = compiled(step, state, frozen, batch).memory_analysis()
    assert memory.temp_size_in_bytes < frozen_bytes / 8
    assert memory.output_size_in_bytes < frozen_bytes / 8

    def loss(frozen, trainable, batch):
        return losses.loss_fn(trainable, model, frozen, batch, weights)[0]

    memory = compiled(jax.grad(loss), frozen, state.trainable, batch).memory_analysis()
    assert memory.output_size_in_bytes > frozen_bytes
    assert memory.temp_size_in_bytes > frozen_bytes
