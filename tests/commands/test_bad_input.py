"""Bad input as users meet it, on the command line: every class of it, and the tests that show what happens.

 1  texts that quote trained tokens (<question1>): test_bad_input.py::test_a_quoted_token_is_text
 2  texts that quote control tokens (<|im_end|>): test_bad_input.py::test_a_quoted_token_is_text
 3  empty texts: test_bad_input.py::test_empty_texts_are_encoded_and_counted,
    test_bad_input.py::test_empty_answers_are_left_out
 4  texts that are too long: test_bad_input.py::test_a_long_text_is_cut_and_counted
 5  values that are no strings: test_bad_input.py::test_a_bad_row_is_named,
    test_bulk_faults.py::test_bad_input_is_a_one_line_error_and_leaves_nothing
 6  what is not UTF-8, lone surrogates: test_bad_input.py::test_a_bad_row_is_named,
    test_bad_input.py::test_a_bad_word_of_the_command_line_is_named,
    test_bulk_faults.py::test_bad_input_is_a_one_line_error_and_leaves_nothing
 7  missing columns: test_bad_input.py::test_a_bad_row_is_named,
    test_bulk_faults.py::test_bad_input_is_a_one_line_error_and_leaves_nothing
 8  a loss that is not finite: test_commands.py::test_a_loss_that_is_not_finite_is_a_failure_with_one_line,
    test_train.py::test_a_step_with_a_loss_that_is_not_finite_changes_nothing
 9  nothing to predict, an end token that is also the padding:
    test_bad_folders.py::test_an_end_that_also_pads_is_learnt,
    test_bad_input.py::test_empty_answers_are_left_out, test_losses.py::test_empty_answers_weigh_nothing
10  damaged weights: test_bad_folders.py::test_damaged_weights_of_a_backbone_are_named,
    test_bad_folders.py::test_damaged_weights_of_a_model_are_named,
    test_bad_folders.py::test_damaged_soft_prompts_and_adapters_are_named,
    test_commands.py::test_a_broken_backbone_is_named
11  tokenizers and configs that do not fit: test_bad_folders.py::test_a_tokenizer_of_another_model_is_refused,
    test_bad_folders.py::test_a_senseless_config_of_a_backbone_is_named,
    test_commands.py::test_a_broken_backbone_is_named
12  files that run code when unpickled: test_bad_folders.py::test_no_pickle_is_run,
    test_torchzip.py::test_any_change_of_a_pickle_gives_tensors_or_is_refused
13  paths that lead out of a folder: test_bad_folders.py::test_no_path_leads_out_of_a_folder,
    test_commands.py::test_a_broken_backbone_is_named
14  folders that bring code along: test_bad_folders.py::test_code_of_a_folder_is_not_run
15  careless YAML, secrets: test_bad_input.py::test_careless_yaml_is_named,
    test_bad_input.py::test_odd_names_survive_and_secrets_are_not_written,
    test_commands.py::test_a_misspelt_key_is_named_with_the_nearest
16  torn files: test_respond.py::test_a_killed_respond_started_again_loses_and_repeats_nothing,
    test_bulk_faults.py::test_a_resumed_run_writes_the_same_bytes,
    test_chaos.py::test_training_survives_every_kind_of_fault
17  rows that do not divide over shares: test_bad_input.py::test_more_shares_than_rows_are_the_whole,
    test_multihost.py::test_joined_processes_encode_a_share_each
18  disks that are full, outputs that cannot be written:
    test_bad_input.py::test_a_full_disk_is_named_and_leaves_no_half,
    test_bad_input.py::test_an_output_that_cannot_be_is_named, test_chaos.py::test_training_survives_every_kind_of_fault
19  processes of one run that differ: test_multihost.py::test_processes_that_do_not_agree_say_so
20  ids that are there twice, counts that differ: test_bad_input.py::test_counts_and_ids_must_fit,
    test_commands.py::test_a_broken_input_is_named
"""

import ast
import contextlib
import json
import os
import pathlib
import re
import resource
import shutil

import numpy as np
import pytest
from tokenizers import AddedToken

