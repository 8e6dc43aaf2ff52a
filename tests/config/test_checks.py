"""The home directory in paths, and the checks of configs that are created in Python."""

import dataclasses
import pathlib

import numpy as np
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import TrainConfig, options
from llm2vec_gen_jax.data.texts import Corpus
from llm2vec_gen_jax.training.train import train
from tests.config.test_config import leaves

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.yaml"))
SCHEMAS = [
    value
    for name, value in vars(config).items()
    if name.endswith("Config") and dataclasses.is_dataclass(value) and "launch" in (value.__doc__ or "")
]


# Paths

PLAIN = """answer_suffix api_key_env attention_function alignment_function comparisons contrastive_function distributed
endpoint field host id_field instruction layers mask_token metric model name profile prompt query_instruction
document_instruction recipe revision split text token topology"""


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_home_is_known_in_every_path(schema, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    for key in leaves(schema()):
        field = options._field_of(schema, key)
        if field.type not in (str, str | None, list[str]) or field.metadata["choices"]:
            continue
        name, several = key.rpartition(".")[2], field.type == list[str]
        loaded = options.load(schema, None, [f"{key}={'~/a,~/b' if several else '~/a'}"])
        value = leaves(loaded)[key]
        if name in PLAIN.split():
            assert value == (["~/a", "~/b"] if several else "~/a")
        else:
            assert value == ([f"{tmp_path}/a", f"{tmp_path}/b"] if several else f"{tmp_path}/a"), key


def test_the_home_is_known_in_files_and_in_configs_made_in_python(tmp_path, monkeypatch, command):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "config.yaml").write_text("train: {output: ~/run}\nteacher: {adapters: [~/a, '~/b']}")
    loaded = options.load(TrainConfig, "~/config.yaml")
    assert (loaded.train.output, loaded.teacher.adapters) == (f"{tmp_path}/run", [f"{tmp_path}/a", f"{tmp_path}/b"])
    own = TrainConfig()
    own.train.output, own.data.responses = pathlib.Path("~/run"), tmp_path / "responses.jsonl"
    options.require(own, "train.output")
    assert (own.train.output, own.data.responses) == (f"{tmp_path}/run", f"{tmp_path}/responses.jsonl")
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(name)
    for source in ("~/texts/a.txt,~/texts/b.txt", "~/texts", "~/texts/*.txt"):
        assert [row.text for row in Corpus(source).read()] == ["a", "b"]


# Configs made in Python

WRONG = [
    (config.TrainSettings(steps=-5), "train.steps=-5: expected an integer >= 0"),
    (config.TrainSettings(steps="many"), "train.steps='many': expected an integer"),
    (config.TrainSettings(steps=1.5), "train.steps=1.5: expected an integer"),
    (config.TrainSettings(steps=True), "train.steps=True: expected an integer"),
    (config.TrainSettings(steps=None), "train.steps=None: expected an integer"),
    (config.TrainSettings(remat="all"), "train.remat=all: unknown"),
    (config.TrainSettings(overwrite="no"), "train.overwrite='no': expected true or false"),
    (config.OptimizerConfig(learning_rate=float("nan")), "optimizer.learning_rate=nan: expected a number >= 0"),
    (config.OptimizerConfig(learning_rate="1e-3"), "optimizer.learning_rate='1e-3': expected a number"),
    (config.OptimizerConfig(weight_decay=np.float32("inf")), "optimizer.weight_decay=inf: expected a number >= 0"),
    (config.TeacherConfig(adapters="a"), "teacher.adapters='a': expected a list of text"),
    (config.TeacherConfig(adapters=[1]), "teacher.adapters=.1.: expected a list of text"),
    (config.TeacherConfig(whiten=2), "teacher.whiten=2: expected a number >= 0 and <= 1"),
    (config.KernelsConfig(attention="flash"), "kernels.attention=flash: unknown"),
    (config.BackboneConfig(dtype="int4"), "backbone.dtype=int4: unknown"),
    (config.BackboneConfig(path=5), "backbone.path=5: expected text"),
    (config.DataConfig(answer_suffix=b"x" * 500), "data.answer_suffix=b'x{78}…: expected text"),
    ({"steps": 5}, "train: expected a TrainSettings, found"),
]


@pytest.mark.parametrize("section, expected", WRONG, ids=[expected for _, expected in WRONG])
def test_configs_made_in_python_are_checked_like_words(section, expected, tmp_path):
    name = next((field.name for field in dataclasses.fields(TrainConfig) if field.type is type(section)), "train")
    own = TrainConfig(**{name: section})
    if name != "data":
        own.data.responses = str(tmp_path / "none.jsonl")
    if type(own.train) is config.TrainSettings:
        own.train.output = str(tmp_path / "run")
    with pytest.raises(InputError, match=expected.replace("(", r"\(")):
        train(own)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["respond", "synthesize", "encode", "evaluate", "build_index", "plan", "quickstart"])
def test_every_entry_checks_its_config(name, tmp_path):
    from llm2vec_gen_jax.evaluation import evaluate
    from llm2vec_gen_jax.experiments import quickstart
    from llm2vec_gen_jax.inference import respond, synthesize
    from llm2vec_gen_jax.lens import index
    from llm2vec_gen_jax.planning import plan
    from llm2vec_gen_jax.serving import encode_corpus

    entries = {
        "respond": lambda: respond.respond(config.RespondConfig(batch_size=-1)),
        "synthesize": lambda: synthesize.synthesize(config.SynthesizeConfig(batch_size=-1)),
        "encode": lambda: encode_corpus.encode_corpus("x", config.EncodeConfig(batch_size=-1)),
        "evaluate": lambda: evaluate.evaluate("x", config.EvaluateConfig(batch_size=-1)),
        "build_index": lambda: index.build_index("x", config.BuildIndexConfig(batch_size=-1)),
        "plan": lambda: plan.estimate(config.PlanConfig(train=config.TrainSettings(batch_size=-1))),
        "quickstart": lambda: quickstart.quickstart(config.QuickstartConfig(batch_size=-1)),
    }
    with pytest.raises(InputError, match="batch_size=-1: expected an integer >= 1"):
        entries[name]()


def test_numbers_of_numpy_are_numbers():
    options.check(config.TrainSettings(steps=np.int64(3), ridge_examples=np.int32(0)))
    options.check(config.OptimizerConfig(learning_rate=np.float32(0.5), weight_decay=0))
