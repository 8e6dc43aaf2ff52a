"""The encode command after interruptions, with damaged files and bad input: identical bytes, or a one-line error."""

import io
import json
import pathlib
import shutil
import signal
import sys
import time

import jax
import numpy as np
import pytest

from llm2vec_gen_jax import config, load_embeddings
from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.commands import encode as command
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference import shards as shards_module
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.serving.encode_corpus import encode_corpus
from tests.conftest import write_jsonl
from tests.helpers.bulk import bytes_of, settings, write_texts
from tests.helpers.embedders import TEXTS, embedder_on

# Interruptions


def run_in_process(process):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return out


@pytest.mark.parametrize(
    "how",
    [signal.SIGKILL, *(pytest.param(how, marks=pytest.mark.slow) for how in (signal.SIGTERM, signal.SIGINT))],
)
def test_a_resumed_run_writes_the_same_bytes(model_folder, tmp_path, launch, how):
    texts = [f"{number} " + "word " * (number * 13 % 60) for number in range(600)]
    write_texts(tmp_path, texts)
    arguments = [str(model_folder), "input=texts.jsonl", "shard_size=30", "batch_size=4", "precision=int8"]
    killed = launch(tmp_path, "encode", *arguments, "output=killed")
    while len(list(tmp_path.glob("killed/embeddings-*"))) < 4:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.001)
    killed.send_signal(how)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how], errors
    assert not (tmp_path / "killed/manifest.json").exists()
    if how != signal.SIGKILL:
        assert not list(tmp_path.glob("killed/.*"))
    times = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("killed/embeddings-*"))[:3]}
    with pytest.raises(InputError, match="no manifest.json"):
        load_embeddings(tmp_path / "killed")
    (tmp_path / "killed/.embeddings-00019.npy.torn.npy").write_bytes(b"half")
    run_in_process(launch(tmp_path, "encode", *arguments, "output=killed"))
    assert {path: path.stat().st_mtime_ns for path in times} == times, "finished shards are not computed again"
    run_in_process(launch(tmp_path, "encode", *arguments, "output=undisturbed"))
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "undisturbed")


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, shards):
    """Stops the next run after it has written some shards."""
    write, written = shards_module.write_shard, []

    def limited(*arguments):
        written.append(1)
        if len(written) > shards:
            raise Interrupted
        write(*arguments)

    monkeypatch.setattr(shards_module, "write_shard", limited)


def begin(model_folder, options, monkeypatch, shards=3):
    with monkeypatch.context() as patch:
        interrupt_after(patch, shards)
        with pytest.raises(Interrupted):
            encode_corpus(model_folder, options)


def test_another_model_setting_or_input_is_rejected(tiny, model_folder, tmp_path, monkeypatch):
    path = write_texts(tmp_path)
    begin(model_folder, settings(tmp_path), monkeypatch)
    before = bytes_of(tmp_path / "out")
    assert sum(name.startswith("embeddings") for name in before) == 3
    other = tmp_path / "other"
    embedder = embedder_on(tiny("qwen3"))
    trainable = jax.tree.map(lambda x: x * 1.5, embedder.trainable)
    model_directory.save(other, embedder.model, trainable, embedder.backbone, {}, [])

    def refused(expected, model=model_folder, **changes):
        with pytest.raises(InputError, match=f"holds another run.*{expected}"):
            encode_corpus(model, settings(tmp_path, **changes))
        assert bytes_of(tmp_path / "out") == before

    refused("model.identity: ", other)
    refused("config.max_length: 512 -> 100", max_length=100)
    refused("config.instruction: '' -> 'Find:'", instruction="Find:")
    refused("config.batch_size: 4 -> 8", batch_size=8)
    refused("shard.count: 1 -> 2", shard=config.ShardConfig(0, 2))
    write_texts(tmp_path, [*TEXTS, "one more"])
    refused("input.sha256.*texts.jsonl")
    write_texts(tmp_path)
    encode_corpus(model_folder, settings(tmp_path))
    before = bytes_of(tmp_path / "out")
    refused("config.normalize: False -> True", normalize=True)
    path.write_text(path.read_text().replace("Text 40", "Text 41"))
    refused("input.sha256.*texts.jsonl")


