"""Hugging Face folders: what transformers loads is loaded as the same numbers, and what is saved loads there."""

import copy
import dataclasses
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import hf
from llm2vec_gen_jax.model import architecture as architecture_lib
from llm2vec_gen_jax.pretrained import model_directory
from tests.conftest import FAMILIES, tiny_tokenizer, tiny_torch_model, torch_outputs
from tests.helpers.backbones import ROWS, assert_same_outputs, assert_same_weights, load, outputs, save_folder
from tests.helpers.embedders import embedder_on


def test_many_files_equal_one(tiny, tmp_path):
    backbone = tiny("qwen3")
    folder = save_folder(tmp_path, tiny_torch_model("qwen3"), max_shard_size="20KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    loaded = load(folder)
    assert_same_weights(loaded.frozen, backbone.frozen)
    assert (loaded.architecture, loaded.identity) == (backbone.architecture, backbone.identity)


def rewritten(folder, source, change):
    """Copies a folder with its weights {name: array} changed; returns its path."""
    shutil.copytree(source, folder)
    arrays = load_file(folder / "model.safetensors")
    save_file(change(arrays), folder / "model.safetensors", {"format": "pt"})
    return folder


def base_names(arrays):
    return {name.removeprefix("model."): array for name, array in arrays.items()}


def own_head(arrays, row=7):
    head = arrays["model.embed_tokens.weight"].copy()
    head[row] += 1
    return arrays | {"lm_head.weight": head}


def head_alone(arrays):
    return {"lm_head.weight": arrays.pop("model.embed_tokens.weight")} | arrays


def same_head(arrays):
    return arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"].copy()}


def test_every_row_of_an_untied_head_is_in_the_identity(tiny, tiny_folder, tmp_path):
    def other_row(arrays):
        arrays["lm_head.weight"][200] += 1
        return arrays

    found, before = load(rewritten(tmp_path / "changed", tiny_folder("llama"), other_row)), tiny("llama")
    assert found.identity != before.identity and found.former_identity == before.former_identity
    assert tiny("qwen3").identity == tiny("qwen3").former_identity  # a tied one is as it was
    model = embedder_on(before)
    model_directory.save(tmp_path / "model", model.model, model.trainable, before, {})
    record = model_directory.read_model_directory(tmp_path / "model")
    with pytest.raises(InputError, match="another backbone"):
        model_directory.to_model(record, found, "model")
    for identity in (before.identity, before.former_identity):
        model_directory.to_model(dataclasses.replace(record, extra={"backbone_identity": identity}), before, "model")


@pytest.mark.parametrize("family", ["qwen3", "llama"])
@pytest.mark.parametrize("change", [base_names, own_head, head_alone, same_head])
def test_what_is_in_the_files_runs_as_in_transformers(family, change, tiny, tiny_folder, tmp_path):
    import transformers

    if family == "llama" and change is not base_names:
        pytest.skip("not tied")
    folder = rewritten(tmp_path / "changed", tiny_folder(family), change)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    backbone, before = load(folder), tiny(family)
    assert_same_outputs(outputs(backbone), torch_outputs(theirs, ROWS), 1e-4)
    assert (backbone.identity == before.identity) == (change is not own_head)
    assert backbone.architecture.tied_embeddings == (change is not own_head and family == "qwen3")
    hf.save(tmp_path / "saved", backbone.frozen, backbone.architecture, backbone.tokenizer.save)
    again = load(tmp_path / "saved")
    assert again.identity == backbone.identity
    assert_same_outputs(outputs(again), outputs(backbone), 1e-6)


def test_a_head_that_is_missing_or_does_not_fit_is_named(tiny_folder, tmp_path):
    cases = {
        "a": ("llama", lambda arrays: {k: v for k, v in arrays.items() if k != "lm_head.weight"}, "missing.*lm_head"),
        "b": ("qwen3", lambda arrays: own_head(arrays) | {"lm_head.weight": np.ones((3, 32))}, "lm_head.*shape"),
        "c": ("qwen3", lambda arrays: arrays | {"norm.weight": np.ones(32)}, "model.norm.weight and norm.weight"),
    }
    for name, (family, change, message) in cases.items():
        with pytest.raises(InputError, match=message):
            load(rewritten(tmp_path / name, tiny_folder(family), change))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize(
    "key", ["num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "hidden_act"]
)
@pytest.mark.parametrize("how", ["left out", "null"])
def test_what_a_config_leaves_out_is_what_transformers_takes(family, key, how):
    import transformers

    config = {"model_type": family, "vocab_size": 264, "hidden_size": 2560, "intermediate_size": 48, "head_dim": 48}
    config |= {"num_hidden_layers": 2, "num_attention_heads": 64, "num_key_value_heads": 8, "rms_norm_eps": 1e-5}
    config |= {"rope_theta": 5e5, "tie_word_embeddings": True, "hidden_act": "silu", key: None}
    if how == "left out":
        del config[key]
    try:
        theirs = transformers.AutoConfig.for_model(**config)
    except Exception:
        theirs = None
    if theirs is None or theirs.rope_parameters["rope_theta"] is None:
        if (family, key) != ("qwen3", "head_dim"):  # transformers 4 divided
            with pytest.raises(InputError, match=f"config.json: {key}"):
                architecture_lib.from_hf_config(config, "config.json")
        return
    ours = architecture_lib.from_hf_config(config, "config.json")
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    assert (ours.num_kv_heads, ours.head_dim) == (theirs.num_key_value_heads, head_dim)
    assert (ours.norm_eps, ours.tied_embeddings) == (theirs.rms_norm_eps, theirs.tie_word_embeddings)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"partial_rotary_factor": 0.5},
        {"tie_word_embeddings": "false"},
        {"is_causal": False},  # transformers computes bidirectional attention
    ],
)
def test_a_setting_that_is_not_implemented_is_named(values):
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = dict.fromkeys(sizes, 8) | {"model_type": "llama", "head_dim": 8} | values
    with pytest.raises(
        InputError, match="config.json: (partial_rotary_factor|tie_word_embeddings|is_causal)=.* is not supp"
    ):
        architecture_lib.from_hf_config(config, "config.json")


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}


