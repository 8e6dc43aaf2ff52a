"""PEFT's patterns: the scale, the rank and the choice of every module are those of the installed peft."""

import json
import re
import time

import numpy as np
import peft as their_peft
import pytest
import safetensors.numpy
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import peft
from llm2vec_gen_jax.model.architecture import from_hf_config
from tests.conftest import tiny_torch_model
from tests.helpers.adapters import FAMILY, LORA, SHAPES, write_adapter

PATTERNS = [
    "q_proj",
    "self_attn.q_proj",
    "layers.0.self_attn.q_proj",
    "model.layers.0.self_attn.q_proj",
    "^layers.0.self_attn.q_proj",
    "^model.layers.0.self_attn.q_proj",
    r"layers\.[01]\..*",
    r".*\.mlp\..*",
    "0.self_attn.q_proj|1.mlp.up_proj",
    "^.*up_proj$",
    "_proj",
    "q",
]
NAMES = [f"{prefix}layers.{layer}.{module}" for prefix in ("", "model.") for layer in range(12) for module in SHAPES]


def deltas(model, architecture, folder):
    """Yields (name, what peft adds, what we add) of every projection of a model with an adapter."""
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    file = folder / "adapter_config.json"
    tree = peft.read(tensors, peft.check(json.loads(file.read_text()), file), architecture, folder)
    for name, module in model.named_modules():
        layer, _, inside = name.rpartition("layers.")[2].partition(".")
        if inside in SHAPES:
            theirs = module.get_delta_weight("default").detach().numpy() if hasattr(module, "lora_A") else 0
            ours, pair = 0, tree.get(peft._MODULES[inside][0])
            if pair:
                a, b = pair["a"][int(layer)], pair["b"][int(layer)]
                ours = (a.reshape(-1, a.shape[-1]) @ b.reshape(a.shape[-1], -1)).T
            yield name, np.zeros(SHAPES[inside]) + theirs, np.zeros(SHAPES[inside]) + ours


def adapted(folder, base, **settings):
    """Returns the torch model with an adapter of random numbers that peft made, saved to a folder and read again."""

    def make():
        return tiny_torch_model(FAMILY).model if base else tiny_torch_model(FAMILY)

    modules = [name.rpartition(".")[2] for name in SHAPES]
    settings = {"r": 4, "lora_alpha": 12, "target_modules": modules} | settings
    model = their_peft.get_peft_model(make(), their_peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)  # which sorts the patterns
    return their_peft.PeftModel.from_pretrained(make(), folder)