from llm2vec_gen_jax import LLM2VecGen, config, load_embeddings
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.training.loop import _Profile
from llm2vec_gen_jax.training.metrics import read_metrics
from tests.conftest import check_error, tiny_tokenizer, write_jsonl
from tests.helpers.commands import (
    RESPONSES,
    TRAIN,
    encode,
    losses,
    only_config,
    respond,
    rows_of,
    succeed,
    train,
    write_task,
)


def test_every_class_has_tests_that_exist():
    found = dict.fromkeys(range(1, 21), ())
    for number, about in re.findall(r"(?ms)^ ?(\d+)  (.*?)(?=^ ?\d|\Z)", __doc__):
        found[int(number)] = re.findall(r"(\w+\.py)::(\w+)", about)
    assert list(found) == list(range(1, 21)) and all(found.values())
    for file, name in {test for tests in found.values() for test in tests}:
        [path] = pathlib.Path(__file__).parents[1].rglob(file)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, f"{file}::{name}"


# Texts


def rename_tokens(folder, *changes):
    """Puts other names in the place of tokens, in all that a tokenizer saves: no id changes."""
    for path in folder.glob("*token*"), folder.glob("*.jinja"):
        for file in path:
            text = file.read_text(encoding="utf-8")
            for old, new in changes:
                text = text.replace(old, new)
            file.write_text(text, encoding="utf-8")


def test_a_quoted_token_is_text(command, tiny_folder, tmp_path):
    """A backbone whose tokenizer has tokens of these names does what one does for which they are names like any."""
    tokenizer = tiny_tokenizer()
    tokens = [AddedToken(f"<question{number}>", special=True, normalized=False) for number in range(1, 5)]
    tokenizer.add_tokens(tokens, special_tokens=True)
    quoted = "a<|im_end|><question1><question2><question3><question4>"
    assert len(tokenizer(quoted)["input_ids"]) == 6, "else this test shows nothing"
    found = []
    for name in ("known", "unknown"):
        backbone = tmp_path / name
        shutil.copytree(tiny_folder("llama"), backbone)
        tokenizer.save_pretrained(backbone)
        if name == "unknown":
            rename_tokens(backbone, ("<question", "<renamed"), ("<|", "<!"))
        succeed(respond(command, backbone, question=quoted))
        succeed(train(command, backbone, [row | {"question": quoted, "answer": quoted} for row in RESPONSES]))
        succeed(encode(command, "run/model", [quoted, "ordinary"]))
        decoded = succeed(command("decode", "run/model", f"text={quoted}", "max_new_tokens=4"))
        found.append((rows_of("answers.jsonl"), losses("run"), load_embeddings("out").tolist(), json.loads(decoded)))
        for path in ("run", "out"):
            shutil.rmtree(path)
        os.unlink("answers.jsonl")
    assert found[0] == found[1]
    assert found[0][0][0]["question"] == found[0][3]["text"] == quoted


def test_empty_texts_are_encoded_and_counted(command, model_folder):
    texts = ["", " \n", "a", ""]
    out = succeed(encode(command, model_folder, texts))
    assert "texts that are empty: 3" in out and "truncated" not in out
    found = load_embeddings("out")
    np.testing.assert_allclose(found, LLM2VecGen.from_pretrained(model_folder).encode(texts), atol=1e-5)
    assert np.isfinite(found).all() and np.abs(found[0] - found[2]).max() > 1e-3
    assert json.loads(succeed(command("decode", model_folder, "text=", "max_new_tokens=4")))["text"] == ""


def test_empty_answers_are_left_out(command, tiny_folder):
    backbone = tiny_folder("llama")
    check_error(train(command, backbone, [row | {"answer": " \n"} for row in RESPONSES]), "every answer is empty")
    assert only_config()
    out = succeed(train(command, backbone, [{"question": "q", "answer": " "}, *RESPONSES]))
    assert "left out 1 of 9 records: their answer is empty" in out
    with_empty = losses("run")
    succeed(train(command, backbone, RESPONSES, "train.output=without"))
    assert with_empty == losses("without") and np.isfinite(with_empty[0]["loss"])


def test_a_long_text_is_cut_and_counted(command, model_folder):
    room = 20 - 4  # tokens, and characters, beside the appended ones
    long = "abcdefgh" * 250_000
    out = succeed(encode(command, model_folder, [long, long[:room], "b"], "max_length=20"))
    assert "texts that are longer than max_length=20 and were truncated: 1\n" in out and "empty" not in out
    (shard,) = json.loads(pathlib.Path("out/manifest.json").read_text())["shards"]
    assert (shard["cut"], shard["empty"]) == (1, 0)
    found = load_embeddings("out")
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


