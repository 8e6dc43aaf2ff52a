"""Architecture of a backbone, read from config.json or GGUF metadata."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from llm2vec_gen_jax.common.errors import InputError


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the low rotary frequencies (rope_type "llama3")."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with RMS norms, rotary positions, grouped-query attention and a SwiGLU MLP.

    Dimensions: V vocab_size, D hidden_size, F intermediate_size, N num_heads, G num_kv_heads, H head_dim.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qkv_bias: bool  # Qwen2.5
    qk_norm: bool  # Qwen3
    tied_embeddings: bool
    # The last field: not used by the computation, nor part of identities. Written to exported configs, because vLLM
    # limits lengths to it.
    max_position_embeddings: int | None = dataclasses.field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Returns the fields that determine the computation."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != _POSITIONS}

    @property
    def num_parameters(self) -> int:
        """Number of parameters; tied embeddings are counted once."""
        attention = (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.hidden_size
        bias = (self.num_heads + 2 * self.num_kv_heads) * self.head_dim * self.qkv_bias
        norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
        layer = attention + bias + norms + 3 * self.hidden_size * self.intermediate_size
        tables = (1 if self.tied_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * layer + tables + self.hidden_size


# Fields that the config does not state.
_FAMILIES = {
    "llama": {"qkv_bias": False, "qk_norm": False},
    "qwen2": {"qkv_bias": True, "qk_norm": False},
    "qwen3": {"qkv_bias": False, "qk_norm": True},
}
# Values of keys that are missing in config.json, as in transformers' config classes. A null key is not missing.
_DEFAULTS: dict[str, Any] = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": False}
_FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
}
_POSITIONS = "max_position_embeddings"
_MAX_VALUE = 1e30  # fits in float32
# Keys that change the computation, and their supported values.
_SUPPORTED: dict[str, tuple] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "partial_rotary_factor": (1.0, None),
    "quantization_config": (None,),
    "is_encoder_decoder": (False, None),
    "is_causal": (True,),
    "tie_word_embeddings": (False, True),
}


def from_hf_config(config: Mapping[str, Any], source: object) -> Architecture:
    """Returns the Architecture of a Hugging Face config.json of transformers 4 or 5.

    source: for errors. Raises InputError naming the field of an unsupported family or setting.
    """
    family = config.get("model_type")
    if str(family) not in _FAMILIES:
        raise InputError(f"{source}: model_type {family!r} is not supported; supported: {', '.join(_FAMILIES)}")
    config = {**_DEFAULTS, **_FAMILY_DEFAULTS[str(family)], **config}
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
        raise InputError(f"{source}: layer_types with other than full_attention is not supported")
    for key in ("rope_scaling", "rope_parameters"):
        if not isinstance(config.get(key) or {}, dict):
            raise InputError(f"{source}: {key}={config[key]!r} is not an object")
    # transformers 5 stores theta and scaling in rope_parameters; of files with both it reads rope_scaling only.
    scaling: dict[str, Any] = config.get("rope_scaling") or config.get("rope_parameters") or {}
    for key, allowed in _SUPPORTED.items():
        if (value := (config | scaling).get(key, allowed[0])) not in allowed:
            raise InputError(f"{source}: {key}={value!r} is not supported (only {allowed[0]!r})")

    def size(key, default=None):
        return _positive(config, key, int, source, default)

    heads, hidden = size("num_attention_heads"), size("hidden_size")
    kv_heads, head_dim = size("num_key_value_heads", heads), size("head_dim", hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise InputError(
            f"{source}: num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}, "
            f"and head_dim={head_dim} must be even"
        )
    return Architecture(
        vocab_size=size("vocab_size"),
        hidden_size=hidden,
        intermediate_size=size("intermediate_size"),
        num_layers=size("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=float(_positive(config, "rms_norm_eps", (int, float), source)),
        rope_theta=float(_positive(config | scaling, "rope_theta", (int, float), source)),
        rope_scaling=_rope_scaling(scaling, source),
        tied_embeddings=config["tie_word_embeddings"],
        max_position_embeddings=positions if isinstance(positions := config.get(_POSITIONS), int) else None,
        **_FAMILIES[str(family)],
    )


def to_hf_config(architecture: Architecture) -> dict[str, Any]:
    """Returns a config.json dict for transformers 4.5x and 5."""
    switches = {"qkv_bias": architecture.qkv_bias, "qk_norm": architecture.qk_norm}
    family = next(family for family, its_switches in _FAMILIES.items() if its_switches == switches)
    name = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}[family]
    scaling, positions = architecture.rope_scaling, architecture.max_position_embeddings
    return {
        "architectures": [f"{name}ForCausalLM"],
        "model_type": family,
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "num_hidden_layers": architecture.num_layers,
        "num_attention_heads": architecture.num_heads,
        "num_key_value_heads": architecture.num_kv_heads,
        "head_dim": architecture.head_dim,
        "rms_norm_eps": architecture.norm_eps,
        "rope_theta": architecture.rope_theta,
        "rope_scaling": None if scaling is None else {"rope_type": "llama3", **dataclasses.asdict(scaling)},
        "tie_word_embeddings": architecture.tied_embeddings,
        "hidden_act": "silu",
        **({} if positions is None else {_POSITIONS: positions}),
    }


def _rope_scaling(scaling, source):
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise InputError(f"{source}: rope_type {kind!r} is not supported; supported: default, llama3")
    return RopeScaling(
        **{
            field.name: _positive(scaling, field.name, (int, float), f"{source}: rope_scaling")
            for field in dataclasses.fields(RopeScaling)
        }
    )


def _positive(values, key, kinds, source, default=None):
    """Returns a positive number of a config. Raises InputError naming `source` and the key otherwise."""
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise InputError(f"{source}: {key} is missing")
    if isinstance(value, bool) or not isinstance(value, kinds) or not 0 < value < _MAX_VALUE:
        raise InputError(f"{source}: {key}={value!r} is not a positive {'integer' if kinds is int else 'number'}")
    return value
