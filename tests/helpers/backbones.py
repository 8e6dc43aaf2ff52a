"""What a backbone computes, and how it is compared with torch."""

import functools

import jax
import numpy as np

from llm2vec_gen_jax import config
from llm2vec_gen_jax.data.buckets import pad
from llm2vec_gen_jax.model.attention import AttentionMask
from llm2vec_gen_jax.model.backbone import Backbone
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from tests.conftest import one_device_mesh, tiny_tokenizer, tiny_torch_model

ROWS = [np.random.default_rng(n).integers(4, 260, n).tolist() for n in (12, 1, 5)]


@functools.partial(jax.jit, static_argnums=(0, 4))
def run(architecture, params, ids_BT, lengths_B, causal=True):
    """Returns (last hidden states (B, T, D), logits (B, T, V)) of right-padded ids."""
    model = Backbone(architecture)
    x_BTD = model.apply({"params": params}, ids_BT, method="embed")
    positions_BT = np.broadcast_to(np.arange(ids_BT.shape[1]), ids_BT.shape)
    visibility = AttentionMask(causal=causal, lengths_B=lengths_B)
    hidden_BTD, _ = model.apply({"params": params}, x_BTD, positions_BT, visibility)
    return hidden_BTD, model.apply({"params": params}, hidden_BTD, method="logits")


def outputs(backbone, rows=ROWS, causal=True, length=None, architecture=None, params=None):
    """What `torch_outputs` returns, from a LoadedBackbone."""
    ids = pad(rows, length or max(len(row) for row in rows))
    lengths = np.array([len(row) for row in rows], np.int32)
    architecture, params = architecture or backbone.architecture, params or backbone.frozen
    hidden, logits = map(np.asarray, run(architecture, params, ids, lengths, causal))
    return [(hidden[b, : len(row)], logits[b, : len(row)]) for b, row in enumerate(rows)]


def assert_same_outputs(found, expected, tolerance):
    """Compares the outputs of every row; the tolerance is a share of the expected values' largest."""
    for found_arrays, expected_arrays in zip(found, expected, strict=True):
        for array, wanted in zip(found_arrays, expected_arrays, strict=True):
            np.testing.assert_allclose(array, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


def assert_same_weights(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def save_folder(folder, model, **options):
    """Writes a torch model and the tiny tokenizer as a Hugging Face folder."""
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load(path, mesh=None):
    return load_backbone(str(path), "float32", mesh or one_device_mesh())


def mesh_of(*sizes):
    return sharding.make_mesh(config.MeshConfig(*sizes))


def save_overflowing_backbone(folder):
    """Writes a tiny Llama of which only the token of "~" exceeds float16: dimension 1 is its own, and one MLP unit of
    the first layer makes 10^6 of it. In float32 nothing is large."""
    import torch

    model, tokenizer = tiny_torch_model("llama"), tiny_tokenizer()
    with torch.no_grad():
        embedding = model.model.embed_tokens.weight
        embedding[:, 1] = 0
        embedding[tokenizer("~")["input_ids"][0], 1] = 100
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[1] = layer.mlp.down_proj.weight[1] = 0
        first = model.model.layers[0]
        for projection in (first.mlp.gate_proj, first.mlp.up_proj):
            projection.weight[0] = 0
            projection.weight[0, 1] = 200
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