# Rows


BAD_VALUES = {
    "null": ("null", "must be a string, found NoneType"),
    "number": ("1", "must be a string, found int"),
    "words": ('["a", "b"]', "must be a string, found list"),
    "surrogate": (r'"\ud800"', "has an unpaired surrogate"),
    "latin": (b'"caf\xe9"'.decode("utf-8", "surrogateescape"), "not UTF-8"),
    "missing": (None, ""),
}


@pytest.mark.parametrize("kind", BAD_VALUES)
@pytest.mark.parametrize("name", ["train", "respond", "decode", "evaluate"])
def test_a_bad_row_is_named(command, model_folder, tiny_folder, tmp_path, name, kind):
    """(The same for encode: test_bulk_faults.py.)"""
    value, message = BAD_VALUES[kind]
    column = {"train": "answer", "respond": "question"}.get(name, "text")
    lines = ['{"_id": "d0", "question": "a", "answer": "b", "text": "c"}']
    lines.append(
        lines[0].replace("d0", "d1").replace({"train": '"b"', "respond": '"a"'}.get(name, '"c"'), value or '"x"')
    )
    if value is None:
        lines[1] = lines[1].replace(f'"{column}"', f'"{column}s"')
    if name == "evaluate":
        folder = write_task(tmp_path / "task", lines)
        file, words = folder / "corpus.jsonl", [model_folder, f"tasks={folder}", "output=out"]
    else:
        file = tmp_path / "rows.jsonl"
        file.write_bytes("\n".join(lines).encode("utf-8", "surrogateescape"))
        words = {
            "train": [f"backbone.path={tiny_folder('llama')}", f"data.responses={file}", *TRAIN],
            "respond": [f"backbone.path={tiny_folder('llama')}", f"input={file}", "output=answers.jsonl"],
            "decode": [model_folder, f"input={file}", "output=decoded.jsonl"],
        }[name]
    named = "not UTF-8" if kind == "latin" else repr(column)
    check_error(command(name, *words), f"{file}, line 2: ", named, message)
    assert only_config() if name == "train" else os.listdir() == []


def test_a_bad_word_of_the_command_line_is_named(command, model_folder):
    """Bytes that are not UTF-8 come in as halves of surrogate pairs."""
    for name, key in (("decode", "text"), ("encode", "instruction"), ("evaluate", "query_instruction")):
        check_error(command(name, model_folder, f"{key}=caf\udce9"), f"command line: {key}='caf\\udce9'", "UTF-8")
    assert os.listdir() == []


def test_counts_and_ids_must_fit(command, model_folder, tiny_folder, tmp_path):
    folder = write_task(tmp_path / "task", ['{"_id": "d0", "text": "a"}', '{"_id": "d0", "text": "b"}'])
    result = command("evaluate", model_folder, f"tasks={folder}", "output=out")
    check_error(result, f"{folder / 'corpus.jsonl'}, line 2: the _id 'd0' is also in ", "line 1")
    assert os.listdir() == []
    for count in (7, 9):
        np.save(tmp_path / "targets.npy", np.ones((count, 5), np.float32))
        words = ["teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}"]
        result = train(command, tiny_folder("llama"), RESPONSES, *words)
        check_error(result, f"teacher.path={tmp_path / 'targets.npy'}", "8 rows of data.responses", f"({count}, 5)")
        assert only_config()


def test_more_shares_than_rows_are_the_whole(command, model_folder, tiny_folder, tmp_path):
    texts, count = ["a", "b b", "c"], 5
    queries = write_jsonl(tmp_path / "three.jsonl", [{"question": text, "text": text} for text in texts])
    words = {
        "respond": [f"backbone.path={tiny_folder('llama')}", f"input={queries}", "max_new_tokens=4", "batch_size=2"],
        "encode": [model_folder, f"input={queries}", "shard_size=1"],
    }
    for name, output in (("respond", "answers.jsonl"), ("encode", "out")):
        succeed(command(name, *words[name], f"output=whole-{output}"))
        for index in range(count):
            succeed(command(name, *words[name], f"output={output}", f"shard.index={index}", f"shard.count={count}"))
    parts = [row for file in sorted(pathlib.Path().glob("answers.*-of-00005.jsonl")) for row in rows_of(file)]
    assert [row["question"] for row in parts] == texts
    assert parts == sorted(rows_of("whole-answers.jsonl"), key=lambda row: row["id"])
    np.testing.assert_allclose(load_embeddings("out", verify=True), load_embeddings("whole-out"), atol=1e-5)


