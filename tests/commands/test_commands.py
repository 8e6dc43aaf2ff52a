"""Commands as a user runs them: help, one-line errors, and the quickstart."""

import json
import logging
import os
import pathlib
import re
import shutil

import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen, config
from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.common import files
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.config.help import help_text
from tests.conftest import check_error, write_jsonl
from tests.helpers import commands
from tests.helpers.commands import rows_of
from tests.helpers.embedders import K

ROOT = pathlib.Path(__file__).parents[2]
FILES = {path.stem for path in (ROOT / "launch").glob("*.py")} - {"__init__", "__main__", "convert", "lens"}
ACTIONS = {"convert": ("from_pytorch", "to_pytorch", "verify")}
ACTIONS |= {"lens": ("logit", "build_index", "query", "generations", "report")}
COMMANDS = sorted(FILES | {f"{name} {action}" for name, actions in ACTIONS.items() for action in actions})


def schema_of(command):
    """The config dataclass whose docstring describes `python -m launch.COMMAND`."""
    schemas = [value for name, value in vars(config).items() if name.endswith("Config")]
    return next(value for value in schemas if f"launch.{command} " in value.__doc__.replace("`", " ").split(":")[0])


def test_what_the_library_logs_is_printed_during_a_command_only(capsys):
    logger = logging.getLogger("llm2vec_gen_jax.training.train")
    with cli._shown_messages():
        logger.info("already finished")
        logger.warning("damaged (100%)")
    logger.info("not shown")
    assert capsys.readouterr() == ("already finished\ndamaged (100%)\n", "")
    library = logging.getLogger("llm2vec_gen_jax")
    assert not library.handlers and library.propagate and library.level == logging.NOTSET


# Help and errors


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_command_does_and_lists_every_key(command, name):
    code, out, _ = command(name, "--help")
    schema = schema_of(name)
    about = schema.__doc__.splitlines()[0].split("`: ", 1)[1]
    assert code == 0
    assert f"usage: python -m launch.{name} " in out and about[1:] in " ".join(out.split())
    assert f"example:\n  python -m launch.{name} " in out
    assert help_text(schema) in out
    assert command(name, "-h", "nonsense=1")[:2] == (0, out)


@pytest.mark.parametrize("name", ACTIONS)
def test_help_of_a_command_with_actions_lists_them(command, name):
    code, out, _ = command(name, "--help")
    lines = {line.split()[0]: line for line in out.splitlines() if line.startswith("  ") and line[2] != " "}
    assert code == 0 and tuple(lines) == ACTIONS[name] and "ACTION --help" in out
    assert all(len(line.split()) > 3 for line in lines.values())
    assert command(name)[:2] == (0, out)


@pytest.mark.parametrize("width", ["60", "80"])
@pytest.mark.parametrize("name", [*COMMANDS, *ACTIONS])
def test_help_is_wrapped_at_the_width_of_the_terminal(command, monkeypatch, name, width):
    monkeypatch.setenv("COLUMNS", width)
    assert max(map(len, command(name, "--help")[1].splitlines())) <= int(width)


@pytest.mark.parametrize("words", [["train", "--help"], ["lens", "--help"]])
def test_help_whose_reader_has_closed_the_pipe_gives_no_traceback(launch, tmp_path, words):
    read, write = os.pipe()
    os.close(read)
    process = launch(tmp_path, *words, stdout=write)
    os.close(write)
    assert process.communicate(timeout=60)[1] == "" and process.returncode == 0


