"""Mapping between Hugging Face weights and the parameter tree, for loading and saving."""

import functools
import hashlib
import re
from collections.abc import Iterator
from typing import Any, Protocol

import einops
import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.model import quantization
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.backbone import abstract_params
from llm2vec_gen_jax.parallel import sharding

_CHUNK_ROWS = 4096
# Path in the parameter tree -> (Hugging Face name, "Hugging Face layout -> layout in the tree"). "{}" is the layer.
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


class WeightSource(Protocol):
    """A checkpoint from which tensors are read by their Hugging Face names. str(source) is its path, for errors."""

    def names(self) -> list[str]:
        """Returns the names of all tensors."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape of a tensor without reading it."""

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Returns a slice of a tensor."""


def load(source: WeightSource, architecture: Architecture, mesh: Mesh, dtype: jnp.dtype) -> Any:
    """Reads a backbone onto a mesh; the host holds one shard of one stacked weight at a time.

    Returns the frozen parameter tree in `dtype`. int8: the projections are loaded as bfloat16 and quantized on the
    devices one at a time (see quantization.py). Raises InputError naming a missing, unexpected or non-finite tensor, or
    one with a wrong shape.
    """
    boxed = abstract_params(architecture)
    shardings = flax.traverse_util.flatten_dict(sharding.param_shardings(boxed, mesh), sep="/")
    shapes = {path: x.shape for path, x in flax.traverse_util.flatten_dict(nn.unbox(boxed), sep="/").items()}
    _check_names(source, architecture)
    params, quantized = {}, dtype == jnp.int8
    dtype = jnp.dtype("bfloat16") if quantized else dtype
    for path, shape in sorted(shapes.items(), key=lambda item: -np.prod(item[1])):  # largest first
        read = functools.partial(_read, source, path, shape, dtype)
        # One at a time: transfers that are not finished hold their host memory.
        array: jax.Array = jax.block_until_ready(jax.make_array_from_callback(shape, shardings[path], read))
        folder, _, name = path.rpartition("/")
        if quantized and name == "kernel":
            projection = folder.split("/")[-1]
            array, params[f"{folder}/scale"] = quantization.quantize_on_device(array, projection, shardings[path])
        params[path] = array
    for path, is_finite in _are_finite(params).items():
        if not is_finite:
            why = "its values exceed float16 (use bfloat16 or float32), or " if dtype == jnp.float16 else ""
            name = TABLE[path if path in TABLE else path.replace("/scale", "/kernel")][0].format("*")
            raise InputError(f"{source}: {name} contains NaN or infinity: {why}the file is damaged")
    return flax.traverse_util.unflatten_dict(params, sep="/")


@jax.jit  # a single program: compiling one for each array takes longer than loading a small backbone
def _are_finite(params):
    """Returns {path: whether all values are finite}; the scale of a quantized kernel stands for the kernel."""
    return {path: jnp.isfinite(x).all() for path, x in params.items() if jnp.issubdtype(x.dtype, jnp.floating)}


def layout(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Returns {Hugging Face name: shape} of every weight, in the order of `tensors`."""
    params = nn.unbox(abstract_params(architecture))
    shapes = {}
    for path, x in flax.traverse_util.flatten_dict(params, sep="/").items():
        name, pattern = TABLE[path]
        stacked = path.startswith("layers/")
        shape = _hf_shape(pattern, x.shape[1:] if stacked else x.shape)
        for layer in range(architecture.num_layers if stacked else 1):
            shapes[name.format(layer)] = shape
    return shapes


def tensors(params: Any, architecture: Architecture) -> Iterator[tuple[str, np.ndarray | None]]:
    """Yields (Hugging Face name, array in the Hugging Face layout) for every weight of a frozen tree, one at a time.

    Every process of a multi-host run must iterate; the array is None except on process 0.
    """
    quantization.require_unquantized(params, "writing the weights of a backbone")
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for path in flax.traverse_util.flatten_dict(nn.unbox(abstract_params(architecture)), sep="/"):
        name, pattern = TABLE[path]
        hf_layout, tree_layout = pattern.split(" -> ")
        stacked = path.startswith("layers/")
        for layer in range(architecture.num_layers if stacked else 1):
            array = sharding.gather(flat[path][layer] if stacked else flat[path])
            if array is not None:
                array = einops.rearrange(array, f"{tree_layout} -> {hf_layout}")
            yield name.format(layer), array