def test_standard_input_resumes_if_it_is_the_same(model_folder, tmp_path, monkeypatch):
    def give(texts):
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    options = settings(tmp_path, input="-", stdin="jsonl", precision="int8")
    give(TEXTS)
    begin(model_folder, options, monkeypatch)
    for texts, expected in (
        (["other", *TEXTS[1:]], "texts 0 to 8 differ from those"),
        ([*TEXTS[:20], "other", *TEXTS[21:]], "texts 16 to 24 differ from those"),
        (TEXTS[:12], "fewer texts"),
    ):
        give(texts)
        with pytest.raises(InputError, match=expected):
            encode_corpus(model_folder, options)
    give(TEXTS)
    encode_corpus(model_folder, options)
    write_texts(tmp_path)
    encode_corpus(model_folder, settings(tmp_path, "file", precision="int8"))
    np.testing.assert_array_equal(load_embeddings(tmp_path / "out"), load_embeddings(tmp_path / "file"))


def test_removed_files_are_encoded_again(model_folder, tmp_path, monkeypatch):
    write_texts(tmp_path)
    encode_corpus(model_folder, settings(tmp_path, "whole"))
    begin(model_folder, settings(tmp_path), monkeypatch, 4)
    (tmp_path / "out/embeddings-00001.npy").unlink()
    encode_corpus(model_folder, settings(tmp_path))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def flip(content, random):
    content = bytearray(content)
    content[random.integers(len(content))] ^= 1 << random.integers(8)
    return bytes(content)


def cut(content, random):
    return content[: random.integers(len(content))]


@pytest.mark.parametrize("finished", [False, True])
def test_damaged_files_are_encoded_again(model_folder, tmp_path, monkeypatch, finished, messages):
    """All kinds of files except the records of the run."""
    write_texts(tmp_path)
    arguments = {"precision": "int8", "save_soft_prompts": True}
    encode_corpus(model_folder, settings(tmp_path, "whole", **arguments))
    expected = bytes_of(tmp_path / "whole")
    if finished:
        shutil.copytree(tmp_path / "whole", tmp_path / "begun")
    else:
        begin(model_folder, settings(tmp_path, "begun", **arguments), monkeypatch, 4)
    for number, name in enumerate(sorted(bytes_of(tmp_path / "begun"))):
        if "run.json" in name or "manifest" in name:
            continue
        for damage in (flip, cut):
            random = np.random.default_rng(number)
            out = f"{name}-{damage.__name__}"
            shutil.copytree(tmp_path / "begun", tmp_path / out)
            options = settings(tmp_path, out, **arguments)
            path = tmp_path / out / name
            path.write_bytes(damage(path.read_bytes(), random))
            encode_corpus(model_folder, options)
            assert bytes_of(tmp_path / out) == expected
            if name.endswith(".npy"):
                assert f"{path}: missing or damaged" in messages()