@pytest.mark.parametrize(
    "words, expected",
    [
        (["train", "--steps", "5"], "without dashes: train.steps=5"),
        (["train", "--train.steps=5", "--learning-rate", "1e-3"], ": train.steps=5 optimizer.learning_rate=1e-3"),
        (["train_teacher", "--steps=5"], ": mntp.steps=5 or simcse.steps=5"),
        (["encode", "MODEL", "--normalize", "--output", "vectors"], ": normalize=true output=vectors"),
        (["lens", "logit", "MODEL", "--txet", "a"], ": text=a"),
        (["train", "-q"], ": unknown key q"),
        (["train", "steps=5"], "unknown key steps, did you mean 'train.steps'?"),
    ],
)
def test_arguments_in_the_style_of_gnu_are_named_as_keys(command, words, expected):
    check_error(command(*words), expected)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_misspelt_key_is_named_with_the_nearest(command, name):
    key = options._leaves(schema_of(name))[0]
    model = ["MODEL"] if "MODEL" in schema_of(name).__doc__ else []
    check_error(command(name, *model, f"{key}x=1"), f"unknown key {key}x", f"did you mean {key!r}")
    expected = "more: no such config file" if name == "ablate" else "expected one"
    check_error(command(name, *model, "more", "words"), expected)
    assert os.listdir() == []


@pytest.mark.parametrize(
    "words, expected",
    [
        (["train"], ["data.responses is required", "data.responses="]),
        (["train", "data.responses=r.jsonl"], ["train.output is required"]),
        (["train", "data.responses=none.jsonl", "train.output=run"], ["data.responses=none.jsonl: no such file"]),
        (["train", "none.yaml"], ["none.yaml: no such config file"]),
        (["train", "train.steps=x"], ["train.steps", "'x'"]),
        (["ablate", "train.output=runs"], ["CONFIG... is missing"]),
        (["respond", "output=a.jsonl"], ["input is required"]),
        (["respond", "input=none.jsonl", "output=a.jsonl"], ["none.jsonl: no such file"]),
        (["respond", "input=none.jsonl", "output=a.txt"], ["a.txt", ".jsonl"]),
        (["respond", "input=none.jsonl", "output=a.jsonl", "shard.index=2", "shard.count=2"], ["shard.index=2"]),
        (["synthesize"], ["output is required"]),
        (["synthesize", "output=a.jsonl", "backbone.path=none"], ["none: no such file or folder"]),
        (["encode"], ["MODEL is missing"]),
        (["encode", "nowhere", "output=a"], ["input is required"]),
        (["encode", "nowhere", "input=none.txt", "output=a"], ["none.txt: no such file"]),
        (["decode", "nowhere"], ["text=, input= and soft_prompts="]),
        (["decode", "nowhere", "text=a", "input=b"], ["text and input"]),
        (["decode", "nowhere", "soft_prompts=none.npy"], ["none.npy"]),
        (["decode", "nowhere", "text=a"], ["nowhere"]),
    ],
)
def test_a_missing_input_is_named(command, words, expected):
    check_error(command(*words), *expected)
    assert set(os.listdir()) <= {"run"}


def broken(source, folder, how):
    """A copy of a backbone's folder with one thing wrong. Returns what the message must name."""
    shutil.copytree(source, folder)
    file, settings = folder / "config.json", json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "family":
        file.write_text(json.dumps(settings | {"model_type": "mamba"}))
        return file, "model_type 'mamba' is not supported"
    if how == "field":
        file.write_text(json.dumps({key: value for key, value in settings.items() if key != "intermediate_size"}))
        return file, "intermediate_size is missing"
    if how == "no config":
        file.unlink()
        return file, "no such file"
    if how == "half config":
        file.write_text(file.read_text()[:50])
        return file, "not valid JSON"
    if how == "table":
        file.write_text(json.dumps(settings | {"vocab_size": 100}))
        return folder, "the tokenizer has id 259", "only 100 rows"
    if how == "shape":
        file.write_text(json.dumps(settings | {"intermediate_size": 40}))
        return folder, "has shape", "the config expects"
    if how == "layers":
        file.write_text(json.dumps(settings | {"num_hidden_layers": 4}))
        return folder, "weights are missing, the first is model.layers.3."
    if how == "activation":
        file.write_text(json.dumps(settings | {"hidden_act": "gelu"}))
        return file, "hidden_act='gelu' is not supported"
    if how == "index":
        weights.unlink()
        index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder / "model-00001-of-00002.safetensors", "no such file"
    if how == "outside":
        weights.rename(folder.parent / "elsewhere.safetensors")
        index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder / "model.safetensors.index.json", "outside its folder"
    if how == "no weights":
        weights.unlink()
        return folder, "no model.safetensors"
    if how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return weights, "damaged or truncated"
    if how == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        return weights, "damaged or truncated"
    if how == "tokenizer":
        (folder / "tokenizer.json").write_text("{}")
        return folder, "no readable tokenizer"
    raise ValueError(how)


