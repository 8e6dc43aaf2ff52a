"""The command `convert`: folders are converted there and back, and `verify` finds each difference."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import published
from llm2vec_gen_jax.integrations.verify import verify
from tests.conftest import check_error
from tests.helpers.conversion import load, new_model, same_trees
from tests.helpers.processes import environment

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model_folder(tiny, tiny_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("embedder") / "model"
    new_model(tiny("llama")).save_pretrained(folder)
    return folder


def wait(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def test_verify_prints_a_table_and_fails_on_a_changed_value(launch, command, model_folder, tmp_path):
    code, out, err = wait(launch(tmp_path, "convert", "verify", str(model_folder), torch=True))
    assert (code, out.splitlines()[-1]) == (0, "PASS"), out + err
    assert "transformers" in out and "What is the capital of France" in out
    ours = load(model_folder)
    # Different values in the PyTorch file and the safetensors copy of a head.
    record = published.read(model_folder)
    record.alignment["bias"] = record.alignment["bias"] + np.eye(24, dtype=np.float32)[0] * 1e-2
    path = tmp_path / "changed"
    tokenizer = ours.backbone.tokenizer.hf
    config = json.loads((model_folder / "encoder" / "config.json").read_text())
    config["vocab_size"] = ours.backbone.architecture.vocab_size
    published.write(path, record, tokenizer, config, "")
    (path / "alignment_mlp.safetensors").write_bytes((model_folder / "alignment_mlp.safetensors").read_bytes())
    check_error(command("convert verify", path), "alignment_mlp.safetensors: projection.bias differs")
    (path / "alignment_mlp").unlink()  # only the safetensors copy remains, which PyTorch does not read
    check_error(command("convert verify", path), "PyTorch", "cannot read it")


def test_a_difference_fails(model_folder, tmp_path):
    """With right padding in PyTorch, as without a padding_side, the embeddings differ."""
    path = tmp_path / "model"
    load(model_folder).save_pretrained(path)
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    assert settings["padding_side"] == "left"
    file.write_text(json.dumps(settings | {"padding_side": "right"}))
    report = verify(path, sys.executable)
    assert not report.passed and "FAIL" in str(report) and "<-- differs" in str(report)


def test_missing_packages_are_not_compared(command, model_folder, tmp_path):
    bare = tmp_path / "python"
    for line, missing in (("exit 1", "torch, transformers, peft"), ("echo '[\"peft\"]'", "peft")):
        bare.write_text(f"#!/bin/sh\n{line}\n")
        bare.chmod(0o755)
        code, out, _ = command("convert verify", model_folder, f"python={bare}")
        assert code == 2 and out.splitlines()[-1] == "NOT COMPARED"
        assert f"missing: {missing};" in out
    with pytest.raises(InputError, match="python=/bin/true: not a Python interpreter"):
        verify(model_folder, "/bin/true")
    with pytest.raises(InputError, match="python=/nowhere/python: No such file"):
        verify(model_folder, "/nowhere/python")


def test_from_and_to_pytorch(launch, command, model_folder, tmp_path):
    code, out, err = wait(launch(tmp_path / "here", "convert", "from_pytorch", str(model_folder), "output=ours"))
    assert code == 0, err
    same_trees(load("ours").trainable, load(model_folder).trainable)
    arguments = ("output=there", "backbone_output=llm", "merged=merged", "torch_dtype=bfloat16")
    code, out, err = command("convert to_pytorch", "ours", *arguments)
    assert code == 0 and "written: merged" in out, err
    run = yaml.safe_load(pathlib.Path("there/run_config.yml").read_text())
    assert run["torch_dtype"] == "bfloat16" and run["model_name_or_path"] == os.path.abspath("llm")
    same_trees(load("there").trainable, load(model_folder).trainable)
    assert os.path.exists("merged/model.safetensors")
    check_error(command("convert to_pytorch", "ours", "output=there"), "output=there: already exists")
    check_error(command("convert verfy", "ours"), "did you mean 'verify'")
    code, out, _ = command("convert", "--help")
    assert code == 0 and all(f"\n  {name} " in out for name in ("from_pytorch", "to_pytorch", "verify"))


@pytest.mark.parametrize("after", ["save_backbone", "save_merged"])
def test_a_conversion_that_was_killed_between_two_folders_is_repeated(model_folder, tmp_path, command, after):
    words = ["output=there", "merged=merged", "backbone_output=llm"]
    code = f"""if True:
        import os, runpy, signal, sys
        from llm2vec_gen_jax.pretrained import export
        write = export.{after}
        def write_and_die(*more, **named):
            write(*more, **named)
            os.kill(os.getpid(), signal.SIGKILL)
        export.{after} = write_and_die
        sys.argv = ["launch.convert", "to_pytorch", *sys.argv[1:]]
        runpy.run_module("launch.convert", run_name="__main__")
        """
    killed = subprocess.run([sys.executable, "-c", code, model_folder, *words], env=environment())
    assert killed.returncode == -9 and os.path.exists("llm") and not os.path.exists("there")
    os.mkdir("mine")  # what is not of such a conversion stays
    check_error(command("convert to_pytorch", model_folder, *words[:2], "backbone_output=mine"), "mine: already exists")
    assert command("convert to_pytorch", model_folder, *words)[0] == 0
    assert sorted(os.listdir()) == ["llm", "merged", "mine", "there"]
    assert not [*pathlib.Path().glob("*/.*")] and load("there").backbone.name == str(pathlib.Path("llm").resolve())
    for folder in ("llm", "merged"):  # a finished conversion is not made again
        check_error(command("convert to_pytorch", model_folder, *words), f"={folder}: already exists")
        shutil.rmtree(folder)
