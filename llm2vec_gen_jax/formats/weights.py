"""Backbone weights by their Hugging Face names: one table, read forwards to load and backwards to save.

A source of weights has `names()`, `shape(name)` and `read(name, slices)`; hf.py and gguf.py make them.
"""

import hashlib
import re

import einops
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.model import quantization
from llm2vec_gen_jax.model.backbone import abstract_params
from llm2vec_gen_jax.parallel import sharding

_ROWS = 4096  # of a table that are read at a time
# Our path -> (their name, their layout -> ours). "{}" is the layer.
TABLE = {
    "embedding": ("model.embed_tokens.weight", "v d -> v d"),
    "head": ("lm_head.weight", "v d -> v d"),
    "final_norm/scale": ("model.norm.weight", "d -> d"),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", "d -> d"),
    "layers/query/kernel": ("model.layers.{}.self_attn.q_proj.weight", "(n h) d -> d n h"),
    "layers/query/bias": ("model.layers.{}.self_attn.q_proj.bias", "(n h) -> n h"),
    "layers/key/kernel": ("model.layers.{}.self_attn.k_proj.weight", "(n h) d -> d n h"),
    "layers/key/bias": ("model.layers.{}.self_attn.k_proj.bias", "(n h) -> n h"),
    "layers/value/kernel": ("model.layers.{}.self_attn.v_proj.weight", "(n h) d -> d n h"),
    "layers/value/bias": ("model.layers.{}.self_attn.v_proj.bias", "(n h) -> n h"),
    "layers/query_norm/scale": ("model.layers.{}.self_attn.q_norm.weight", "h -> h"),
    "layers/key_norm/scale": ("model.layers.{}.self_attn.k_norm.weight", "h -> h"),
    "layers/output/kernel": ("model.layers.{}.self_attn.o_proj.weight", "d (n h) -> n h d"),
    "layers/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", "d -> d"),
    "layers/gate/kernel": ("model.layers.{}.mlp.gate_proj.weight", "f d -> d f"),
    "layers/up/kernel": ("model.layers.{}.mlp.up_proj.weight", "f d -> d f"),
    "layers/down/kernel": ("model.layers.{}.mlp.down_proj.weight", "d f -> f d"),
}


def load(source, architecture, mesh, dtype):
    """Reads a backbone straight to its shards; the host holds one stacked weight's shard at a time.

    Returns the frozen parameter tree in `dtype`; int8 is that of the projections (quantization.py), each of which is on
    the devices in bfloat16 for a moment. Raises InputError for a missing, unexpected, misshapen or
    non-finite tensor, naming it.
    """
    boxed = abstract_params(architecture)
    shardings = flax.traverse_util.flatten_dict(sharding.param_shardings(boxed, mesh), sep="/")
    shapes = {path: x.shape for path, x in flax.traverse_util.flatten_dict(nn.unbox(boxed), sep="/").items()}
    _check_names(source, architecture)
    params, quantized = {}, dtype == jnp.int8
    dtype = jnp.dtype("bfloat16") if quantized else dtype
    for path, shape in sorted(shapes.items(), key=lambda item: -np.prod(item[1])):  # while there is most room
        array = jax.make_array_from_callback(
            shape, shardings[path], lambda index, path=path, shape=shape: _read(source, path, shape, index, dtype)
        )
        if not jnp.isfinite(array).all():
            why = "its numbers exceed float16 (use bfloat16 or float32), or " if dtype == jnp.float16 else ""
            name = TABLE[path][0].format("*")
            raise InputError(f"{source}: {name} holds NaN or infinity: {why}the file is damaged")
        folder, _, name = path.rpartition("/")
        if quantized and name == "kernel":
            put = shardings[path]
            array, params[f"{folder}/scale"] = quantization.quantize_on_device(array, folder.split("/")[-1], put)
        params[path] = array
    return flax.traverse_util.unflatten_dict(params, sep="/")


def layout(architecture):
    """Returns {Hugging Face name: shape} of every weight, in the order of `tensors`."""
    boxed = nn.unbox(abstract_params(architecture))
    found = {}
    for path, x in flax.traverse_util.flatten_dict(boxed, sep="/").items():
        name, pattern = TABLE[path]
        stacked = path.startswith("layers/")
        shape = their_shape(pattern, x.shape[1:] if stacked else x.shape)
        for layer in range(architecture.num_layers if stacked else 1):
            found[name.format(layer)] = shape
    return found


def tensors(params, architecture):
    """Yields (Hugging Face name, numpy array in their layout) for every weight of a frozen tree, one at a time.

    On other processes than 0 of a multi-host run, which must iterate too, the array is None.
    """
    quantization.refuse(params, "writing the weights of a backbone")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path in flax.traverse_util.flatten_dict(nn.unbox(abstract_params(architecture)), sep="/"):
        name, pattern = TABLE[path]
        theirs, ours = pattern.split(" -> ")
        stacked = path.startswith("layers/")
        for layer in range(architecture.num_layers if stacked else 1):
            array = sharding.gather(flat[path][layer] if stacked else flat[path])
            yield name.format(layer), None if array is None else einops.rearrange(array, f"{ours} -> {theirs}")