HOWS = (
    "family,field,no config,half config,table,shape,layers,activation,index,outside,no weights,truncated,pointer,"
    "tokenizer"
)


@pytest.mark.parametrize("how", HOWS.split(","))
def test_a_broken_backbone_is_named(command, talker_folder, tmp_path, how):
    expected = broken(talker_folder, tmp_path / "backbone", how)
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"question": "a"}])
    words = [f"backbone.path={tmp_path / 'backbone'}", f"input={queries}", "output=answers.jsonl"]
    check_error(command("respond", *words), *expected)
    assert os.listdir() == []


def test_a_broken_input_is_named(command, model_folder, talker_folder, tmp_path):
    (tmp_path / "queries.jsonl").write_text('{"question": "a"}\n{"qestion": "b"}\n')
    words = [f"backbone.path={talker_folder}", "output=answers.jsonl"]
    result = command("respond", f"input={tmp_path / 'queries.jsonl'}", *words)
    check_error(result, "queries.jsonl, line 2", "'question'", "'qestion'")
    twice = write_jsonl(tmp_path / "twice.jsonl", [{"question": "a", "id": 1}, {"question": "b", "id": 1}])
    check_error(command("respond", f"input={twice}", *words), "twice.jsonl: the ids are not unique")
    lists = write_jsonl(tmp_path / "lists.jsonl", [{"question": "a", "id": [1]}])
    check_error(command("respond", f"input={lists}", *words), "lists.jsonl, line 1", "'id'")
    np.save("prompts.npy", np.zeros((2, K, 5), np.float32))
    check_error(command("decode", model_folder, "soft_prompts=prompts.npy"), f"(n, {K}, 32)", "(2, 3, 5)")
    np.save("words.npy", np.full((2, K, 32), "a"))
    check_error(command("decode", model_folder, "soft_prompts=words.npy"), "must be numbers", "<U1")
    for name, content in (("empty.npy", b""), ("text.npy", b"text")):
        pathlib.Path(name).write_bytes(content)
        check_error(command("decode", model_folder, f"soft_prompts={name}"), f"soft_prompts={name}")


def test_an_existing_output_is_named_and_left_as_it_is(command, model_folder, talker_folder, tmp_path):
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"question": "a"}])
    mine = pathlib.Path("mine.jsonl")
    mine.write_text("mine")
    pathlib.Path("folder").mkdir()
    (pathlib.Path("folder") / "mine").write_text("mine")
    backbone = f"backbone.path={talker_folder}"
    check_error(command("respond", backbone, f"input={queries}", "output=mine.jsonl"), "mine.jsonl: exists")
    check_error(command("synthesize", backbone, "output=mine.jsonl"), "mine.jsonl: exists")
    check_error(command("encode", model_folder, f"input={queries}", "output=folder"), "output=folder: exists")
    words = ["data.responses=none.jsonl", "train.output=folder", "train.overwrite=true"]
    check_error(command("train", *words), "train.output=folder: exists and is not a run directory")
    assert sorted(os.listdir()) == ["folder", "mine.jsonl"] and os.listdir("folder") == ["mine"]
    assert mine.read_text() == "mine"