# Bad input on the command line


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, model_folder):
    """run(*arguments) runs the command in an empty folder and returns (exit code, last line of its errors)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)

    def run_(*arguments, model=model_folder):
        monkeypatch.setattr(sys, "argv", ["encode", str(model), *arguments])
        code = 0
        try:
            cli.run(config.EncodeConfig, command.main, "MODEL")
        except SystemExit as end:
            code = end.code
        errors = capsys.readouterr().err.strip().splitlines()
        return code, errors[-1] if errors else ""

    return run_


BAD = {
    "field.jsonl": ('{"text": "a"}\n{"txt": "b"}\n', ["field.jsonl, line 2: no column 'text'", "'txt'"]),
    "number.jsonl": ('{"text": "a"}\n\n{"text": 1}\n', ["number.jsonl, line 3: 'text' must be a string, found int"]),
    "torn.jsonl": ('{"text": "a"}\n{"text": "b\n', ["torn.jsonl, line 2: not valid JSON"]),
    "list.jsonl": ("[1]\n", ["list.jsonl, line 1: expected a JSON object"]),
    "half.jsonl": ('{"text": "\\ud800"}\n', ["half.jsonl, line 1", "surrogate"]),
    "empty.txt": ("", ["empty.txt: no texts"]),
    "blank.jsonl": ("\n\n", ["blank.jsonl: no texts"]),
    "latin.txt": (b"caf\xe9\n", ["latin.txt, line 1: not UTF-8"]),
    "a.csv": ("txt\na\n", ["a.csv: no column 'text', did you mean 'txt'?", "Set field="]),
    "a.xls": ("text\na\n", ["a.xls: unknown file type; supported: .txt"]),
    "a.parquet": ("PAR1 no", ["a.parquet: damaged or not readable"]),
    "a.arrow": ("no", ["a.arrow: damaged or not readable"]),
    "a.txt.gz": ("no gzip", ["a.txt.gz", "damaged gzip"]),
}


@pytest.mark.parametrize("value", ["", "a.txt,", ",a.txt", " "])
def test_an_empty_path_is_no_folder(run, value):
    """Such as from an unset shell variable: texts of the working directory would be encoded."""
    pathlib.Path("a.txt").write_text("a\n")
    code, line = run(f"input={value}", "output=out")
    assert code == 2 and ("an empty path" in line or "input is required" in line), line
    assert [path.name for path in pathlib.Path().iterdir()] == ["a.txt"]


def test_an_id_with_an_unpaired_surrogate_is_named(run, tmp_path):
    (tmp_path / "ids.jsonl").write_text('{"id": "a", "text": "a"}\n{"id": "\\ud800", "text": "b"}\n')
    code, line = run(f"input={tmp_path / 'ids.jsonl'}", "id_field=id", "output=out")
    assert code == 2 and "ids.jsonl, line 2: 'id' has an unpaired surrogate" in line, line


def test_the_working_directory_can_be_the_output(run, tmp_path):
    (tmp_path / "a.txt").write_text("a\nb\n")
    assert run(f"input={tmp_path / 'a.txt'}", "output=.")[0] == 0
    assert load_embeddings(".").shape[0] == 2
    code, line = run(f"input={tmp_path / 'a.txt'}", "output=")
    assert code == 2 and "output is required" in line


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_a_one_line_error_and_leaves_nothing(run, tmp_path, name):
    content, expected = BAD[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    code, line = run(f"input={tmp_path / name}", "output=out")
    assert code == 2 and line.startswith("error: "), line
    assert all(part in line for part in expected), line
    assert list(pathlib.Path().iterdir()) == []


def test_bad_settings_are_named(run, tmp_path):
    import pyarrow
    import pyarrow.parquet

    write_texts(tmp_path)
    good = f"input={tmp_path / 'texts.jsonl'}"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a", None]}), tmp_path / "a.parquet")
    (tmp_path / "nothing").mkdir()
    for arguments, expected in (
        ([f"input={tmp_path / 'a.parquet'}"], "no column 'text'"),
        ([f"input={tmp_path / 'a.parquet'}", "field=body"], "a.parquet, row 1: 'body' must be a string, found None"),
        ([f"input={tmp_path / 'none*.txt'}"], "none*.txt: no such file"),
        ([f"{good},{tmp_path / 'none.txt'}"], "none.txt: no such file"),
        ([f"input={tmp_path / 'nothing'}"], "nothing: contains no supported file"),
        (["input=-,-"], "read once"),
        ([good, "id_field=key"], "line 1: no column 'key'"),
        ([good, "max_length=4"], "max_length must exceed the 4 appended tokens"),
        ([good, "truncate_dim=13"], "truncate_dim=13"),
        ([good, "precision=int4"], "precision=int4: unknown"),
        ([good, "shard.index=2", "shard.count=2"], "shard.index=2"),
        ([good, "shard_size=0"], "shard_size=0"),
        ([good, "filed=text"], "did you mean 'field'"),
    ):
        code, line = run(*arguments, "output=out")
        assert code == 2 and expected in line, line
        assert list(pathlib.Path().iterdir()) == []
    shutil.copytree(tmp_path / "nothing", "out")
    (pathlib.Path("out") / "mine").write_text("mine")
    assert "exists and holds other files" in run(good, "output=out")[1]


def test_later_errors_keep_finished_shards(run, tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", [*({"text": text} for text in TEXTS[:20]), {"text": None}])
    arguments = [f"input={tmp_path / 'texts.jsonl'}", "output=out", "shard_size=4"]
    code, line = run(*arguments)
    assert code == 2 and "texts.jsonl, line 21" in line
    assert len(list(pathlib.Path("out").glob("embeddings-*"))) >= 1
