"""Hostile models: model directories, backbones, adapters, and the formats of their weights."""

import json
import pathlib
import shutil

import hypothesis
import numpy as np
import pytest
import yaml
from hypothesis import strategies as st

from llm2vec_gen_jax.formats import gguf, peft, published, torchzip, weights
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import open_checkpoint
from tests.conftest import one_device_mesh, tiny_torch_model
from tests.formats.test_gguf import write_gguf
from tests.helpers.fuzzing import FUZZ, altered, contained, damaged, dumped, refused_or

HEADS = ("reconstruction_mlp", "alignment_mlp", "reconstruction_mlp.safetensors", "encoder/adapter_model.safetensors")
RECORDS = ("encoder_decoder_config.json", "encoder/adapter_config.json", "tokenizer.json", "llm2vec_gen_jax.json")


@pytest.fixture(scope="module")
def model_copy(model_folder, tmp_path_factory):
    """model_copy() -> a model directory in a folder of its own, to be damaged."""
    place = tmp_path_factory.mktemp("damaged")

    def make():
        shutil.rmtree(place / "model", ignore_errors=True)
        return pathlib.Path(shutil.copytree(model_folder, place / "model"))

    return make


def read_model(path, backbone):
    return model_directory.to_model(model_directory.read_model_directory(path), backbone, path)


@hypothesis.given(st.data(), st.sampled_from([*HEADS, *RECORDS, "run_config.yml"]))
@FUZZ
def test_any_damage_of_a_model(model_copy, tiny, data, name):
    path = model_copy()
    (path / name).write_bytes(data.draw(damaged((path / name).read_bytes())))
    with contained(path):
        refused_or(read_model, path, tiny("qwen3"))


@hypothesis.given(st.data(), st.sampled_from([*RECORDS, "run_config.yml"]))
@FUZZ
def test_any_record_of_a_model(model_copy, tiny, data, name):
    path = model_copy()
    value = yaml.safe_load((path / name).read_text())
    if name == "tokenizer.json":
        value = {"added_tokens": value["added_tokens"]}  # all that is read of it here
    value = data.draw(altered(value, ["../x", "/etc/passwd", "last_3_tokens", "LORA", "<question1>"]))
    (path / name).write_bytes(dumped(value))
    with contained(path):
        refused_or(read_model, path, tiny("qwen3"))


@st.composite
def safetensors_files(draw, content):
    """A safetensors file with another header."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = dumped(draw(altered(header, ["F32", "BF16", "I8", "F8_E4M3", "../x"])))
    said = draw(st.sampled_from([len(header), 0, len(header) + 1, 2**40, 2**64 - 1]))
    return said.to_bytes(8, "little") + header + content[8 + length :]


@hypothesis.given(st.data())
@FUZZ
def test_any_header_of_safetensors(model_copy, tiny, data):
    path = model_copy()
    file = path / data.draw(st.sampled_from([name for name in HEADS if name.endswith(".safetensors")]))
    file.write_bytes(data.draw(safetensors_files(file.read_bytes())))
    refused_or(published.read, path)


@hypothesis.given(st.data())
@FUZZ
def test_any_adapter(tmp_path, tiny, data):
    backbone, folder = tiny("qwen3"), tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rank, D = 2, backbone.architecture.hidden_size
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    F = backbone.architecture.intermediate_size
    tensors = {key.format("A"): np.ones((rank, D), np.float32), key.format("B"): np.ones((F, rank), np.float32)}
    published.write_safetensors(folder / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "target_modules": ["up_proj"]}
    if data.draw(st.booleans()):
        settings = data.draw(altered(settings, ["rank_pattern", "alpha_pattern", "use_rslora", "gaussian"]))
    else:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(data.draw(safetensors_files(file.read_bytes())))
    (folder / "adapter_config.json").write_bytes(dumped(settings))

    def read():
        file = folder / "adapter_config.json"
        config = peft.check(peft.read_json(file), file)
        return peft.read(peft._load(folder / "adapter_model.safetensors"), config, backbone.architecture, folder)

    refused_or(read)


@hypothesis.given(st.data(), st.sampled_from(["config.json", "generation_config.json", "model.safetensors"]))
@FUZZ
def test_any_backbone(tiny_folder, tmp_path, data, name):
    folder = tmp_path / "outer" / "backbone"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_folder("llama3"), folder)
    if name == "model.safetensors":
        (folder / name).write_bytes(data.draw(safetensors_files((folder / name).read_bytes())))
    else:
        words = ["llama", "qwen3", "llama3", "silu", "full_attention", "../x"]
        value = json.loads((folder / name).read_text())
        (folder / name).write_bytes(dumped(data.draw(altered(value, words))))

    def read():
        backbone, source = open_checkpoint(str(folder), Execution(one_device_mesh()))
        return weights.load(source, backbone.architecture, one_device_mesh(), np.dtype("float32"))

    with contained(folder):
        refused_or(read)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The bytes of a GGUF file, and where its tensors begin."""
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", tiny_torch_model("llama3"))
    content = pathlib.Path(path).read_bytes()
    return content, gguf.GGUFSource(path).reader.data_offset


@hypothesis.given(st.data())
@FUZZ
def test_any_metadata_of_gguf(tmp_path, gguf_file, data):
    content, start = gguf_file
    path = tmp_path / "model.gguf"
    path.unlink(missing_ok=True)  # it is mapped: never altered in place
    path.write_bytes(data.draw(damaged(content[:start])) + content[start:])

    def read():
        source = gguf.GGUFSource(path)
        architecture = gguf.read_architecture(source)
        gguf.read_tokenizer(source), gguf.stop_ids(source)
        weights.fingerprint_values(source, architecture)

    refused_or(read)


@hypothesis.given(st.data())
@FUZZ
def test_any_damage_of_a_head(tmp_path, data):
    path = tmp_path / "head"
    torchzip.write(path, {"projection.weight": np.ones((2, 2), np.float32)}, {"size": 1})
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged(content)))
    found = refused_or(torchzip.read, path)
    assert found is None or all(isinstance(value, np.ndarray) for value in found[0].values())
