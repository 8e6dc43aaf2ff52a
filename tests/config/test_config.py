"""Configuration: the YAML files of configs/, misspelt keys, wrong types, verbatim text, help, and no dead keys."""

import dataclasses
import pathlib
import re
import shlex
import sys

import hypothesis
import numpy as np
import pytest
import yaml
from hypothesis import strategies as st
from omegaconf import OmegaConf

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common import yaml_files
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import RespondConfig, SynthesizeConfig, TeacherTrainConfig, TrainConfig, options
from llm2vec_gen_jax.config import help as help_lib
from llm2vec_gen_jax.evaluation import instructions
from llm2vec_gen_jax.training.train import train
from tests.conftest import write_jsonl
from tests.helpers.tasks import write_task

CONFIGS = sorted((pathlib.Path(__file__).parents[2] / "configs").glob("*.yaml"))
SCHEMAS = [
    value
    for name, value in vars(config).items()
    if name.endswith("Config") and dataclasses.is_dataclass(value) and "launch" in (value.__doc__ or "")
]
# Printable text with what means something to a shell, YAML, JSON or OmegaConf drawn often.
TEXT = st.text(st.one_of(st.sampled_from("${}\\=:?#'\"[], \n"), st.characters(exclude_categories=["Cs"])))
TEXT = TEXT.filter(lambda text: text != "???" and text[:1] != "~")
# What PyYAML writes and reads back: not the rarer line separators.
YAML_TEXT = TEXT.filter(lambda text: not set(text) & set("\x85\u2028\u2029"))


def leaves(value, prefix=""):
    """{dotted key: value} of a config."""
    found = {}
    for field in dataclasses.fields(value):
        inner = getattr(value, field.name)
        nested = dataclasses.is_dataclass(inner)
        found |= leaves(inner, f"{prefix}{field.name}.") if nested else {prefix + field.name: inner}
    return found


def load_yaml(folder, text, schema=TrainConfig):
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return options.load(schema, file)


# The files of configs/


def test_there_are_config_files():
    assert len(CONFIGS) >= 10


@pytest.mark.parametrize("schema", [TrainConfig, RespondConfig, SynthesizeConfig])
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_file_serves_every_command(file, schema):
    loaded = leaves(options.load(schema, file))
    given = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert loaded["backbone.path"] == given["backbone"]["path"]
    if schema is TrainConfig:
        assert loaded["train.steps"] == given["train"]["steps"]
    assert file.read_text(encoding="utf-8").startswith("# python -m launch."), "opens with the command that runs it"


def test_the_config_of_the_shipped_teacher_is_read():
    file = CONFIGS[0].parent / "teachers" / "smollm2-135m.yaml"
    assert options.load(TeacherTrainConfig, file).mntp.schedule_steps == 400


# Mistakes


@pytest.mark.parametrize(
    "key, text, expected",
    [
        ("train.steps", "lots", "an integer, found 'lots'"),
        ("train.steps", "1.5", "an integer, found '1.5'"),
        ("train.steps", "", "an integer, found ''"),
        ("num_processes", "two", "an integer, found 'two'"),
        ("optimizer.learning_rate", "fast", "a number, found 'fast'"),
        *(
            ("train.overwrite", text, f"true or false, found '{text}'")
            for text in ("maybe", "2", "1", "0", "-1", "1.0", "yes", "no", "On", "off", "y", "", " true", "null")
        ),
    ],
)
def test_a_value_of_another_type_is_named_with_what_is_expected(tmp_path, key, text, expected):
    with pytest.raises(InputError, match=f"^command line: {key}: expected {expected}$"):
        options.load(TrainConfig, None, [f"{key}={text}"])
    section, _, name = key.rpartition(".")
    line = f'{name}: "{text}"'
    with pytest.raises(InputError, match=f"config.yaml: {key}: expected {expected}$"):
        load_yaml(tmp_path, f"{section}: {{{line}}}" if section else line)


@pytest.mark.parametrize(
    "text, key, suggestion",
    [
        ("train: {stepz: 3}", "train.stepz", "'train.steps'"),
        ("trian: {steps: 3}", "trian", "'train'"),
        ("backbone: {dtpye: auto}", "backbone.dtpye", "'backbone.dtype'"),
        ("output: x", "output", "'train.output'"),
        ("train.steps: 3", "train.steps", "below `train:`"),
        ("qqqq: 1", "qqqq", "train.steps"),
        ("1: 2", "1", "known"),
    ],
)
def test_an_unknown_key_of_a_file_is_named_with_the_nearest(tmp_path, text, key, suggestion):
    with pytest.raises(InputError) as error:
        load_yaml(tmp_path, text)
    message = str(error.value)
    assert "config.yaml" in message and f"unknown key {key}" in message and suggestion in message