def test_what_a_system_puts_into_a_folder_does_not_make_it_anothers(command, model_folder, tiny_folder):
    for folder in ("out", "run"):
        os.mkdir(folder)
        for name in (".DS_Store", "._out", "Thumbs.db", ".nfs0000000000000001"):
            pathlib.Path(folder, name).touch()
    commands.succeed(commands.encode(command, model_folder, ["a"]))
    for _ in range(2):
        commands.succeed(commands.train(command, tiny_folder("llama"), commands.RESPONSES))
        pathlib.Path("run/checkpoints/.DS_Store").touch()
    os.mkdir("mine")
    pathlib.Path("mine", "notes.txt").touch()
    check_error(commands.encode(command, model_folder, ["a"], "output=mine"), "holds other files")
    check_error(commands.train(command, tiny_folder("llama"), commands.RESPONSES, "train.output=mine"), "mine")


def test_a_loss_that_is_not_finite_is_a_failure_with_one_line(command, talker_folder, tmp_path):
    rows = [{"question": f"q{number}", "answer": "a"} for number in range(8)]
    write_jsonl(tmp_path / "responses.jsonl", rows)
    np.save(tmp_path / "targets.npy", np.full((8, 2), 3e38, np.float32))
    words = [f"backbone.path={talker_folder}", f"data.responses={tmp_path / 'responses.jsonl'}"]
    words += ["teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}", "train.output=run", "train.batch_size=8"]
    code, _, errors = command("train", *words)
    assert code == 1 and "Traceback" not in errors
    assert errors.strip().splitlines()[-1].startswith("error: step 1: the loss is inf")


def test_a_real_process_says_the_same(talker_folder, tmp_path, launch):
    expected = broken(talker_folder, tmp_path / "backbone", "truncated")
    queries = write_jsonl(tmp_path / "queries.jsonl", [{"question": "a"}])
    words = [f"backbone.path={tmp_path / 'backbone'}", f"input={queries}", "output=answers.jsonl"]
    bad, good = launch(tmp_path, "respond", *words), launch(tmp_path, "respond", "--help")
    out, errors = bad.communicate(timeout=60)
    check_error((bad.returncode, out, errors), *expected)
    assert errors.count("\n") == 1
    out, errors = good.communicate(timeout=60)
    assert (good.returncode, errors) == (0, "") and help_text(config.RespondConfig, 80) in out


# Responses and queries


def test_quickstart_goes_from_nothing_to_a_model_and_resumes(command, talker_folder):
    words = [f"backbone.path={talker_folder}", "output=quick", "queries=16", "steps=4", "max_new_tokens=16"]
    check_error(command("quickstart", *words, "queries=7"), "queries=7: too few for batches of 8")
    assert os.listdir() == []
    code, out, errors = command("quickstart", *words)
    assert code == 0, errors
    assert {"queries.jsonl", "responses.jsonl", "run"} <= set(os.listdir("quick"))
    assert len(rows_of("quick/queries.jsonl")) == len(rows_of("quick/responses.jsonl")) == 16
    assert re.search(r"^four stages, about \d+ min on this CPU", out, re.MULTILINE)  # the number is a measurement
    for part in ("a1: The capital of France is Paris", "  a4: ", "decoded:"):
        assert part in out
    next_ = out[out.index("  python -m launch.lens report quick/run/model") :].replace("\\\n", "").split("\n")[0]
    assert command("lens", *next_.split()[3:], "limit=2", "max_new_tokens=4")[0] == 0
    assert os.path.getsize("quick/report.html") > 1000
    assert max(map(len, out.splitlines())) <= 80
    assert LLM2VecGen.from_pretrained("quick/run/model").encode(["a", "b"]).shape == (2, 32)
    before = files.sha256_file("quick/run/model/alignment_mlp")
    code, out, errors = command("quickstart", *words)
    assert code == 0 and "already finished" in out, errors
    pathlib.Path("quick/notes.txt").write_text("mine")
    check_error(command("quickstart", *words, "overwrite=true"), "not written by quickstart (found notes.txt)")
    shutil.copytree("quick", "data", ignore=shutil.ignore_patterns("run*", "*.run.json", "responses*", "notes.txt"))
    check_error(command("quickstart", *words, "output=data", "overwrite=true"), "not written by quickstart and is not")
    assert files.sha256_file("quick/run/model/alignment_mlp") == before
