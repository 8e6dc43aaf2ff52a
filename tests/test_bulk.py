"""The encode command: input files, shards that survive a kill and damage, their reader, bad input."""

import gzip
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

from launch import encode as command
from launch import start
from llm2vec_gen_jax import config, directory, files, load_embeddings, vectors
from llm2vec_gen_jax.bulk import encode_corpus
from llm2vec_gen_jax.corpus import Corpus
from llm2vec_gen_jax.errors import InputError

from .conftest import write_jsonl
from .embedders import TEXTS, E, embedder_on


def settings(tmp_path, output="out", **changes):
    """An EncodeConfig that writes tmp_path/output, eight texts a file."""
    defaults = {"input": str(tmp_path / "texts.jsonl"), "shard_size": 8, "batch_size": 4}
    return config.EncodeConfig(output=str(tmp_path / output), **defaults | changes)


def write_texts(tmp_path, texts=TEXTS):
    return write_jsonl(tmp_path / "texts.jsonl", [{"text": text, "id": f"n{n}"} for n, text in enumerate(texts)])


def bytes_of(path):
    return {file.name: file.read_bytes() for file in pathlib.Path(path).iterdir()}


# Input


def make_inputs(folder):
    """{kind: input setting} of TEXTS in every format; in Parquet and Arrow in several pieces."""
    import datasets
    import pyarrow
    import pyarrow.parquet

    lines = [text.replace("\n", " ") for text in TEXTS]
    table = pyarrow.table({"id": [f"n{n}" for n in range(len(TEXTS))], "other": lines[::-1], "text": lines})
    records = write_texts(folder)
    (folder / "a.txt").write_text("".join(f"{line}\n" for line in lines))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(records.read_bytes() + b"\n\n"))
    pyarrow.parquet.write_table(table, folder / "c.parquet", row_group_size=7)
    datasets.Dataset(table).save_to_disk(folder / "saved")
    with pyarrow.OSFile(str(folder / "d.arrow"), "wb") as file, pyarrow.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, 5)
    with pyarrow.OSFile(str(folder / "e.arrow"), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, 5)
    for part in range(3):
        write_jsonl(folder / f"part{part}.jsonl", table.to_pylist()[part * 20 : (part + 1) * 20])
    names = ["texts.jsonl", "a.txt", "b.jsonl.gz", "c.parquet", "saved", "d.arrow", "e.arrow", "part*.jsonl"]
    return {name: str(folder / name) for name in names} | {
        "commas": ",".join(str(folder / f"part{part}.jsonl") for part in range(3))
    }


def test_every_format_gives_the_same_rows(tmp_path):
    for kind, source in make_inputs(tmp_path).items():
        corpus = Corpus(source, id_field=None if kind == "a.txt" else "id")
        rows = list(corpus.read())
        assert [row.text for row in rows] == TEXTS, kind
        assert [row.number for row in rows] == list(range(len(TEXTS))) and corpus.rows == len(TEXTS)
        assert [row.id for row in rows] == ([*range(len(TEXTS))] if kind == "a.txt" else [f"n{n}" for n in range(49)])
        assert corpus.count() in (None, len(TEXTS))
        for low, high in ((0, 1), (11, 30), (48, 49)):
            part = Corpus(source).read(lambda first, count, low=low, high=high: first < high and first + count > low)
            assert [row.text for row in part] == TEXTS[low:high], kind