def test_a_command_checks_the_recipe_keys_that_it_does_not_use(tmp_path):
    kept = load_yaml(tmp_path, "backbone: {dtype: float16}\ntrain: {steps: 3}", RespondConfig)
    assert kept.backbone.dtype == "float16"
    with pytest.raises(InputError, match="train.stepz.*'train.steps'"):
        load_yaml(tmp_path, "train: {stepz: 3}", RespondConfig)
    with pytest.raises(InputError, match="teacher.kind=lm2vec"):
        load_yaml(tmp_path, "teacher: {kind: lm2vec}", SynthesizeConfig)
    with pytest.raises(InputError, match="unknown key shard"):
        load_yaml(tmp_path, "shard: {index: 1}")  # of respond and synthesize, not of the recipe


@pytest.mark.parametrize(
    "word, expected",
    [
        ("train.stepz=3", "train.stepz.*'train.steps'"),
        ("steps=3", "unknown key steps.*'train.steps'"),
        ("--train.steps=3", "'train.steps'"),
        ("train=3", "train.*a section.*train.steps"),
        ("train.steps.x=3", "train.steps.x"),
        ("=3", "unknown key"),
        ("train.steps", "expected key=value"),
    ],
)
def test_an_unknown_key_of_the_command_line_is_named_with_the_nearest(word, expected):
    with pytest.raises(InputError, match=expected):
        options.load(TrainConfig, None, [word])


@pytest.mark.parametrize(
    "key, value",
    [
        ("train.steps", "many"),
        ("train.steps", "1.5"),
        ("train.steps", "null"),
        ("train.steps", "[1]"),
        ("train.steps", "{a: 1}"),
        ("train.steps", "true"),
        ("train.overwrite", "maybe"),
        ("optimizer.learning_rate", "fast"),
        ("optimizer.learning_rate", ".nan"),
        ("optimizer.learning_rate", ".inf"),
        ("train.batch_size", "0"),
        ("train.log_every", "0"),
        ("data.seed", "-1"),
        ("mesh.data", "-2"),
        ("teacher.adapters", "one"),
        ("teacher.adapters", "{a: b}"),
        ("teacher.adapters", "[{a: b}]"),
        ("data.split", "true"),
        *(("train.overwrite", value) for value in ("2", "1", "0", "yes", "no", "1.0", "!!int 1", "[true]", "{}")),
        ("data.split", "[a]"),
        ("data.split", "'???'"),
    ],
)
def test_a_wrong_value_of_a_file_is_named(tmp_path, key, value):
    section, name = key.split(".")
    with pytest.raises(InputError, match=key):
        load_yaml(tmp_path, f"{section}: {{{name}: {value}}}")


@pytest.mark.parametrize(
    "word",
    [
        "train.steps=many",
        "train.steps=1.5",
        "train.steps=",
        "train.steps=-1",
        "train.overwrite=maybe",
        "optimizer.learning_rate=nan",
        "teacher.adapters=[a",
        "teacher.adapters=[1]",
        "backbone.path=???",
    ],
)
def test_a_wrong_value_of_the_command_line_is_named(word):
    with pytest.raises(InputError, match=word.partition("=")[0]):
        options.load(TrainConfig, None, [word])


@pytest.mark.parametrize("schema", [schema for schema in SCHEMAS if schema is not config.VerifyConfig])
def test_an_unknown_choice_is_named_with_the_nearest(schema):
    fields = [key for key in leaves(schema()) if key.endswith("dtype")]
    for key in fields:
        with pytest.raises(InputError, match=f"{key}=flaot32.*'float32'"):
            options.load(schema, None, [f"{key}=flaot32"])
    assert fields or schema is config.InstructConfig


@pytest.mark.parametrize("text", ["- a", "just text", "a: b: c", "a: !!python/object:os.system x", "\x00"])
def test_a_file_that_is_no_mapping_is_named(tmp_path, text):
    with pytest.raises(InputError, match="config.yaml"):
        load_yaml(tmp_path, text)


WRITTEN = ("2026_11_28", "2026-11-28", "2026-11-28 10:00:00", "1e3", "1.0e+3", "0x10", "0o17", "010", "1:30", "1_000.5")
WRITTEN += (".inf", ".NaN", "=", "+5", "-0", "0b1", "12e03", "1.", "N/A", "None", "~/x/2026", "yes", "No", "on", "OFF")


