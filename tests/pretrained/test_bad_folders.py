"""Bad folders as users meet them, on the command line: backbones, models, and what would run or lead elsewhere."""

import json
import os
import pathlib
import pickle
import shutil
import zipfile

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llm2vec_gen_jax.pretrained.default_backbone import default_backbone
from tests.conftest import check_error
from tests.helpers.commands import RESPONSES, edit, encode, losses, only_config, respond, succeed, train, write_task

# Backbones and models


def test_an_end_that_also_pads_is_learnt(command, tiny_folder, tmp_path):
    """Llama's folders pad with the end token: a mask made of the padding's id would leave the real end out too."""
    found = []
    for pad in ("<|endoftext|>", "<|im_end|>"):
        backbone = tmp_path / pad.strip("<|>")
        shutil.copytree(tiny_folder("llama"), backbone)
        edit(backbone / "tokenizer_config.json", pad_token=pad)
        succeed(train(command, backbone, RESPONSES, f"train.output={backbone.name}"))
        found.append(losses(backbone.name))
    assert found[0] == found[1]
    edit(backbone / "tokenizer_config.json", pad_token=None, eos_token=None)
    result = train(command, backbone, RESPONSES)
    check_error(result, "no end token", "data.answer_suffix")
    assert only_config()


def damaged_backbone(folder, how):
    """Damages a copy of a backbone. Returns (its path, what the message must name)."""
    weights = folder / "model.safetensors"
    if how == "gguf":
        with open(default_backbone(), "rb") as file:
            (folder / "cut.gguf").write_bytes(file.read(100_000))
        return folder / "cut.gguf", ["cut.gguf: not a complete GGUF file"]
    if how in ("nan", "int8"):
        arrays = load_file(weights)
        arrays["model.norm.weight"] = {
            "nan": np.where(np.arange(32) == 3, np.nan, arrays["model.norm.weight"]),
            "int8": np.ones(32, np.int8),
        }[how]
        save_file(arrays, weights)
        return folder, [folder, "model.norm.weight", {"nan": "NaN", "int8": "I8; supported: F32"}[how]]
    content = {
        "html": b"<!DOCTYPE html>",
        "endless header": b"\xff" * 8 + weights.read_bytes()[8:],
        "longer": weights.read_bytes() + b"x",
    }[how]
    weights.write_bytes(content)
    return folder, [weights, "damaged or truncated"]


@pytest.mark.parametrize("how", ["nan", "int8", "html", "endless header", "longer", "gguf"])
def test_damaged_weights_of_a_backbone_are_named(command, tiny_folder, tmp_path, how):
    """(Truncated ones, pointers and tensors that are missing: test_commands.py.)"""
    shutil.copytree(tiny_folder("llama"), tmp_path / "backbone")
    path, expected = damaged_backbone(tmp_path / "backbone", how)
    check_error(respond(command, path), *expected)
    assert os.listdir() == []


@pytest.mark.parametrize("how", ["cut", "nan", "not of this model", "a flipped bit"])
def test_damaged_weights_of_a_model_are_named(command, model_folder, tmp_path, how):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    file = model / ("alignment_mlp.safetensors" if how == "a flipped bit" else "encoder/adapter_model.safetensors")
    content, message = bytearray(file.read_bytes()), "not a readable safetensors file"
    if how == "cut":
        file.write_bytes(content[:-4])
    elif how == "a flipped bit":
        content[-1] ^= 1
        file.write_bytes(content)
        message = "differs from alignment_mlp"
    else:
        arrays = load_file(file)
        ((name, rows),) = arrays.items()
        changes = {
            "nan": ({name: rows * np.nan}, "contains NaN"),
            "not of this model": ({"x": rows}, "unexpected tensor x"),
        }
        changed, message = changes[how]
        save_file(arrays | changed, file)
    check_error(encode(command, model, ["a"]), file, message)
    check_error(command("convert from_pytorch", model, "output=converted"), file, message)
    assert os.listdir() == []