def test_large_pieces_are_read_in_part(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [str(number) for number in range(5000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3000)
    for low, high in ((0, 2), (1023, 1025), (2500, 3500), (4999, 5000)):
        wanted = lambda first, count, low=low, high=high: first < high and first + count > low  # noqa: E731
        found = [row.text for row in Corpus(str(tmp_path / "a.parquet")).read(wanted)]
        assert found == [str(number) for number in range(low, high)]


# The job


def test_shards_are_the_vectors_in_order(embedder, model_folder, tmp_path):
    write_texts(tmp_path)
    manifest = encode_corpus(model_folder, settings(tmp_path))
    assert sorted(bytes_of(tmp_path / "out")) == [*(f"embeddings-{n:05}.npy" for n in range(7)), "manifest.json"]
    assert (manifest["rows"], manifest["dimension"]) == (len(TEXTS), E)
    assert [shard["rows"] for shard in manifest["shards"]][-2:] == [[40, 48], [48, 49]]
    found = load_embeddings(tmp_path / "out", verify=True)
    np.testing.assert_allclose(found, embedder.encode(TEXTS), atol=1e-5)
    np.testing.assert_array_equal(load_embeddings(tmp_path / "out", rows=(6, 19)), found[6:19])
    assert isinstance(load_embeddings(tmp_path / "out", rows=(16, 24)), np.memmap)
    before = bytes_of(tmp_path / "out")
    assert encode_corpus(model_folder, settings(tmp_path)) == manifest and bytes_of(tmp_path / "out") == before


def test_shares_write_the_files_of_one_process(model_folder, tmp_path):
    write_texts(tmp_path)
    encode_corpus(model_folder, settings(tmp_path, "whole"))
    for index in range(3):
        share = config.ShardConfig(index, 3)
        if index:
            with pytest.raises(InputError, match="shares .* of 3 have not finished"):
                load_embeddings(tmp_path / "parts")
        encode_corpus(model_folder, settings(tmp_path, "parts", shard=share))
    whole, parts = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "parts")
    assert {n: b for n, b in whole.items() if n[0] == "e"} == {n: b for n, b in parts.items() if n[0] == "e"}
    assert len(parts) == len(whole) + 2
    np.testing.assert_array_equal(load_embeddings(tmp_path / "whole"), load_embeddings(tmp_path / "parts", verify=True))
    encode_corpus(model_folder, settings(tmp_path, "idle", shard=config.ShardConfig(9, 10)))  # more shares than files
    assert list(bytes_of(tmp_path / "idle")) == ["manifest-00009-of-00010.json"]


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_formats_and_precisions(embedder, model_folder, tmp_path, kind, precision):
    write_texts(tmp_path)
    options = {"truncate_dim": 8, "normalize": True, "precision": precision, "format": kind, "id_field": "id"}
    encode_corpus(model_folder, settings(tmp_path, **options))
    found = load_embeddings(tmp_path / "out", verify=True)
    expected = embedder.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    if precision == "int8":
        low, high = np.load(tmp_path / "out/ranges.npy")
        np.testing.assert_allclose(
            (found + 128.0) / 255 * (high - low) + low, expected, atol=1.1 * (high - low).max() / 255
        )
    elif precision == "binary":
        np.testing.assert_array_equal(found, vectors.quantize(expected, "binary"))
    else:
        np.testing.assert_allclose(found, expected, atol=1e-5 if precision == "float32" else 1e-3)
    assert found.dtype == {"float32": "f4", "float16": "f2", "int8": "i1", "binary": "i1"}[precision]
    if kind == "parquet":
        import pyarrow.parquet

        assert pyarrow.parquet.read_table(tmp_path / "out/embeddings-00001.parquet")["id"].to_pylist() == [
            f"n{n}" for n in range(8, 16)
        ]


def test_int8_shares_have_one_range_and_clip(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("llm2vec_gen_jax.bulk.CALIBRATION", 5)
    write_texts(tmp_path)
    encode_corpus(model_folder, settings(tmp_path, "whole", precision="int8"))
    for index in (1, 0):
        encode_corpus(
            model_folder, settings(tmp_path, f"part{index}", precision="int8", shard=config.ShardConfig(index, 2))
        )
    whole = bytes_of(tmp_path / "whole")
    for index in (0, 1):
        for name, content in bytes_of(tmp_path / f"part{index}").items():
            assert name.startswith("manifest") or whole[name] == content
    found = load_embeddings(tmp_path / "whole")
    assert (found[:5].min(axis=0) == -128).all() and (found[:5].max(axis=0) >= 126).all()


def test_shares_of_different_runs_are_not_mixed(model_folder, tmp_path):
    write_texts(tmp_path)
    for index, normalize in ((0, True), (1, False)):
        encode_corpus(model_folder, settings(tmp_path, normalize=normalize, shard=config.ShardConfig(index, 2)))
    with pytest.raises(InputError, match="shares are of different runs .config.normalize: True -> False"):
        load_embeddings(tmp_path / "out")


# Interruptions


def run_in_process(process):
    out, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return out


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_ends_with_the_same_bytes(model_folder, tmp_path, launch, how):
    texts = [f"{number} " + "word " * (number * 13 % 60) for number in range(3000)]
    write_texts(tmp_path, texts)
    words = [str(model_folder), "input=texts.jsonl", "shard_size=60", "batch_size=4", "precision=int8"]
    killed = launch(tmp_path, "encode", *words, "output=killed")
    while len(list(tmp_path.glob("killed/embeddings-*"))) < 4:
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.001)
    killed.send_signal(how)
    _, errors = killed.communicate(timeout=60)
    assert killed.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[how], errors
    assert not (tmp_path / "killed/manifest.json").exists()
    if how != signal.SIGKILL:
        assert not list(tmp_path.glob("killed/.*"))
    kept = {path: path.stat().st_mtime_ns for path in sorted(tmp_path.glob("killed/embeddings-*"))[:3]}
    with pytest.raises(InputError, match="no manifest.json"):
        load_embeddings(tmp_path / "killed")
    (tmp_path / "killed/.embeddings-00049.npy.torn.npy").write_bytes(b"half")
    run_in_process(launch(tmp_path, "encode", *words, "output=killed"))
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished shards are not computed again"
    run_in_process(launch(tmp_path, "encode", *words, "output=undisturbed"))
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "undisturbed")


