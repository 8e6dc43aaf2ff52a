"""PEFT LoRA adapters: read, written, and merged into a backbone."""

import math
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import einops
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import atomic_directory, check_file, read_json, sha256_file, write_json
from llm2vec_gen_jax.common.limited import run_limited
from llm2vec_gen_jax.formats.weights import TABLE, axes
from llm2vec_gen_jax.model import lora
from llm2vec_gen_jax.model.architecture import Architecture

# Values for which the adapter adds B A to the weights and changes nothing else.
FILES = ("adapter_config.json", "adapter_model.safetensors")  # of an adapter
_PLAIN_LORA = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    # Others (PiSSA, OLoRA, CorDA, LoftQ) also change the base weights.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
# Fields that do not affect a saved adapter, and those that are read here. Any other field must be unset.
_IGNORED_OR_READ = set(
    "alpha_pattern auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode"
    " layers_pattern layers_to_transform loftq_config lora_alpha lora_dropout megatron_config megatron_core"
    " peft_version qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_rslora".split()
)
_KEY = re.compile(r"(?:base_model\.model\.)?((?:model\.)?layers\.([0-9]{1,9})\.(.+))\.lora_([AB])\.weight")
_MODULE_FILTERS = {"target_modules": str, "exclude_modules": str, "layers_to_transform": int, "layers_pattern": str}
# Regular expressions that peft builds from patterns.
_OVERRIDE, _IN_LAYERS = r"(.*\.)?({})$", r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_PLAIN_PATTERN = re.compile(r"[\w.^$-]*", re.ASCII)  # without alternatives and repetition: matched in linear time
_MATCH_SECONDS = 1  # CPU time to compile and match the patterns of a field; they take milliseconds
_MATCH = """
import re

def run(request):
    patterns, names = request
    for pattern in patterns:
        try:
            compiled = re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return str(error)
        for name in names:
            compiled.match(name), compiled.fullmatch(name)
"""
_FORMS = {  # fields with regular expressions, and what peft makes of them
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": _IN_LAYERS,
    "rank_pattern": _OVERRIDE,
    "alpha_pattern": _OVERRIDE,
}
_MODULES = {
    name.removeprefix("model.layers.{}.").removesuffix(".weight"): (path.split("/")[1], pattern)
    for path, (name, pattern) in TABLE.items()
    if path.startswith("layers/") and path.endswith("/kernel")
}


def identity(folder: str | os.PathLike[str]) -> list[str]:
    """Returns 16 hex digits for each of the two files of an adapter."""
    return [sha256_file(pathlib.Path(folder) / name)[:16] for name in FILES]


def merge(frozen: Any, folders: Iterable[str | os.PathLike[str]], architecture: Architecture) -> Any:
    """Returns `frozen` with adapters merged in turn: W + scale * B A for each adapted weight, computed in float32.

    The adapted weights are donated: do not use `frozen` afterwards. Raises InputError naming the field or key that is
    not plain LoRA on the seven projections.
    """
    for folder in map(pathlib.Path, folders):
        config = check(read_json(folder / "adapter_config.json"), folder / "adapter_config.json")
        tree = read(_load(folder / "adapter_model.safetensors"), config, architecture, folder)
        frozen = lora.merge(frozen, tree)
    return frozen


def save(
    folder: str | os.PathLike[str],
    tree: Any,
    rank: int,
    alpha: float,
    base: str,
    dtype: str = "float32",
    revision: str | None = None,
) -> None:
    """Writes a LoRA tree (unscaled) as a new PEFT folder for a transformers AutoModel.

    base: name of the backbone. dtype: of the stored tensors. revision: of the backbone, if it is on the hub.
    """
    with atomic_directory(folder) as temporary:
        config = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": base,
            "revision": revision,
            "r": rank,
            "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
            "lora_dropout": 0.0,
            "target_modules": modules_of(tree),
            "bias": "none",
            "inference_mode": True,
        }
        write_json(temporary / "adapter_config.json", config)
        tensors = {key: value.astype(jnp.dtype(dtype)) for key, value in tensors_of(tree).items()}
        (temporary / "adapter_model.safetensors").write_bytes(safetensors.numpy.save(tensors, {"format": "pt"}))


