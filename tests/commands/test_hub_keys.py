"""Keys of commands for the Hugging Face hub: revision, token, cache_dir and local_files_only."""

import dataclasses
import json
import pathlib
import shutil

import datasets
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.hub import HubOptions
from llm2vec_gen_jax.config import TrainConfig, options
from llm2vec_gen_jax.data.records import read_records
from llm2vec_gen_jax.training.trainer import LLM2VecGenTrainer
from tests.conftest import check_error
from tests.helpers.commands import RESPONSES, encode, succeed, train
from tests.helpers.conversion import new_model
from tests.helpers.hub import COMMIT, add_to_cache

SECRET = "hf_secret"


def test_every_command_that_can_read_the_hub_has_the_keys():
    for name in config.__all__:
        schema = getattr(config, name)
        if "`python -m launch." in (getattr(schema, "__doc__", None) or "") and name != "InstructConfig":
            assert issubclass(schema, config.HubConfig), name
            takes_backbone = dataclasses.is_dataclass(getattr(schema(), "backbone", None))
            assert takes_backbone != issubclass(schema, config.ModelHubConfig), name


def test_a_model_is_encoded_at_a_revision_of_a_cache(command, tiny, tmp_path):
    new_model(tiny("llama")).save_pretrained(tmp_path / "first")
    other = new_model(tiny("llama"))
    other.trainable["tokens"] = other.trainable["tokens"] + 1
    other.save_pretrained(tmp_path / "other")
    cache = tmp_path / "cache"
    add_to_cache(cache, tmp_path / "first")
    add_to_cache(cache, tmp_path / "other", "v2", COMMIT)
    access = (f"cache_dir={cache}", "local_files_only=true", f"token={SECRET}")
    succeed(encode(command, "someone/embedder", ["a"], "revision=v2", *access))
    manifest = pathlib.Path("out/manifest.json").read_text()
    assert not [key for key in ("revision", *config.HUB_KEYS, SECRET) if key in manifest]  # the identity is recorded
    result = encode(command, tmp_path / "other", ["a"], f"token={SECRET}")  # the same model, so the run is finished
    assert result[0] == 0 and SECRET not in "".join(map(str, result))
    result = encode(command, "someone/embedder", ["a"], *access)  # another one
    check_error(result, "holds another run")
    result = encode(command, "someone/embedder", ["a"], "revision=v3", *access)
    check_error(result, "someone/embedder: its revision=v3 is not", cache, "local_files_only", "cache_dir")
    check_error(encode(command, tmp_path / "other", ["a"], "revision=v2"), "revision=v2. Remove revision")
    check_error(encode(command, "someone/embedder", ["a"], "revision=", *access), "revision is empty")
    check_error(encode(command, "smollm2-135m", ["a"], "revision=v2"), "smollm2-135m: not on the hub")
    result = encode(command, "someone/embedder", ["a"], f"token={SECRET} x")
    check_error(result, "token: not an access token")
    assert SECRET not in result[2]


def test_a_run_records_the_revision_of_its_backbone_and_no_token(command, tiny_folder, tmp_path):
    cache = tmp_path / "cache"
    add_to_cache(cache, tiny_folder("llama"), "v1", COMMIT, "someone/tiny")
    access = [f"cache_dir={cache}", "local_files_only=true", f"token={SECRET}"]
    words = [command, "someone/tiny", RESPONSES, "backbone.revision=v1"]
    printed = succeed(train(*words, *access))
    assert "revision: v1\n" in pathlib.Path("run/config.yaml").read_text()
    record = json.loads(pathlib.Path("run/model/llm2vec_gen_jax.json").read_text())
    assert record["backbone_revision"] == record["config"]["backbone"]["revision"] == "v1"
    assert not set(config.HUB_KEYS) & set(record["config"])
    files = [path for path in pathlib.Path().rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if SECRET.encode() in path.read_bytes()]
    assert SECRET not in printed
    # The directory names its backbone with the revision: there is no main in this cache.
    succeed(encode(command, "run/model", ["a"], *access))
    moved = shutil.copytree(cache, tmp_path / "moved")
    succeed(train(*words, f"cache_dir={moved}", "train.steps=2"))  # how the hub is read may change
    result = train(*words[:3], "backbone.revision=v2", f"cache_dir={moved}", "train.steps=3")
    check_error(result, "backbone.revision: 'v1' -> 'v2'")
    result = train(*words[:3], "backbone.revision=v2", f"cache_dir={moved}", "local_files_only=true", "train.output=b")
    check_error(result, "backbone.path=someone/tiny: its revision=v2 is not", "local_files_only")
    result = train(command, tiny_folder("llama"), RESPONSES, "backbone.revision=v2", "train.output=c")
    check_error(result, "backbone.path=", "revision=v2")


# The token


def test_a_token_is_in_no_record_and_no_message(tmp_path):
    loaded = options.load(TrainConfig, None, [f"token={SECRET}"])
    assert loaded.token == SECRET  # and for a tracker, in config.yaml and in the text of a traceback:
    assert SECRET not in f"{options.to_dict(loaded)} {options.to_yaml(loaded)} {loaded!r} {HubOptions(token=SECRET)!r}"
    file = tmp_path / "config.yaml"
    for text in (f"token: [{SECRET}]", f"token: {{a: {SECRET}}}", f"token: !!binary {SECRET}"):
        file.write_text(text)
        with pytest.raises(InputError, match="token") as error:
            options.load(TrainConfig, file)
        assert SECRET not in str(error.value)
    with pytest.raises(InputError, match="token=...: expected text") as error:
        options.check(TrainConfig(token=[SECRET]))
    assert SECRET not in str(error.value)
    assert options.suggest(TrainConfig, ["--token", SECRET]) == "token=..."
    trainer = LLM2VecGenTrainer([], tmp_path / "run", config=TrainConfig(token=SECRET, local_files_only=True))
    assert (trainer.config.token, trainer.config.local_files_only) == (SECRET, True)


# Datasets


def test_a_dataset_is_read_from_its_cache_alone(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"question": "one"}\n')
    cache, hub = tmp_path / "cache", HubOptions(cache_dir=tmp_path / "cache", local_files_only=True)
    datasets.load_dataset(str(tmp_path / "data"), cache_dir=str(cache))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match="someone/data: neither .* in the cache because of local_files_only"):
        read_records("someone/data", ("question",), hub=hub)
    (cache / "data").rename(cache / "someone___data")  # as of a dataset of the hub
    assert read_records("someone/data", ("question",), hub=hub) == [{"question": "one"}]
    assert datasets.config.HF_HUB_OFFLINE is False