def assert_equal_everywhere(model, folder):
    architecture = from_hf_config(model.config.to_dict(), "config.json")
    found = {name: (theirs, ours) for name, theirs, ours in deltas(model, architecture, folder)}
    assert len(found) == 3 * len(SHAPES) and any(theirs.any() for theirs, _ in found.values())
    for name, (theirs, ours) in found.items():
        np.testing.assert_allclose(ours, theirs, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("base", [False, True], ids=["causal", "base"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_matches_what_peft_matches(tmp_path, pattern, base):
    settings = {"alpha_pattern": {pattern: 96, "down_proj": 3}, "rank_pattern": {"k_proj": 2, pattern: 3}}
    assert_equal_everywhere(adapted(tmp_path, base, **settings), tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*\.[02]\.(self_attn\.q|mlp\.up)_proj"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["self_attn.q_proj", "down_proj"], "exclude_modules": ["1.mlp.down_proj"]},
        {"target_modules": ["model.layers.1.self_attn.q_proj", "v_proj"], "layers_to_transform": [0]},
        {"exclude_modules": r".*layers\.1\..*", "use_rslora": True},
    ],
)
def test_the_modules_are_those_that_peft_adapts(tmp_path, settings):
    assert_equal_everywhere(adapted(tmp_path, False, **settings), tmp_path)


def test_the_rules_of_the_installed_peft():
    """More than can be trained: every rule on names with and without a prefix, one and two digits."""
    lists = [["q_proj"], ["layers.1.self_attn.q_proj"], ["model.layers.1.mlp.up_proj", "k_proj"], ["proj"]]
    regular = [r".*q_proj", "q_proj", r"model\.layers\.1.*", r"layers\.1\d?\..*", "all-linear"]
    for targets in lists + regular:
        for exclude in (None, [], ["0.self_attn.q_proj"], r".*\.1\..*"):
            for layers in (None, [], 1, [1, 11]) if isinstance(targets, list) else (None,):
                for pattern in (None, "", [], "layers", ["h", "layers"], "model.layers"):
                    values = {"target_modules": targets, "exclude_modules": exclude}
                    values |= {"layers_to_transform": layers, "layers_pattern": pattern, "modules_to_save": None}
                    config = their_peft.LoraConfig()
                    config.__dict__.update(values)
                    for name in NAMES:
                        expected = bool(check_target_module_exists(config, name))
                        expected = expected or (targets == "all-linear" and not peft._is_named(exclude, name))
                        assert peft.is_target(values, name) == expected, (values, name)
    for name in NAMES:
        for patterns in ([pattern] for pattern in PATTERNS):
            theirs = dict.fromkeys(patterns, 5).get(get_pattern_key(patterns, name), 1)
            assert peft._override(dict.fromkeys(patterns, 5), name, 1) == theirs, (patterns, name)


@pytest.mark.parametrize(
    "pattern",
    [
        *("(.*)*z", "(.+)+z", "((a|.)*)*z", "(.?){30}z", ".*" * 10 + "z", "(?=(.*)*z)q", "(?:.|.)*z", ".?" * 40 + "z"),
        "".join(f"({letter}|{letter}?.?)" for letter in "model.layers.0.self_attn.q_proj") + "z",
        "(?i)" + "[\u0100-\U0010ffff]" * 300 + "z",  # takes long to compile
        "(" * 9999,
        "(?i)q_proj",
    ],
)
def test_patterns_that_take_for_ever_are_refused(tiny, tmp_path, pattern):
    for key in ("alpha_pattern", "rank_pattern", "target_modules", "exclude_modules", "layers_pattern"):
        if pattern == "(?i)q_proj" and "modules" in key:
            continue  # flags may be at the start
        value = {pattern: 4} if key.endswith("a_pattern") or key.startswith("rank") else pattern
        settings = {"layers_to_transform": [0]} if key == "layers_pattern" else {}
        adapter = write_adapter(tmp_path / key, LORA | settings | {key: value}, {(0, "self_attn.q_proj"): 4})
        start = time.monotonic()
        with pytest.raises(InputError, match=f"adapter_config.json: {key}"):
            peft.merge(tiny(FAMILY).frozen, [adapter], tiny(FAMILY).architecture)
        assert time.monotonic() - start < 30  # of which one second of CPU time


def test_patterns_that_tools_write_are_matched():
    """The first is that of unsloth."""
    long = (
        r"(?:.*?(?:vision|image|visual|patch|embed|img).*?(?:attn|self_attn|attention|mlp|feed_forward|ffn|dense)"
        r".*?(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|qkv|proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\."
        r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|up_proj)))"
    )
    for pattern in (long, r".*\.layers\.(\d+)\.(self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj"):
        config = peft.check(LORA | {"target_modules": pattern}, "adapter_config.json")
        for name in NAMES:
            assert peft.is_target(config, name) == bool(re.fullmatch(pattern, name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["v_proj"]}, "model.layers.0.self_attn.q_proj, but adapter_config.json excludes it"),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, "layers.0.self_attn.q_proj, .*excludes it"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "q_proj, but .* excludes it"),
        ({"target_modules": "("}, "adapter_config.json: target_modules: a regular expression cannot be used .missing"),
        ({"target_modules": [5]}, r"adapter_config.json: target_modules=\[5\]"),
        ({"lora_alpha": float("nan")}, "adapter_config.json: lora_alpha is missing or not a number"),
        ({"lora_alpha": True}, "adapter_config.json: lora_alpha is missing or not a number"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "adapter_config.json: alpha_pattern must map"),
        ({"use_rslora": "false"}, "adapter_config.json: use_rslora must be true or false"),
        ({"layers_to_transform": ["1"]}, "adapter_config.json: layers_to_transform"),
        ({"layers_pattern": ["("]}, "adapter_config.json: layers_pattern"),
        ({"modules_to_save": ["lm_head"]}, "adapter_config.json: modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "adapter_config.json: layer_replication"),
        ({"target_parameters": ["x"]}, "adapter_config.json: target_parameters"),
        ({"trainable_token_indices": [1]}, "adapter_config.json: trainable_token_indices"),
    ],
)
def test_what_would_be_another_adapter_in_peft_is_named(tiny, tmp_path, changes, message):
    adapter = write_adapter(tmp_path / "adapter", LORA | changes, {(0, "self_attn.q_proj"): 4})
    with pytest.raises(InputError, match=message):
        peft.merge(tiny(FAMILY).frozen, [adapter], tiny(FAMILY).architecture)