def check(config: dict[str, Any], file: str | os.PathLike[str], ignore: Collection[str] = ()) -> dict[str, Any]:
    """Returns `config`, the values of adapter_config.json. Raises InputError naming a field that is not plain LoRA.

    ignore: fields that may have any value.
    """
    for key, value in config.items():
        if key not in (*_IGNORED_OR_READ, *ignore) and (value not in _PLAIN_LORA[key] if key in _PLAIN_LORA else value):
            raise InputError(f"{file}: {key}={value!r} is not supported")
    for key in ("r", "lora_alpha"):
        if not _is_number(config.get(key)):
            raise InputError(f"{file}: {key} is missing or not a number")
    if config.get("use_rslora") not in (None, True, False):
        raise InputError(f"{file}: use_rslora must be true or false")
    for key in ("rank_pattern", "alpha_pattern"):
        value = config.get(key) or {}
        if not isinstance(value, dict) or not all(map(_is_number, value.values())):
            raise InputError(f"{file}: {key} must map regular expressions to numbers")
    for key, kind in _MODULE_FILTERS.items():
        if not _are_names(config.get(key), kind):
            raise InputError(f"{file}: {key}={config[key]!r} is not a valid name, pattern or list")
    return config


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _check_patterns(config, names, source):
    """Raises InputError for a field with an invalid regular expression, or one that takes too long to match `names`."""
    for key, form in _FORMS.items():
        value = config.get(key) or []
        if isinstance(value, list) and key != "layers_pattern":
            continue  # names
        given = [value] if isinstance(value, str) else list(value)
        patterns = [form.format(pattern) for pattern in given if not _PLAIN_PATTERN.fullmatch(pattern)]
        if patterns and (reason := " ".join(filter(None, run_limited(_MATCH, [patterns, names], _MATCH_SECONDS)))):
            raise InputError(f"{source}: adapter_config.json: {key}: a regular expression cannot be used ({reason})")


def _are_names(value, kind=str):
    return (
        value is None or isinstance(value, kind) or isinstance(value, list) and all(isinstance(x, kind) for x in value)
    )


def scale_of(config: Mapping[str, Any], rank: int, alpha: float) -> float:
    """Returns PEFT's factor of B A."""
    return alpha / (rank**0.5 if config.get("use_rslora") else rank)


def read(
    tensors: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    architecture: Architecture,
    source: str | os.PathLike[str],
    folded: bool = True,
) -> dict[str, dict[str, np.ndarray]]:
    """Returns the LoRA tree (see lora.py) of an adapter's tensors.

    folded: the scale of each module is folded into b; otherwise the tree is unscaled. source: for errors.
    Raises InputError naming the key of a tensor that does not match a projection of the backbone.
    """
    tree = {}
    sizes = lora.kernel_dims(architecture)
    modules = _by_module(tensors, architecture, source)
    _check_patterns(config, sorted({pair["name"] for pairs in modules.values() for pair in pairs.values()}), source)
    for module, factors in modules.items():
        name, pattern = _MODULES[module]
        inner, outer = sizes[name]
        shape = (int(np.prod(outer)), int(np.prod(inner)))
        a_LRI, b_LOR = _stack(factors, config, architecture.num_layers, shape, source, folded)
        (out_axes, in_axes), tree_axes = axes(pattern)
        dims = dict(zip(tree_axes, (*inner, *outer), strict=True))
        in_dims, out_dims = " ".join(in_axes), " ".join(out_axes)
        a = einops.rearrange(a_LRI, f"l r ({in_dims}) -> l {in_dims} r", **{d: dims[d] for d in in_dims.split()})
        b = einops.rearrange(b_LOR, f"l ({out_dims}) r -> l r {out_dims}", **{d: dims[d] for d in out_dims.split()})
        tree[name] = {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)}
    return tree


def modules_of(tree: Collection[str]) -> list[str]:
    """Returns PEFT's names of the modules in a LoRA tree."""
    return [module.rpartition(".")[2] for module, (name, _) in _MODULES.items() if name in tree]