@pytest.mark.parametrize("grade", ["²", "٣" * 5000, "9" * 5000, "-1", "1.5", ""])
def test_a_grade_that_is_no_number_is_named(command, model_folder, tmp_path, grade):
    folder = write_task(tmp_path / "task")
    (folder / "qrels.tsv").write_text(f"q0\td0\t{grade}\n")
    result = command("evaluate", model_folder, f"tasks={folder}", "output=out")
    check_error(result, f"{folder / 'qrels.tsv'}, line 1: expected query-id, corpus-id and a whole number")
    assert os.listdir() == []


# Settings


@pytest.mark.parametrize("number", ["²", "9" * 5000, str(2**63), str(2**32), "1e400"])
def test_a_number_that_is_none_is_named(command, tmp_path, number):
    """Of a seed that is larger, JAX would keep the lower bits: that of another run."""
    for name, key in (("train", "train.seed"), ("train", "data.seed"), ("respond", "seed"), ("train", "train.steps")):
        check_error(command(name, f"{key}={number}"), f"{key.rpartition('.')[2]}")
    if number != str(2**32):
        check_error(command("plan", f"topology=cpu:{number}"), "topology=cpu:")
        with pytest.raises(InputError, match="train.profile="):
            _Profile(f"1:{number}", tmp_path)


@pytest.fixture
def no_files(tmp_path):
    """Paths of what is there and no file."""
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    return [str(tmp_path / "folder"), str(tmp_path / "pipe"), "/dev/zero", "/dev/null", f"{__file__}/x"]


def test_a_folder_or_a_device_is_no_file(command, model_folder, tiny_folder, tmp_path, no_files):
    backbone = f"backbone.path={tiny_folder('llama')}"
    data = f"data.responses={write_jsonl(tmp_path / 'rows.jsonl', RESPONSES)}"
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / "task.json").touch()
    task = f"tasks={tmp_path / 'task'}"
    for path in no_files:
        for name, *words in (
            ("train", path),
            ("train", backbone, f"data.responses={path}.jsonl" if "/dev" in path else f"data.responses={path}", *TRAIN),
            ("train", f"backbone.path={path}", data, *TRAIN),
            ("train", backbone, data, "teacher.kind=file", f"teacher.path={path}", *TRAIN),
            ("train", backbone, data, f"teacher.adapters={path}", *TRAIN),
            ("train", backbone, data, f"train.init_from={path}", *TRAIN),
            ("respond", backbone, f"input={path}", "output=answers.jsonl"),
            ("encode", model_folder, f"input={path}", "output=out"),
            ("encode", path, f"input={tmp_path / 'rows.jsonl'}", "output=out"),
            ("decode", model_folder, f"input={path}", "output=decoded.jsonl"),
            ("decode", model_folder, f"soft_prompts={path}"),
            ("evaluate", model_folder, task, f"instructions={path}", "output=out"),
            ("convert to_pytorch", path, "output=out"),
        ):
            check_error(command(name, *words), path)
        shutil.rmtree("run", ignore_errors=True)
    assert os.listdir() == []


