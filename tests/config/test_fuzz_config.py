"""Hostile settings: config files and words of the command line."""

import dataclasses

import hypothesis
import yaml
from hypothesis import strategies as st

from llm2vec_gen_jax import config
from llm2vec_gen_jax.config import options
from tests.helpers.fuzzing import FUZZ, JSON, altered, damaged, dumped, refused_or

SCHEMAS = [
    getattr(config, name)
    for name in config.__all__
    if name.endswith("Config") and name not in ("BackboneConfig", "DistributedConfig", "SizesConfig")
]
KEYS = sorted({field.name for schema in SCHEMAS for field in dataclasses.fields(schema)})
SETTINGS = {key: options.to_dict(config.TrainConfig())[key] for key in ("backbone", "teacher", "optimizer", "lora")}


@hypothesis.given(st.sampled_from(SCHEMAS), altered(SETTINGS, KEYS), st.booleans())
@FUZZ
def test_any_config_file(tmp_path, schema, values, flow):
    path = tmp_path / "config.yaml"
    path.write_bytes(dumped(values) if flow else yaml.safe_dump(values, allow_unicode=False).encode())
    loaded = refused_or(options.load, schema, path)
    assert loaded is None or type(loaded) is schema


@hypothesis.given(st.binary(max_size=60) | damaged(yaml.safe_dump(SETTINGS).encode()))
@FUZZ
def test_any_bytes_as_a_config_file(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    refused_or(options.load, config.TrainConfig, tmp_path / "config.yaml")


@hypothesis.given(st.data(), st.sampled_from(SCHEMAS))
@FUZZ
def test_any_words_of_the_command_line(data, schema):
    keys = st.sampled_from(options._leaves(schema)) | st.text(max_size=9)
    values = st.text(max_size=9) | JSON.map(str) | st.sampled_from(["[", "[[", "{a: b}", "${x}", "???", "1e999", "nan"])
    words = data.draw(st.lists(st.tuples(keys, values).map("=".join) | st.text(max_size=9), max_size=3))
    loaded = refused_or(options.load, schema, None, words)
    assert loaded is None or options.to_yaml(loaded)
