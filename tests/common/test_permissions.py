"""Files and folders that may not be read or written: one line that names them, and exit code 2."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest

from tests.conftest import write_jsonl
from tests.helpers.commands import RESPONSES, TRAIN, write_task

# Runs commands one after the other in this process; prints [exit code, standard error] of each.
RUN = """if True:
    import contextlib, io, json, os, runpy, sys
    results = []
    for path, (name, *words) in json.load(sys.stdin):
        mode = os.stat(path).st_mode & 0o777
        os.chmod(path, 0o500 if name.endswith("!") else 0)
        name, *action = name.removesuffix("!").split()
        sys.argv = [name, *action, *words]
        errors, code = io.StringIO(), 0
        with contextlib.redirect_stderr(errors), contextlib.redirect_stdout(io.StringIO()):
            try:
                runpy.run_module(f"launch.{name}", run_name="__main__")
            except SystemExit as end:
                code = end.code
            except Exception as error:
                code = f"{type(error).__name__}: {error}"
        os.chmod(path, mode)
        sys.modules.pop(f"launch.{name}", None)
        results.append([code, errors.getvalue()])
    print(json.dumps(results))
    """
# The superuser may read everything, but for these two rights.
OBEYING = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.geteuid() == 0 else []


@pytest.fixture(scope="module")
def results_of(tmp_path_factory):
    if OBEYING and (not shutil.which("setpriv") or subprocess.run([*OBEYING, "true"]).returncode):
        pytest.skip("runs as the superuser, whose rights cannot be given up here")
    root = str(pathlib.Path(__file__).parents[2])

    def run(cases):
        """cases: [(the path that is made unreadable, [command, word, ...])]; command!: it is not writable instead."""
        words = [[str(path), list(map(str, words))] for path, words in cases]
        process = subprocess.run(
            [*OBEYING, sys.executable, "-c", RUN],
            input=json.dumps(words),
            capture_output=True,
            text=True,
            cwd=tmp_path_factory.mktemp("empty"),
            env=os.environ | {"PYTHONPATH": root},
        )
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout.splitlines()[-1])

    return run


def test_what_may_not_be_read_or_written_is_named(results_of, model_folder, tiny_folder, tmp_path):
    model, backbone = tmp_path / "model", tmp_path / "backbone"
    shutil.copytree(model_folder, model)
    shutil.copytree(tiny_folder("qwen3"), backbone)
    text = write_jsonl(tmp_path / "rows.jsonl", [row | {"text": "a"} for row in RESPONSES])
    config = tmp_path / "config.yaml"
    config.write_text("train: {steps: 1}\n")
    np.save(tmp_path / "targets.npy", np.zeros((8, 4), np.float32))
    corpus = tmp_path / "corpus"
    (corpus / "inner").mkdir(parents=True)
    for folder in (corpus, corpus / "inner"):
        (folder / "a.txt").write_text("a\n")
    task = write_task(tmp_path / "task")
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir()
    shutil.copy(model / "encoder" / adapter.name, adapter)
    (adapter.parent / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "lora_alpha": 1}')
    closed = tmp_path / "closed"
    closed.mkdir()
    train = ["train", f"backbone.path={backbone}", f"data.responses={text}", *TRAIN]
    encode = ["encode", model, "output=out"]
    cases = [
        (config, ["train", config]),
        (text, train),
        (tmp_path / "targets.npy", [*train, "teacher.kind=file", f"teacher.path={tmp_path / 'targets.npy'}"]),
        *((path, [*train, "train.output=run"]) for path in (backbone, *map(backbone.joinpath, _BACKBONE))),
        (text, ["respond", f"backbone.path={backbone}", f"input={text}", "output=answers.jsonl"]),
        (text, [*encode, f"input={text}"]),
        (corpus, [*encode, f"input={corpus}"]),
        (corpus / "inner", [*encode, f"input={corpus}"]),
        *((path, [*encode, f"input={corpus}"]) for path in (model, *map(model.joinpath, _MODEL))),
        (text, ["decode", model, f"input={text}"]),
        (text, ["lens build_index", model, f"input={text}", "output=index"]),
        (task / "corpus.jsonl", ["evaluate", model, f"tasks={task}", "output=results"]),
        (task / "task.json", ["evaluate", model, f"tasks={task}", "output=results"]),
        (adapter, [*train, f"teacher.adapters=[{adapter.parent}]"]),
        (closed, ["encode!", model, f"input={corpus}", f"output={closed / 'out'}"]),
        (closed, ["convert from_pytorch!", model, f"output={closed / 'out'}"]),
        (model, ["evaluate!", model, f"tasks={task}", "output=results", "save_scores=true"]),
        (closed, [f"{train[0]}!", *train[1:], f"train.output={closed / 'run'}"]),
    ]
    mount = tmp_path / "mount"
    (mount / "vectors").mkdir(parents=True)
    share = ["encode!", model, f"input={tmp_path / 'rows.jsonl'}", f"output={mount / 'vectors'}", "shard.count=2"]
    [[code, errors]] = results_of([(mount, share)])  # its parent is read-only, as with a volume of a container
    assert code == 0, errors
    assert not list(mount.glob("vectors/.*")) and (mount / "vectors" / "manifest-00000-of-00002.json").exists()
    wrong = []
    for (path, words), (code, errors) in zip(cases, results_of(cases), strict=True):
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        named = str(path) in errors and "ermission denied" in errors and "Traceback" not in errors
        if code != 2 or len(lines) != 1 or not named:
            wrong.append((path.name, words[0], code, errors[-400:]))
    assert not wrong, "\n".join(map(str, wrong))


_BACKBONE = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_MODEL = (
    "run_config.yml",
    "llm2vec_gen_jax.json",
    "encoder",
    "encoder/adapter_config.json",
    "encoder/adapter_model.safetensors",
    "alignment_mlp",
    "alignment_mlp.safetensors",
    "tokenizer.json",
)