@pytest.mark.parametrize("scaling", [{"type": "linear", "factor": 2.0}, {"rope_type": "default"}, {}, None, LLAMA3])
@pytest.mark.parametrize("parameters", [{"rope_type": "default", "rope_theta": 77.0}, {}, None, {"rope_theta": 5.0}])
def test_of_two_rope_settings_that_of_transformers_applies(scaling, parameters):
    from transformers import LlamaConfig

    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = dict.fromkeys(sizes, 8) | {"head_dim": 8, "rope_scaling": scaling, "rope_parameters": parameters}
    theirs = LlamaConfig(**copy.deepcopy(config)).rope_parameters
    config["model_type"] = "llama"
    if theirs["rope_type"] == "linear":
        with pytest.raises(InputError, match="config.json: rope_type 'linear' is not supported"):
            architecture_lib.from_hf_config(config, "config.json")
    else:
        ours = architecture_lib.from_hf_config(config, "config.json")
        assert ours.rope_theta == theirs["rope_theta"]
        assert (ours.rope_scaling is not None) == (theirs["rope_type"] == "llama3")


@pytest.mark.parametrize("name, damage", [("model.norm.weight", "missing"), ("extra.weight", "unexpected")])
def test_index_and_weights_must_agree(name, damage, tiny_folder, tmp_path):
    arrays = load_file(tiny_folder("llama") / "model.safetensors")
    if damage == "missing":
        del arrays[name]
    else:
        arrays[name] = np.zeros(3, np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_folder("llama") / "config.json").read_bytes())
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(InputError, match=name):
        load(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_folder_is_the_same_model_in_torch_and_here(family, tiny, tmp_path):
    import transformers

    backbone, tokenizer = tiny(family), tiny(family).tokenizer
    hf.save(tmp_path / "saved", backbone.frozen, backbone.architecture, tokenizer.save, tokenizer.stop_ids)
    reloaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    expected = torch_outputs(tiny_torch_model(family), ROWS)
    assert_same_outputs(torch_outputs(reloaded, ROWS), expected, 1e-6)
    again = load(tmp_path / "saved")
    assert_same_weights(again.frozen, backbone.frozen)
    assert (again.architecture, again.identity) == (backbone.architecture, backbone.identity)
    assert again.tokenizer.stop_ids == tokenizer.stop_ids