def tensors_of(tree: Mapping[str, Any], prefix: str = "base_model.model.") -> dict[str, np.ndarray]:
    """Returns {key in PEFT's file: array} of a LoRA tree."""
    tensors = {}
    for module, (name, _) in _MODULES.items():
        if name in tree:
            a, b = (np.asarray(tree[name][letter], np.float32) for letter in "ab")
            for layer in range(len(a)):
                key = f"{prefix}layers.{layer}.{module}.lora_"
                tensors[f"{key}A.weight"] = np.ascontiguousarray(a[layer].reshape(-1, a.shape[-1]).T)
                tensors[f"{key}B.weight"] = np.ascontiguousarray(b[layer].reshape(b.shape[1], -1).T)
    return tensors


def _load(file):
    check_file(file)
    try:
        return safetensors.numpy.load_file(file)
    except (SafetensorError, AttributeError) as error:  # AttributeError: no such numpy dtype
        raise InputError(f"{file}: damaged or truncated, or of a dtype that NumPy lacks ({error})") from None


def _by_module(tensors, architecture, source):
    """Returns {module: {layer: {"name": full name in the adapted model, "A": (r, in), "B": (out, r)}}}."""
    modules = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None or match[3] not in _MODULES or int(match[2]) >= architecture.num_layers:
            raise InputError(f"{source}: {key} is not a LoRA weight of this backbone's projections")
        pair = modules.setdefault(match[3], {}).setdefault(int(match[2]), {"name": match[1]})
        if match[4] in pair or pair["name"] != match[1]:
            raise InputError(f"{source}: {key} exists with and without the prefix model.")
        pair[match[4]] = value.astype(np.float32)
    if not modules:
        raise InputError(f"{source}: no LoRA weights")
    return modules


def _stack(factors, config, layers, shape, folder, folded):
    """Returns (A, B) of a module, stacked over layers; zeros for layers without a pair. folded: the scale is in B."""
    out, size = shape
    for pair in factors.values():
        name, shapes = pair["name"], {letter: pair[letter].shape for letter in "AB" if letter in pair}
        if set(shapes) != {"A", "B"}:
            raise InputError(f"{folder}: {name} has only lora_{'/'.join(shapes)}")
        r = len(pair["A"])
        if not r or shapes != {"A": (r, size), "B": (out, r)}:
            raise InputError(f"{folder}: {name} has shapes {shapes}, which do not fit the backbone's weight {shape}")
        expected = _override(config.get("rank_pattern"), name, config["r"])
        if r != expected:
            raise InputError(f"{folder}: {name} has rank {r}, expected {expected} from adapter_config.json")
        if not is_target(config, name):
            raise InputError(
                f"{folder}: has weights of {name}, but adapter_config.json excludes it ({', '.join(_MODULE_FILTERS)}): "
                "peft would ignore them"
            )
    rank = max(len(pair["A"]) for pair in factors.values())
    a, b = np.zeros((layers, rank, size), np.float32), np.zeros((layers, out, rank), np.float32)
    for layer, pair in factors.items():
        r = len(pair["A"])
        alpha = _override(config.get("alpha_pattern"), pair["name"], config["lora_alpha"])
        a[layer, :r] = pair["A"]
        b[layer, :, :r] = pair["B"] * np.float32(scale_of(config, r, alpha) if folded else 1)
    return a, b


def _override(patterns, name, default):
    """Returns the value of the first pattern that matches a module's name or its end after a dot, as in PEFT."""
    for pattern, value in (patterns or {}).items():
        if re.match(_OVERRIDE.format(pattern), name):
            return value
    return default


def is_target(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT adapts a module, such as model.layers.0.self_attn.q_proj (in a base model without model.)."""
    targets = config.get("target_modules")
    if _is_named(config.get("exclude_modules"), name):
        return False
    if targets is None or isinstance(targets, str) and targets.lower() == "all-linear":
        return True
    if (
        isinstance(targets, list) and name not in targets
    ):  # layers_to_transform applies neither to patterns nor to full names
        return _is_named(targets, name) and _is_in_layers(config, name)
    return _is_named(targets, name)


def _is_named(names, module):
    if isinstance(names, str):
        return bool(names) and re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names or ())


def _is_in_layers(config, name):
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if layers is None or layers == []:
        return True
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns
    # Without a pattern peft requires a component before the layers: model.layers.0, not layers.0.
    regexes = [_IN_LAYERS.format(pattern) for pattern in patterns] if patterns else [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    matches = filter(None, (re.match(pattern, name) for pattern in regexes))
    match = next(matches, None)
    return match is not None and int(match["idx"]) in ([layers] if isinstance(layers, int) else layers)