@pytest.mark.parametrize("text", WRITTEN)
def test_text_of_a_file_is_what_is_written(tmp_path, text, monkeypatch):
    monkeypatch.setenv("HOME", "~")  # paths as they are, for once
    loaded = load_yaml(tmp_path, f"train: {{output: {text}}}\ndata:\n  split: {text}\n  answer_suffix: {text} # so\n")
    assert [loaded.train.output, loaded.data.split, loaded.data.answer_suffix] == [text] * 3
    loaded = load_yaml(tmp_path, f"teacher:\n  adapters:\n  - {text}\n  - [{text}]".replace("[", "").replace("]", ""))
    assert loaded.teacher.adapters == [text] * 2


@pytest.mark.parametrize("text", [*WRITTEN, "1e5", "on", "0123", "null", "~", "true", ""])
def test_text_that_is_written_is_text_to_every_reader(text):
    written = yaml_files.to_yaml({text: [text], "number": 1e-5})
    assert OmegaConf.create(written) == {text: [text], "number": 1e-5}  # a reader of YAML 1.2
    for loader in (yaml.SafeLoader, yaml_files._TextLoader, yaml.BaseLoader):
        assert yaml.load(written, loader)[text] == [text]


@pytest.mark.parametrize("text", ["true", "False", "!!int 5", "!!float 1", "!!binary aGk="])
def test_what_yaml_takes_for_something_else_is_to_be_quoted(tmp_path, text):
    for values in (f"train: {{output: {text}}}", f"data: {{split: {text}}}", f"teacher: {{adapters: [{text}]}}"):
        with pytest.raises(InputError, match=r"config.yaml: (train.output|data.split|teacher.adapters).*in quotes"):
            load_yaml(tmp_path, values)
    if not text.startswith("!"):
        assert load_yaml(tmp_path, f"data: {{split: '{text}'}}").data.split == text


@pytest.mark.parametrize(
    "text, steps", [("007", 7), ("1_000", 1000), ("'5'", 5), ("1:30", None), ("0x10", None), ("2026-11-28", None)]
)
def test_a_number_of_a_file_is_what_it_looks_like(tmp_path, text, steps):
    """YAML 1.1 would read 1:30 as 90, and 010 as 8."""
    if steps is None:
        with pytest.raises(InputError, match="train.steps"):
            load_yaml(tmp_path, f"train: {{steps: {text}}}")
    else:
        assert load_yaml(tmp_path, f"train: {{steps: {text}}}").train.steps == steps


def test_instructions_are_what_is_written(tmp_path):
    (tmp_path / "own.yaml").write_text("query:\n  2026_11: 1e3\n  Task: 2026-11-28\ndocument: 1:30\n")
    found = instructions.read(tmp_path / "own.yaml")
    assert (found.query, found.document) == ({"2026_11": "1e3", "Task": "2026-11-28"}, "1:30")


def test_a_missing_file_or_a_folder_is_named(tmp_path):
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            options.load(TrainConfig, path)


@pytest.mark.parametrize("text", ["", "{}", "# nothing\n", "train:\n", "train:\n  # steps: 3\n"])
def test_an_empty_file_or_section_is_the_defaults(tmp_path, text):
    assert load_yaml(tmp_path, text) == TrainConfig()