class Interrupted(Exception):
    pass


def interrupt_after(monkeypatch, shards):
    """Makes the next job stop after it has written some shards."""
    write, written = vectors.write_shard, []

    def limited(*arguments):
        written.append(1)
        if len(written) > shards:
            raise Interrupted
        write(*arguments)

    monkeypatch.setattr(vectors, "write_shard", limited)


def begin(model_folder, options, monkeypatch, shards=3):
    with monkeypatch.context() as patch:
        interrupt_after(patch, shards)
        with pytest.raises(Interrupted):
            encode_corpus(model_folder, options)


def test_another_model_setting_or_input_is_refused(tiny, model_folder, tmp_path, monkeypatch):
    path = write_texts(tmp_path)
    begin(model_folder, settings(tmp_path), monkeypatch)
    before = bytes_of(tmp_path / "out")
    assert sum(name.startswith("embeddings") for name in before) == 3
    other = tmp_path / "other"
    embedder = embedder_on(tiny("qwen3"))
    trainable = jax.tree.map(lambda x: x * 1.5, embedder.trainable)
    directory.save(other, embedder.model, trainable, embedder.backbone, {}, [])

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


def test_standard_input_is_continued_when_it_is_the_same(model_folder, tmp_path, monkeypatch):
    def give(texts):
        content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))

    options = settings(tmp_path, input="-", stdin="jsonl", precision="int8")
    give(TEXTS)
    begin(model_folder, options, monkeypatch)
    for texts, expected in (
        (["other", *TEXTS[1:]], "texts 0 to 8 are not those"),
        ([*TEXTS[:20], "other", *TEXTS[21:]], "texts 16 to 24 are not those"),
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


def test_a_file_that_was_removed_is_made_again(model_folder, tmp_path, monkeypatch):
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
def test_what_is_damaged_is_made_again(model_folder, tmp_path, monkeypatch, finished, capsys):
    """Every kind of file but those that say of which run it is."""
    write_texts(tmp_path)
    words = {"precision": "int8", "save_soft_prompts": True}
    encode_corpus(model_folder, settings(tmp_path, "whole", **words))
    expected = bytes_of(tmp_path / "whole")
    if finished:
        shutil.copytree(tmp_path / "whole", tmp_path / "begun")
    else:
        begin(model_folder, settings(tmp_path, "begun", **words), monkeypatch, 4)
    for number, name in enumerate(sorted(bytes_of(tmp_path / "begun"))):
        if "run.json" in name or "manifest" in name:
            continue
        for damage in (flip, cut):
            random = np.random.default_rng(number)
            out = f"{name}-{damage.__name__}"
            shutil.copytree(tmp_path / "begun", tmp_path / out)
            options = settings(tmp_path, out, **words)
            path = tmp_path / out / name
            path.write_bytes(damage(path.read_bytes(), random))
            encode_corpus(model_folder, options)
            assert bytes_of(tmp_path / out) == expected
            if name.endswith(".npy"):
                assert f"{path}: missing, or not what was written" in capsys.readouterr().out


# The reader


def test_what_is_altered_or_missing_is_named(model_folder, tmp_path):
    write_texts(tmp_path)
    encode_corpus(model_folder, settings(tmp_path))
    path = tmp_path / "out/embeddings-00002.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="embeddings-00002.npy: is not what was written"):
        load_embeddings(tmp_path / "out", verify=True)
    assert load_embeddings(tmp_path / "out", rows=(0, 16), verify=True).shape == (16, E)
    path.unlink()
    with pytest.raises(InputError, match="embeddings-00002.npy: no such file"):
        load_embeddings(tmp_path / "out")
    for rows in ((0, 50), (5, 4), (-1, 2)):
        with pytest.raises(InputError, match="has rows 0 to 49"):
            load_embeddings(tmp_path / "out", rows)


@pytest.mark.parametrize(
    "change",
    [
        {"shard": {}},
        {"shard": {"index": 0, "count": "1"}},
        {"rows": None},
        {"model": 1},
        {"shards": {}},
        {"shards": [{"file": "x.npy"}]},
        {"shards": [{"shard": 0, "file": "../x.npy", "rows": [0, 2]}]},
        {"shards": [{"shard": 0, "file": "/etc/passwd", "rows": [0, 2]}]},
        {"shards": [{"shard": 0, "file": "x.npy", "rows": [0, True]}]},
    ],
)
def test_a_manifest_that_encode_did_not_write_is_named(tmp_path, change):
    """And no file outside of its folder is read."""
    (tmp_path / "out").mkdir()
    for folder in (tmp_path, tmp_path / "out"):
        np.save(folder / "x.npy", np.ones((2, 3), np.float32))
    manifest = {"shard": {"index": 0, "count": 1}, "rows": 2, "dimension": 3, "model": {}, "input": {}, "config": {}}
    manifest["shards"] = [{"shard": 0, "file": "x.npy", "rows": [0, 2]}]
    files.write_json(tmp_path / "out/manifest.json", manifest)
    assert load_embeddings(tmp_path / "out").shape == (2, 3)
    with pytest.raises(InputError, match="x.npy: is not what was written"):  # it has no checksum
        load_embeddings(tmp_path / "out", verify=True)
    files.write_json(tmp_path / "out/manifest.json", manifest | change)
    with pytest.raises(InputError, match="manifest.json: is not as encode wrote it"):
        load_embeddings(tmp_path / "out")


@pytest.mark.parametrize(
    "header",
    [
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, \x00), }",
        b"{'descr': '<f4', 'fortran_order': False, 'shape': (9, 3), }",
        b"{'descr': '<U4', 'fortran_order': False, 'shape': (2, 3), }",
        b"{'descr': '|O', 'fortran_order': False, 'shape': (2, 3), }",
    ],
)
def test_damaged_vectors_are_named(tmp_path, header):
    header += b" " * (117 - len(header)) + b"\n"
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24))
    with pytest.raises(InputError, match=str(path)):
        vectors._read_shard(path)