def test_damaged_soft_prompts_and_adapters_are_named(command, model_folder, tiny_folder, tmp_path):
    prompts = np.zeros((3, 3, 32))
    for value, message in ((np.nan, "row 1 (from 0)"), (np.inf, "row 1 (from 0)"), (1e300, "row 1 (from 0)")):
        np.save(tmp_path / "prompts.npy", np.where(np.arange(3)[:, None, None] == 1, value, prompts))
        check_error(
            command("decode", model_folder, f"soft_prompts={tmp_path / 'prompts.npy'}"), "soft prompts", message
        )
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    (adapter / "adapter_model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    result = train(command, tiny_folder("llama"), RESPONSES, f"teacher.adapters={adapter}")
    check_error(result, adapter / "adapter_model.safetensors", "damaged or truncated")
    assert only_config()


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("config.json", {"num_hidden_layers": 10**9}, "the config 1000000000 layers"),
        ("config.json", {"hidden_size": "32"}, "config.json: hidden_size='32' is not a positive integer"),
        ("config.json", {"num_attention_heads": 0}, "config.json: num_attention_heads=0 is not a positive"),
        ("config.json", {"num_key_value_heads": 3}, "config.json: num_attention_heads=4 must be a multiple"),
        ("config.json", {"rope_parameters": "default"}, "config.json: rope_parameters='default' is not an object"),
        ("config.json", {"num_attention_heads": 10**400}, "is not a positive"),
        ("generation_config.json", {"eos_token_id": ["2"]}, "generation_config.json: eos_token_id=['2'] is not"),
        ("tokenizer_config.json", {"chat_template": "{% if %}"}, "the chat template cannot be used"),
        ("tokenizer_config.json", {"eos_token": 2}, "no readable tokenizer"),
        ("tokenizer.json", {"model": {"type": "Other"}}, "no readable tokenizer"),
    ],
)
def test_a_senseless_config_of_a_backbone_is_named(command, tiny_folder, tmp_path, file, values, message):
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_folder("llama"), backbone)
    (backbone / "chat_template.jinja").unlink()
    edit(backbone / file, **values)
    check_error(respond(command, backbone), backbone, message)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("license: mit\ndate: 2024-02-30", "day is out of range"),
        ("license: " + "[" * 5000, "recursion"),
        ("license: " + "9" * 5000, "4300 digits"),
        ("a: &a [x, x]\nb: &b [" + "*a, " * 999 + "]\nc: [" + "*b, " * 999 + "]", "more than 100000 values"),
        ("a: &a [*a]", "an alias of a value that contains it"),
        ("license: mit\n\ttab", "not valid YAML"),
    ],
)
def test_damaged_metadata_of_a_model_card_are_named(command, tiny_folder, tmp_path, front, message):
    backbone = tmp_path / "backbone"
    shutil.copytree(tiny_folder("llama"), backbone)
    (backbone / "README.md").write_text(f"---\n{front}\n---\n\n# A model\n")
    check_error(respond(command, backbone), f"{backbone / 'README.md'}: metadata", message)
    assert os.listdir() == []