# A command, and how it is called but for a path that is missing.
CALLS = {
    "train": (config.TrainConfig, "BACKBONE data.responses=ROWS train.output=run train.steps=1"),
    "train_teacher": (config.TeacherTrainConfig, "BACKBONE corpus.path=ROWS train.output=run"),
    "respond": (config.RespondConfig, "BACKBONE input=ROWS output=out.jsonl"),
    "synthesize": (config.SynthesizeConfig, "BACKBONE output=out.jsonl"),
    "instruct": (config.InstructConfig, "input=ROWS output=out.jsonl"),
    "encode": (config.EncodeConfig, "MODEL input=ROWS output=out"),
    "decode": (config.DecodeConfig, "MODEL"),
    "evaluate": (config.EvaluateConfig, "MODEL tasks=TASK output=out"),
    "convert from_pytorch": (config.FromPytorchConfig, "MODEL output=out"),
    "convert to_pytorch": (config.ToPytorchConfig, "MODEL output=out"),
    "convert verify": (config.VerifyConfig, "MODEL"),
    "lens logit": (config.LogitLensConfig, "MODEL"),
    "lens build_index": (config.BuildIndexConfig, "MODEL input=ROWS output=out"),
    "lens query": (config.QueryIndexConfig, "MODEL index=none"),
    "lens generations": (config.GenerationsConfig, "MODEL input=ROWS output=out.csv"),
    "lens report": (config.ReportConfig, "MODEL input=ROWS output=out.html"),
    "reproduce": (config.ReproduceConfig, "BACKBONE tasks=TASK"),
    "plan": (config.PlanConfig, "BACKBONE"),
}
MORE = {
    "teacher.path": "teacher.kind=file",
    "loss.repeat_instructions": "loss.repeat=1",
    "evaluate adapters": "kind=teacher",
    "lens query index": "text=a",
}
NOT_READ = (
    "plan train.init_from",
    "plan loss.repeat_instructions",
    "reproduce teacher.path",
    "convert verify python",
)  # the last is read at the end