# Bad input on the command line


@pytest.fixture
def run(monkeypatch, capsys, tmp_path, model_folder):
    """run(*words) runs the command on the model in an empty folder; returns (exit code, last line of its errors)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", jax.config.jax_compilation_cache_dir)

    def run_(*words, model=model_folder):
        monkeypatch.setattr(sys, "argv", ["encode", str(model), *words])
        code = 0
        try:
            start.run(config.EncodeConfig, command.main, "MODEL")
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
    "a.csv": ("text\na\n", ["a.csv: cannot be read; supported: .txt"]),
    "a.parquet": ("PAR1 no", ["a.parquet: damaged or not readable"]),
    "a.arrow": ("no", ["a.arrow: damaged or not readable"]),
    "a.txt.gz": ("no gzip", ["a.txt.gz", "damaged gzip"]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, name):
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
    for words, expected in (
        ([f"input={tmp_path / 'a.parquet'}"], "no column 'text'"),
        ([f"input={tmp_path / 'a.parquet'}", "field=body"], "a.parquet, row 1: 'body' must be a string, found None"),
        ([f"input={tmp_path / 'none*.txt'}"], "none*.txt: no such file"),
        ([f"{good},{tmp_path / 'none.txt'}"], "none.txt: no such file"),
        ([f"input={tmp_path / 'nothing'}"], "nothing: no file in it"),
        (["input=-,-"], "read once"),
        ([good, "id_field=key"], "line 1: no column 'key'"),
        ([good, "max_length=4"], "max_length must exceed the 4 appended tokens"),
        ([good, "truncate_dim=13"], "truncate_dim=13"),
        ([good, "precision=int4"], "precision=int4: unknown"),
        ([good, "shard.index=2", "shard.count=2"], "shard.index=2"),
        ([good, "shard_size=0"], "shard_size=0"),
        ([good, "filed=text"], "did you mean 'field'"),
    ):
        code, line = run(*words, "output=out")
        assert code == 2 and expected in line, line
        assert list(pathlib.Path().iterdir()) == []
    shutil.copytree(tmp_path / "nothing", "out")
    (pathlib.Path("out") / "mine").write_text("mine")
    assert "exists and holds other files" in run(good, "output=out")[1]


def test_later_errors_keep_what_is_done(run, tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", [*({"text": text} for text in TEXTS[:20]), {"text": None}])
    words = [f"input={tmp_path / 'texts.jsonl'}", "output=out", "shard_size=4"]
    code, line = run(*words)
    assert code == 2 and "texts.jsonl, line 21" in line
    assert len(list(pathlib.Path("out").glob("embeddings-*"))) >= 1