def test_a_tokenizer_of_another_model_is_refused(command, model_folder, tiny_folder, tmp_path):
    """Of the same size, so that every id has a row: the vectors would be those of other texts."""
    backbone, model = tmp_path / "backbone", tmp_path / "model"
    shutil.copytree(tiny_folder("qwen3"), backbone)
    shutil.copytree(model_folder, model)
    run = model / "run_config.yml"
    run.write_text(run.read_text().replace(str(tiny_folder("qwen3")), str(backbone)))
    succeed(encode(command, model, ["a"]))
    shutil.rmtree("out")
    fields = json.loads((backbone / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = fields["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (backbone / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    check_error(encode(command, model, ["a"]), f"{model}: was trained with other tokenizer files", backbone)
    check_error(command("decode", model, "text=a"), f"{model}: was trained with other tokenizer files")
    file = model / "tokenizer.json"
    fields = json.loads(file.read_text(encoding="utf-8"))
    fields["added_tokens"][-1]["id"] += 1
    file.write_text(json.dumps(fields), encoding="utf-8")
    check_error(encode(command, model, ["a"]), model / "encoder/adapter_config.json", "trained token ids are [260, 261")
    assert os.listdir() == []


# What would run, or lead elsewhere


def test_no_pickle_is_run(command, model_folder, tiny_folder, tmp_path):
    marker = tmp_path / "marker"

    class Hostile:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    program = pickle.dumps({"state_dict": {}, "config": {"x": Hostile()}}, 2)
    for kind in ("zip", "plain", "missing"):
        model = tmp_path / kind
        shutil.copytree(model_folder, model)
        head = model / "reconstruction_mlp"
        (model / "reconstruction_mlp.safetensors").unlink()
        head.unlink()
        if kind == "zip":
            with zipfile.ZipFile(head, "w") as archive:
                archive.writestr("head/data.pkl", program)
        if kind == "plain":  # as torch wrote them before it made zips
            head.write_bytes(program)
        message = {"zip": f"refers to {os.system.__module__}.system", "plain": "not a zip", "missing": "no such file"}[
            kind
        ]
        check_error(encode(command, model, ["a"]), head, message)
        check_error(command("convert from_pytorch", model, "output=converted"), head, message)
    assert os.listdir() == []
    np.save(tmp_path / "objects.npy", np.array([Hostile()] * 8), allow_pickle=True)
    (tmp_path / "bare.npy").write_bytes(program)
    for file in (tmp_path / "objects.npy", tmp_path / "bare.npy"):
        check_error(command("decode", model_folder, f"soft_prompts={file}"), f"soft_prompts={file}: not a .npy array")
        words = ["teacher.kind=file", f"teacher.path={file}"]
        result = train(command, tiny_folder("llama"), RESPONSES, *words)
        check_error(result, f"teacher.path={file}: not a .npy array")
        assert only_config()
    assert not marker.exists()


def test_no_path_leads_out_of_a_folder(command, model_folder, tiny_folder, tmp_path):
    backbone, model = tmp_path / "backbone", tmp_path / "model"
    shutil.copytree(tiny_folder("llama"), backbone)
    index = backbone / "model.safetensors.index.json"
    (backbone / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    for name in (str(tmp_path / "elsewhere.safetensors"), "x/../../elsewhere.safetensors", "..", 5):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        message = (
            "weight_map must map tensor names to file names"
            if name == 5
            else f"lists {name}, which is outside its folder"
        )
        check_error(respond(command, backbone), index, message)
    shutil.copytree(model_folder, model)
    (model / "reconstruction_mlp").rename(tmp_path / "head")
    (model / "reconstruction_mlp").symlink_to(tmp_path / "head")
    check_error(encode(command, model, ["a"]), f"{model / 'reconstruction_mlp'}: points outside the directory")
    assert os.listdir() == []
    # Of data, no name becomes that of a file.
    folder = write_task(tmp_path / "task", name="../../escaped")
    succeed(command("evaluate", model_folder, f"tasks={folder}", "output=out"))
    assert list(json.loads(pathlib.Path("out/results.json").read_text())) == ["../../escaped"]
    assert sorted(os.listdir("out")) == ["results.json", "run.json"]
    assert not list(tmp_path.parent.rglob("escaped*"))


@pytest.mark.parametrize("needed_by", ["nothing", "the tokenizer", "the model"])
def test_code_of_a_folder_is_not_run(command, tiny_folder, tmp_path, monkeypatch, needed_by):
    """Nor does anything ask whether it may run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    backbone, marker = tmp_path / "backbone", tmp_path / "marker"
    shutil.copytree(tiny_folder("llama"), backbone)
    (backbone / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: pass\nclass Words: pass\n")
    edit(backbone / "config.json", auto_map={"AutoConfig": "code.Config"})
    edit(backbone / "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.Words"] * 2})
    if needed_by == "the tokenizer":
        edit(backbone / "tokenizer_config.json", tokenizer_class="Words")
    if needed_by == "the model":
        edit(backbone / "config.json", model_type="other")
    result = respond(command, backbone)
    if needed_by == "nothing":
        succeed(result)
    else:
        named = {"the tokenizer": "no readable tokenizer", "the model": "model_type 'other' is not supported"}
        check_error(result, backbone, named[needed_by])
        assert os.listdir() == []
    assert not marker.exists()