@pytest.mark.parametrize("name", CALLS)
def test_a_missing_path_is_named_with_its_key(command, model_folder, tiny_folder, tmp_path, name):
    """Every key of every command that is a path to read."""
    schema, words = CALLS[name]
    rows = write_jsonl(tmp_path / "rows.jsonl", [row | {"text": "a"} for row in RESPONSES])
    replaced = {"MODEL": model_folder, "BACKBONE": f"backbone.path={tiny_folder('llama')}"}
    replaced |= {"ROWS": rows, "TASK": write_task(tmp_path / "task")}
    for key in options._leaves(schema):
        about = options._field_of(schema, key).metadata
        if not about["path"] or key.endswith(("output", "merged", "cache_dir")) or f"{name} {key}" in NOT_READ:
            continue
        given = [word for word in words.split() if not word.startswith((f"{key}=", key.split(".")[0].upper()))]
        given += [MORE.get(key, ""), MORE.get(f"{name} {key}", ""), f"{key}=./none.jsonl"]
        given = [re.sub("|".join(replaced), lambda match: str(replaced[match[0]]), word) for word in given if word]
        result = command(name, *given)
        check_error(result, f"error: {key}=", "none.jsonl")
        for folder in ("run", "runs"):
            shutil.rmtree(folder, ignore_errors=True)
    assert os.listdir() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train:\n  steps: 3\n  steps: 5\n", "duplicate key steps"),
        ("train: {steps: 3}\ntrain: {seed: 5}\n", "duplicate key train"),
        ("train: {output: a: b}", "not valid YAML"),
        ("train: {steps: [}", "not valid YAML"),
        ("train: {output: !!timestamp 2026-13-45}", "not valid YAML"),
        ("a: " + "[" * 5000, "not valid YAML"),
        ("train: {output: !!python/object/apply:os.system [x]}", "not valid YAML"),
        ('data: {split: "\\ud800"}', "data.split"),
        ("hub: {token: hf_secret}", "unknown key hub"),
    ],
)
def test_careless_yaml_is_named(command, tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    result = command("train", file)
    check_error(result, f"{file}: ", message)
    assert "hf_secret" not in result[2]
    if "not valid YAML" in message:
        (tmp_path / "task").mkdir()
        (tmp_path / "task" / "task.json").touch()
        check_error(
            command("evaluate", "model", f"tasks={tmp_path}", f"instructions={file}", "output=out"), f"{file}: "
        )
    assert os.listdir() == []


def test_odd_names_survive_and_secrets_are_not_written(command, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    backbone = tmp_path / "it's: odd #1, ${x} é"
    shutil.copytree(tiny_folder("llama"), backbone)
    succeed(train(command, backbone, RESPONSES, "data.answer_suffix=: #"))
    succeed(encode(command, "run/model", ["a"]))
    succeed(train(command, backbone, RESPONSES, "data.answer_suffix=: #", "train.steps=2"))  # the config reads back
    assert [row["step"] for row in read_metrics(pathlib.Path("run"))] == [1, 2]
    files = [path for path in pathlib.Path().rglob("*") if path.is_file()]
    assert len(files) > 20 and not [path for path in files if b"hf_secret" in path.read_bytes()]
    result = command("train", "train.token=hf_secret")
    check_error(result, "unknown key train.token")
    assert "hf_secret" not in result[2]


# Disks


@contextlib.contextmanager
def disk_of(size):
    """No file can be longer than `size` bytes: the error of a disk that is full, on a part of the way."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_leaves_no_half(command, model_folder, tiny_folder, tmp_path):
    texts = [f"text {number}" for number in range(100)]
    file = write_jsonl(tmp_path / "many.jsonl", [{"text": text, "question": text} for text in texts])

    def full(size, name, *words, expected):
        with disk_of(size):
            check_error(command(name, *words), f"error: {expected}: ", code=74)

    for kind in ("npy", "parquet"):
        words = (model_folder, f"input={file}", "output=out", f"format={kind}")
        full(1000, "encode", *words, expected=f"out/embeddings-00000.{kind}")
        assert os.listdir() == []
    full(1000, "decode", model_folder, f"input={file}", "output=a.jsonl", "max_new_tokens=4", expected="a.jsonl")
    full(1000, "convert from_pytorch", model_folder, "output=converted", expected="converted")
    full(20_000, "convert to_pytorch", model_folder, "merged=merged", expected="merged")
    assert os.listdir() == []
    folder = write_task(tmp_path / "task")
    full(100, "evaluate", model_folder, f"tasks={folder}", "output=out", expected="out/run.json")
    assert not list(pathlib.Path("out").glob("*.json"))

    words = [f"backbone.path={tiny_folder('llama')}", f"input={file}", "output=answers.jsonl", "max_new_tokens=4"]
    full(3000, "respond", *words, expected="answers.jsonl")
    succeed(command("respond", *words))  # goes on where it stopped
    assert sorted(row["question"] for row in rows_of("answers.jsonl")) == sorted(texts)

    with disk_of(4000):  # holds the config, not the teacher's targets: their size is known before they are begun
        result = train(command, tiny_folder("llama"), RESPONSES * 8, "data.responses=responses.jsonl")
    check_error(result, "error: responses.jsonl.targets/", code=74)
    assert only_config() and not list(pathlib.Path().glob("responses.jsonl.targets/*.npy"))
    np.save(tmp_path / "targets.npy", np.ones((8, 32), np.float32))
    words = ("teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}")
    with disk_of(4000):
        result = train(command, tiny_folder("llama"), RESPONSES, *words)
    check_error(result, "/run/checkpoints: a checkpoint could not be written", "there is none yet", code=74)
    assert not os.path.exists("run/model")
    succeed(train(command, tiny_folder("llama"), RESPONSES, *words))
    assert os.path.exists("run/model")


def test_an_output_that_cannot_be_is_named(command, model_folder, tiny_folder, tmp_path):
    (tmp_path / "file").touch()
    output, backbone = tmp_path / "file/output", f"backbone.path={tiny_folder('llama')}"
    data = write_jsonl(tmp_path / "rows.jsonl", [row | {"text": "a"} for row in RESPONSES])
    task = write_task(tmp_path / "task")
    for name, *words in (
        ("train", backbone, f"data.responses={data}", *TRAIN, f"train.output={output}"),
        ("respond", backbone, f"input={data}", f"output={output}.jsonl", "max_new_tokens=4"),
        ("synthesize", backbone, f"output={output}.jsonl"),
        ("decode", model_folder, f"input={data}", f"output={output}", "max_new_tokens=4"),
        ("evaluate", model_folder, f"tasks={task}", f"output={output}"),
        ("convert from_pytorch", model_folder, f"output={output}"),
        ("convert to_pytorch", model_folder, f"merged={output}"),
    ):
        check_error(command(name, *words), f"error: {tmp_path / 'file'}")
    result = command("decode", model_folder, "text=a", f"output={task}", "max_new_tokens=4")
    check_error(result, f"error: output={task}: already exists")
    assert os.listdir() == [] and sorted(os.listdir(tmp_path)) == ["file", "here", "rows.jsonl", "task"]