def test_the_command_line_overrides_the_file_which_overrides_the_defaults(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_text("train: {steps: 3, batch_size: 5}\noptimizer: {learning_rate: 1e-3}")
    words = ["train.steps=7", "teacher.adapters=a/b,c", "data.shuffle=false", "train.output=null"]
    loaded = options.load(TrainConfig, file, words)
    assert (loaded.train.steps, loaded.train.batch_size, loaded.train.seed) == (7, 5, TrainConfig().train.seed)
    assert loaded.optimizer.learning_rate == 1e-3
    assert loaded.teacher.adapters == ["a/b", "c"]
    assert (loaded.data.shuffle, loaded.train.output) == (False, None)
    assert options.load(TrainConfig, None, ["teacher.adapters=[a, 'b,c']"]).teacher.adapters == ["a", "b,c"]


def test_require_names_the_key_and_what_it_is():
    with pytest.raises(InputError, match="train.output is required.*run directory"):
        options.require(TrainConfig(), "backbone.path", "train.output")
    options.require(TrainConfig(), "backbone.path")


# Text


@hypothesis.given(TEXT)
def test_text_of_the_command_line_is_verbatim(text):
    assert options.load(TrainConfig, None, [f"backbone.path={text}"]).backbone.path == text


@hypothesis.given(
    st.lists(YAML_TEXT, min_size=4, max_size=4), st.lists(YAML_TEXT), st.floats(0, 1e300), st.integers(0, 2**32 - 1)
)
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_what_to_yaml_writes_loads_back_equal(tmp_path, texts, adapters, number, count):
    written = TrainConfig()
    written.backbone.path, written.data.responses, written.data.answer_suffix, written.train.output = texts
    written.teacher.adapters = adapters
    written.optimizer.learning_rate, written.train.seed = number, count
    assert load_yaml(tmp_path, options.to_yaml(written)) == written


# Help


@pytest.mark.parametrize("schema", SCHEMAS)
def test_help_lists_every_key_with_its_default(schema):
    expected = leaves(schema())
    for width in (60, 80, 120):
        text = help_lib.help_text(schema, width)
        assert max(map(len, text.splitlines())) <= width
        entries = [entry for entry in re.split(r"\n(?=  \S)|\n\n", text) if entry.startswith("  ")]
        assert sorted(entry.split("=")[0].strip() for entry in entries) == sorted(expected)
        for entry in entries:
            value = expected[key := entry.split("=")[0].strip()]
            default = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            default = f"[{', '.join(value)}]" if isinstance(value, list) else default
            start = f"  {key}={'...' if key in getattr(schema, 'REQUIRED', ()) else default}"
            assert entry.startswith(start) and len(entry.removeprefix(start).strip()) > 3, "says what the key is"


@pytest.mark.parametrize("schema", [schema for schema in SCHEMAS if hasattr(schema, "EXAMPLE")])
def test_the_example_of_the_help_has_all_that_is_required(schema):
    words = shlex.split(schema.EXAMPLE)
    loaded = options.load(schema, None, [word for word in words if "=" in word])
    options.require(loaded)
    for key in getattr(schema, "REQUIRED", ()):
        missing = options.load(schema, None, [word for word in words if "=" in word and not word.startswith(f"{key}=")])
        with pytest.raises(InputError, match=f"{key} is required: pass {key}="):
            options.require(missing)
    for width in (60, 80):
        text = help_lib.example_text("python -m launch.x", schema.EXAMPLE, width)
        assert max(map(len, text.splitlines())) <= width
        assert shlex.split(text.replace("\\\n", ""))[4:] == words


# Dead keys. (Those without a section say how processes are joined: many processes test them.)

SECTIONS = [field.type for field in dataclasses.fields(TrainConfig) if dataclasses.is_dataclass(field.type)]


@pytest.fixture
def keys_read(monkeypatch):
    """The (section class, key) pairs that the package itself reads from configs."""
    seen = set()

    def spy(cls):
        names, read = {field.name for field in dataclasses.fields(cls)}, object.__getattribute__

        def attribute(self, name):
            if name in names:
                module = sys._getframe(1).f_globals["__name__"]
                if module.startswith("llm2vec_gen_jax.") and module != "llm2vec_gen_jax.config.options":
                    seen.add((cls, name))
            return read(self, name)

        monkeypatch.setattr(cls, "__getattribute__", attribute)

    for section in SECTIONS:
        spy(section)
    return seen


def test_training_reads_every_key_of_its_config(tmp_path, tiny_folder, keys_read):
    columns = ("question", "answer", "negative_question", "negative_answer")
    rows = [{name: f"{name} {number}" for name in columns} for number in range(8)]
    write_jsonl(tmp_path / "responses.jsonl", rows)
    np.save(tmp_path / "targets.npy", np.zeros((8, 4), np.float32))
    words = [
        f"backbone.path={tiny_folder('qwen3')}",
        f"data.responses={tmp_path / 'responses.jsonl'}",
        "train.steps=1",
        "train.batch_size=8",
        f"train.output={tmp_path / 'run'}",
    ]
    file_teacher = ["train.overwrite=true", "teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}"]
    supervised = [
        "train.overwrite=true",
        "lora.rank=1",
        *(f"loss.{name}=1" for name in ("repeat", "negative", "margin", "contrastive")),
        f"validation.responses={tmp_path / 'responses.jsonl'}",
        f"validation.tasks={write_task(tmp_path / 'task', 'safety_retrieval')}",
    ]
    for more in (file_teacher, supervised):
        train(options.load(TrainConfig, None, [*words, *more]), False)
    (tmp_path / "empty").mkdir()
    embedder = ["train.overwrite=true", "teacher.kind=sentence_transformers", f"teacher.path={tmp_path / 'empty'}"]
    with pytest.raises(InputError, match="sentence.transformers"):
        train(options.load(TrainConfig, None, [*words, *embedder]), False)
    assert keys_read == {(section, field.name) for section in SECTIONS for field in dataclasses.fields(section)}