def fingerprint_values(source: WeightSource, architecture: Architecture) -> np.ndarray:
    """Returns the first rows of every weight, flat, rounded to bfloat16 so that the stored dtype does not matter.

    All weights are included because fine-tuned backbones often share embeddings and norms.
    """
    _check_names(source, architecture)
    values = []
    for name in sorted(source.names()):
        ignored = name.endswith("inv_freq") or (name == "lm_head.weight" and architecture.tied_embeddings)
        # GGUF files permute rows of queries and keys within each head.
        rows = architecture.head_dim if name.endswith(("q_proj.weight", "k_proj.weight")) else 1
        if not ignored:
            shape = source.shape(name)
            part = (slice(None),) if len(shape) == 1 else (slice(0, rows), slice(None))
            values.append(np.asarray(source.read(name, part)).astype(jnp.bfloat16).ravel())
    return np.concatenate(values)


def head_digest(source: WeightSource) -> str:
    """Returns the SHA-256 of the complete lm_head.weight, rounded to bfloat16."""
    digest = hashlib.sha256()
    for rows in _row_chunks(source, "lm_head.weight"):
        digest.update(np.asarray(source.read("lm_head.weight", rows)).astype(jnp.bfloat16).tobytes())
    return digest.hexdigest()


def _row_chunks(source, name):
    count = source.shape(name)[0]
    return [(slice(start, min(start + _CHUNK_ROWS, count)), slice(None)) for start in range(0, count, _CHUNK_ROWS)]


def has_untied_head(source: WeightSource) -> bool:
    """Whether a source has an lm_head.weight that differs from the embeddings."""
    head, embeddings = "lm_head.weight", "model.embed_tokens.weight"
    if not {head, embeddings} <= set(source.names()):
        return False
    if tuple(source.shape(head)) != tuple(source.shape(embeddings)):
        return True
    for rows in _row_chunks(source, head):
        head_rows, embedding_rows = (np.asarray(source.read(name, rows), np.float32) for name in (head, embeddings))
        if not np.array_equal(head_rows, embedding_rows):
            return True
    return False


def _check_names(source, architecture):
    names = set(source.names())
    if architecture.num_layers > len(names):  # a damaged number of layers would fill the memory
        raise InputError(f"{source}: has {len(names)} weights, the config {architecture.num_layers} layers")
    expected = layout(architecture)
    ignored = {name for name in names if name.endswith("rotary_emb.inv_freq")}
    if architecture.tied_embeddings:
        ignored.add("lm_head.weight")  # some exporters write the tied head too
    missing, unexpected = sorted(expected.keys() - names), sorted(names - expected.keys() - ignored)
    if missing:
        raise InputError(f"{source}: {len(missing)} weights are missing, the first is {missing[0]}")
    if unexpected:
        raise InputError(f"{source}: {len(unexpected)} weights are not part of this architecture: {unexpected[0]}, ...")
    for name, shape in expected.items():
        if tuple(source.shape(name)) != shape:
            raise InputError(f"{source}: {name} has shape {tuple(source.shape(name))}, the config expects {shape}")


def axes(pattern: str) -> tuple[list[list[str]], list[str]]:
    """Splits a pattern: "(n h) d -> d n h" gives ([["n", "h"], ["d"]], ["d", "n", "h"])."""
    hf_layout, tree_layout = pattern.split(" -> ")
    return [group.strip("()").split() for group in re.findall(r"\([^)]*\)|\w+", hf_layout)], tree_layout.split()


def _hf_shape(pattern, shape):
    """Returns the Hugging Face shape of one layer's weight of `shape` in the tree."""
    hf_axes, tree_axes = axes(pattern)
    size = dict(zip(tree_axes, shape, strict=True))
    return tuple(int(np.prod([size[axis] for axis in group])) for group in hf_axes)


@np.errstate(over="ignore")  # `load` checks for infinity
def _read(source, path, shape, dtype, index):
    """Reads the slice `index` of one (stacked) weight of `shape` in the tree."""
    name, pattern = TABLE[path]
    hf_axes, tree_axes = axes(pattern)
    stacked = path.startswith("layers/")
    bounds = [range(*part.indices(size)) for part, size in zip(index, shape, strict=True)]
    inner, inner_shape = (bounds[1:], shape[1:]) if stacked else (bounds, shape)
    bound, size = dict(zip(tree_axes, inner, strict=True)), dict(zip(tree_axes, inner_shape, strict=True))
    # Only the first axis of a group is sharded (heads, not the dimensions of a head), so a slice stays contiguous.
    slices = []
    for group in hf_axes:
        step = int(np.prod([size[axis] for axis in group[1:]]))
        slices.append(slice(bound[group[0]].start * step, bound[group[0]].stop * step))
    lengths = {axis: len(bound[axis]) for axis in tree_axes}
    if not stacked:
        return einops.rearrange(source.read(name, tuple(slices)), pattern, **lengths).astype(dtype)
    out = np.empty([len(part) for part in bounds], dtype)
    for row, layer in enumerate(bounds[0]):
        out[row] = einops.rearrange(source.read(name.format(layer), tuple(slices)), pattern, **lengths)
    return out