def fingerprint_values(source, architecture):
    """Returns the first rows of every weight, rounded to bfloat16 so that the storage type is no matter.

    Of every one: tuned backbones often share their embeddings and norms.
    """
    _check_names(source, architecture)
    values = []
    for name in sorted(source.names()):
        ignored = name.endswith("inv_freq") or (name == "lm_head.weight" and architecture.tied_embeddings)
        # A GGUF file permutes queries and keys head by head.
        rows = architecture.head_dim if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
        if not ignored:
            shape = source.shape(name)
            part = (slice(None),) if len(shape) == 1 else (slice(0, rows), slice(None))
            values.append(np.asarray(source.read(name, part)).astype(jnp.bfloat16).ravel())
    return np.concatenate(values)


def head_digest(source):
    """Returns the SHA-256 of the whole lm_head.weight, rounded as in `fingerprint_values`: it may differ anywhere."""
    digest = hashlib.sha256()
    for rows in _pieces(source, "lm_head.weight"):
        digest.update(np.asarray(source.read("lm_head.weight", rows)).astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


def _pieces(source, table):
    count = source.shape(table)[0]
    return [(slice(start, min(start + _ROWS, count)), slice(None)) for start in range(0, count, _ROWS)]


def has_own_head(source):
    """Whether a source holds an lm_head.weight that is not the embeddings: that head runs, whatever a config says."""
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    if not {head, embeddings} <= set(source.names()):
        return False
    if tuple(source.shape(head)) != tuple(source.shape(embeddings)):
        return True
    for rows in _pieces(source, head):
        if not np.array_equal(*(np.asarray(source.read(name, rows), np.float32) for name in (head, embeddings))):
            return True
    return False


def _check_names(source, architecture):
    found = set(source.names())
    if architecture.num_layers > len(found):  # else a number of layers without end would fill the memory
        raise InputError(f"{source}: holds {len(found)} weights, the config says {architecture.num_layers} layers")
    expected = layout(architecture)
    ignored = {name for name in found if name.endswith("rotary_emb.inv_freq")}
    if architecture.tied_embeddings:
        ignored.add("lm_head.weight")  # some exporters write the tied head as well (has_own_head)
    missing, unexpected = sorted(expected.keys() - found), sorted(found - expected.keys() - ignored)
    if missing:
        raise InputError(f"{source}: {len(missing)} weights are missing, the first is {missing[0]}")
    if unexpected:
        raise InputError(f"{source}: {len(unexpected)} weights are not of this architecture: {unexpected[0]}, ...")
    for name, shape in expected.items():
        if tuple(source.shape(name)) != shape:
            raise InputError(f"{source}: {name} has shape {tuple(source.shape(name))}, the config says {shape}")


def axes(pattern):
    """Splits a pattern: "(n h) d -> d n h" gives ([["n", "h"], ["d"]], ["d", "n", "h"])."""
    theirs, ours = pattern.split(" -> ")
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", theirs)], ours.split()


def their_shape(pattern, shape):
    """Returns the shape in a Hugging Face file of one layer's weight of our shape."""
    theirs, ours = axes(pattern)
    size = dict(zip(ours, shape, strict=True))
    return tuple(int(np.prod([size[axis] for axis in group])) for group in theirs)


@np.errstate(over="ignore")  # `load` looks for infinity
def _read(source, path, shape, index, dtype):
    """Reads our slice `index` of one (stacked) weight."""
    name, pattern = TABLE[path]
    theirs, ours = axes(pattern)
    stacked = path.startswith("layers/")
    bounds = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    inner, inner_shape = (bounds[1:], shape[1:]) if stacked else (bounds, shape)
    bound, size = dict(zip(ours, inner, strict=True)), dict(zip(ours, inner_shape, strict=True))
    # Only the first axis of a group is ever split (heads, not the inside of a head), so a slice stays a slice.
    slices = []
    for group in theirs:
        step = int(np.prod([size[axis] for axis in group[1:]]))
        slices.append(slice(bound[group[0]].start * step, bound[group[0]].stop * step))
    lengths = {axis: len(bound[axis]) for axis in ours}
    if not stacked:
        return einops.rearrange(source.read(name, tuple(slices)), pattern, **lengths).astype(dtype)
    out = np.empty([len(part) for part in bounds], dtype)
    for row, layer in enumerate(bounds[0]):
        out[row] = einops.rearrange(source.read(name.format(layer), tuple(slices)), pattern, **lengths)
    return out
