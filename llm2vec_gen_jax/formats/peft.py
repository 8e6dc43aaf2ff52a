"""PEFT LoRA adapters: read, and merged into a backbone's weights in float32 on its devices."""

import functools
import pathlib
import re

import einops
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.files import read_json, sha256_file
from llm2vec_gen_jax.formats.weights import TABLE, their_shape

# Settings that change what an adapter computes, and the values that mean "as plain LoRA does".
_PLAIN = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none",),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "lora_bias": (False, None),
    "alora_invocation_tokens": (None,),
}
_KEY = re.compile(r"(?:base_model\.model\.)?(?:model\.)?layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
_MODULES = {
    name.removeprefix("model.layers.{}.").removesuffix(".weight"): (path, pattern)
    for path, (name, pattern) in TABLE.items()
    if path.startswith("layers/") and path.endswith("/kernel")
}


def identity(folder):
    """Returns hex digits that identify an adapter folder's content."""
    folder = pathlib.Path(folder)
    return [sha256_file(folder / name)[:16] for name in ("adapter_config.json", "adapter_model.safetensors")]


def merge(frozen, folder, architecture):
    """Returns `frozen` with the adapter added: W + scale * B A for each adapted weight, computed in float32.

    The input arrays are donated: do not use them afterwards. Raises InputError naming the field or the key for
    anything but plain LoRA on the seven projections.
    """
    folder = pathlib.Path(folder)
    config = read_json(folder / "adapter_config.json")
    for key, plain in _PLAIN.items():
        if config.get(key, plain[0]) not in plain:
            raise InputError(f"{folder / 'adapter_config.json'}: {key}={config[key]!r} is not supported")
    for key in ("r", "lora_alpha"):
        if not isinstance(config.get(key), (int, float)):
            raise InputError(f"{folder / 'adapter_config.json'}: {key} is missing or not a number")
    flat = flax.traverse_util.flatten_dict(frozen, sep="/")
    stacks = {}
    for module, factors in _read_factors(folder, architecture).items():
        path, pattern = _MODULES[module]
        layers, *shape = flat[path].shape
        stacks[path] = _stack(factors, config, module, layers, their_shape(pattern, shape), folder), pattern
    for path, ((a_LRI, b_LOR), pattern) in stacks.items():
        flat[path] = _add(flat[path], a_LRI, b_LOR, pattern)
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def _read_factors(folder, architecture):
    """Returns {module: {layer: {"A": (r, in), "B": (out, r)}}}."""
    file = folder / "adapter_model.safetensors"
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file") from None
    except SafetensorError as error:
        raise InputError(f"{file}: damaged or truncated ({error})") from None
    modules = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match[2] not in _MODULES or int(match[1]) >= architecture.num_layers:
            raise InputError(f"{file}: {key} is not a LoRA weight of this backbone's projections")
        modules.setdefault(match[2], {}).setdefault(int(match[1]), {})[match[3]] = value.astype(np.float32)
    if not modules:
        raise InputError(f"{file}: no LoRA weights")
    return modules


def _stack(factors, config, module, layers, shape, folder):
    """Returns a module's (A, B), stacked over layers, the scale in B; layers without a pair get zeros."""
    out, size = shape
    for layer, pair in factors.items():
        name, shapes = f"layers.{layer}.{module}", {letter: value.shape for letter, value in pair.items()}
        if set(pair) != {"A", "B"}:
            raise InputError(f"{folder}: {name} has lora_{'/'.join(pair)} only")
        r = len(pair["A"])
        if shapes != {"A": (r, size), "B": (out, r)}:
            raise InputError(f"{folder}: {name} has shapes {shapes}, the backbone's weight is {shape}")
        expected = _pattern(config.get("rank_pattern"), name, config["r"])
        if r != expected:
            raise InputError(f"{folder}: {name} has rank {r}, adapter_config.json says {expected}")
    rank = max(len(pair["A"]) for pair in factors.values())
    a, b = np.zeros((layers, rank, size), np.float32), np.zeros((layers, out, rank), np.float32)
    for layer, pair in factors.items():
        r = len(pair["A"])
        alpha = _pattern(config.get("alpha_pattern"), f"layers.{layer}.{module}", config["lora_alpha"])
        a[layer, :r] = pair["A"]
        b[layer, :, :r] = pair["B"] * (alpha / (r**0.5 if config.get("use_rslora") else r))
    return a, b


def _pattern(patterns, name, default):
    """PEFT's per-module override: the first pattern that matches the end of the module's name."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _add(kernel, a_LRI, b_LOR, pattern):
    theirs, ours = pattern.split(" -> ")
    delta = jnp.einsum("lor,lri->loi", b_LOR, a_LRI, precision=jax.lax.Precision.HIGHEST)
    sizes = dict(zip(["l", *ours.split()], kernel.shape, strict=True))
    delta = einops.rearrange(delta, f"l {theirs} -> l {ours}", **sizes)
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)
