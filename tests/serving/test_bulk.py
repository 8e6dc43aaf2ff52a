"""The encode command: input files, shards, shares, formats, and reading them."""

import gzip

import numpy as np
import pytest

from llm2vec_gen_jax import config, load_embeddings
from llm2vec_gen_jax.common import files
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.data.texts import Corpus
from llm2vec_gen_jax.inference import postprocess, shards
from llm2vec_gen_jax.serving.encode_corpus import encode_corpus
from tests.conftest import write_jsonl
from tests.helpers.bulk import bytes_of, settings, write_texts
from tests.helpers.embedders import TEXTS, E

# Input


def make_inputs(folder):
    """{kind: input setting} of TEXTS in every format; Parquet and Arrow in several chunks."""
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
    (folder / "f.csv").write_text("id,text\n" + "".join(f'n{n},"{line}"\n' for n, line in enumerate(lines)))
    names = ["texts.jsonl", "a.txt", "b.jsonl.gz", "f.csv", "c.parquet", "saved", "d.arrow", "e.arrow", "part*.jsonl"]
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


def test_hidden_files_are_skipped(tmp_path):
    inputs = make_inputs(tmp_path)
    (tmp_path / "folder").mkdir()
    for name in ("folder", "saved"):
        hidden = tmp_path / name / ".ipynb_checkpoints"
        before = Corpus(inputs["saved"], "text").identity()
        hidden.mkdir()
        for file in (hidden / "a-checkpoint.txt", hidden.parent / ".a.txt"):
            file.write_text("hidden\n")
        (tmp_path / "folder/a.txt").write_text("one\ntwo\n")
    assert Corpus(inputs["saved"], "text").identity() == before
    (tmp_path / "folder/inner").mkdir()
    (tmp_path / "folder/inner/b.txt").write_text("three\n")
    for pattern in ("folder", "folder/*", "folder/**", "folder/**/*.txt", "folde*"):
        assert [row.text for row in Corpus(str(tmp_path / pattern)).read()] == ["one", "two", "three"]
    for pattern in ("saved", "sav*", "saved/**"):
        assert [row.text for row in Corpus(str(tmp_path / pattern)).read()] == TEXTS


def test_large_pieces_are_read_in_part(tmp_path, monkeypatch):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": [str(number) for number in range(5000)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3000)
    for low, high in ((0, 2), (1023, 1025), (2500, 3500), (4999, 5000)):
        overlaps = lambda first, count, low=low, high=high: first < high and first + count > low  # noqa: E731
        texts = [row.text for row in Corpus(str(tmp_path / "a.parquet")).read(overlaps)]
        assert texts == [str(number) for number in range(low, high)]


# The job


def test_shards_are_the_vectors_in_order(embedder, model_folder, tmp_path):
    write_texts(tmp_path)
    manifest = encode_corpus(model_folder, settings(tmp_path))
    assert sorted(bytes_of(tmp_path / "out")) == [*(f"embeddings-{n:05}.npy" for n in range(7)), "manifest.json"]
    assert (manifest["rows"], manifest["dimension"]) == (len(TEXTS), E)
    assert [shard["rows"] for shard in manifest["shards"]][-2:] == [[40, 48], [48, 49]]
    vectors = load_embeddings(tmp_path / "out", verify=True)
    np.testing.assert_allclose(vectors, embedder.encode(TEXTS), atol=1e-5)
    np.testing.assert_array_equal(load_embeddings(tmp_path / "out", rows=(6, 19)), vectors[6:19])
    assert isinstance(load_embeddings(tmp_path / "out", rows=(16, 24)), np.memmap)
    before = bytes_of(tmp_path / "out")
    assert encode_corpus(model_folder, settings(tmp_path)) == manifest and bytes_of(tmp_path / "out") == before


def test_shares_write_the_same_files_as_one_process(model_folder, tmp_path):
    write_texts(tmp_path)
    encode_corpus(model_folder, settings(tmp_path, "whole"))
    for index in range(3):
        share = config.ShardConfig(index, 3)
        if index:
            with pytest.raises(InputError, match="shares .* of 3 have not finished"):
                load_embeddings(tmp_path / "parts")
        encode_corpus(model_folder, settings(tmp_path, "parts", shard=share))
    single, parts = bytes_of(tmp_path / "whole"), bytes_of(tmp_path / "parts")
    assert {n: b for n, b in single.items() if n[0] == "e"} == {n: b for n, b in parts.items() if n[0] == "e"}
    assert len(parts) == len(single) + 2
    np.testing.assert_array_equal(load_embeddings(tmp_path / "whole"), load_embeddings(tmp_path / "parts", verify=True))
    encode_corpus(model_folder, settings(tmp_path, "idle", shard=config.ShardConfig(9, 10)))  # more shares than files
    assert list(bytes_of(tmp_path / "idle")) == ["manifest-00009-of-00010.json"]


@pytest.mark.parametrize("kind", ["npy", "parquet"])
@pytest.mark.parametrize("precision", ["float32", "float16", "int8", "binary"])
def test_formats_and_precisions(embedder, model_folder, tmp_path, kind, precision):
    write_texts(tmp_path)
    options = {"truncate_dim": 8, "normalize": True, "precision": precision, "format": kind, "id_field": "id"}
    encode_corpus(model_folder, settings(tmp_path, **options))
    vectors = load_embeddings(tmp_path / "out", verify=True)
    expected = embedder.encode(TEXTS, truncate_dim=8, normalize_embeddings=True)
    if precision == "int8":
        low, high = np.load(tmp_path / "out/ranges.npy")
        np.testing.assert_allclose(
            (vectors + 128.0) / 255 * (high - low) + low, expected, atol=1.1 * (high - low).max() / 255
        )
    elif precision == "binary":
        np.testing.assert_array_equal(vectors, postprocess.quantize(expected, "binary"))
    else:
        np.testing.assert_allclose(vectors, expected, atol=1e-5 if precision == "float32" else 1e-3)
    assert vectors.dtype == {"float32": "f4", "float16": "f2", "int8": "i1", "binary": "i1"}[precision]
    if kind == "parquet":
        import pyarrow.parquet

        assert pyarrow.parquet.read_table(tmp_path / "out/embeddings-00001.parquet")["id"].to_pylist() == [
            f"n{n}" for n in range(8, 16)
        ]


def test_int8_shares_have_one_range_and_clip(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("llm2vec_gen_jax.serving.encode_corpus.CALIBRATION", 5)
    write_texts(tmp_path)
    encode_corpus(model_folder, settings(tmp_path, "whole", precision="int8"))
    for index in (1, 0):
        encode_corpus(
            model_folder, settings(tmp_path, f"part{index}", precision="int8", shard=config.ShardConfig(index, 2))
        )
    single = bytes_of(tmp_path / "whole")
    for index in (0, 1):
        for name, content in bytes_of(tmp_path / f"part{index}").items():
            assert name.startswith("manifest") or single[name] == content
    vectors = load_embeddings(tmp_path / "whole")
    assert (vectors[:5].min(axis=0) == -128).all() and (vectors[:5].max(axis=0) >= 126).all()


def test_shares_of_different_runs_are_not_mixed(model_folder, tmp_path):
    write_texts(tmp_path)
    for index, normalize in ((0, True), (1, False)):
        encode_corpus(model_folder, settings(tmp_path, normalize=normalize, shard=config.ShardConfig(index, 2)))
    with pytest.raises(InputError, match="shares are of different runs .config.normalize: True -> False"):
        load_embeddings(tmp_path / "out")


# The reader


def test_modified_and_missing_files_are_errors(model_folder, tmp_path):
    write_texts(tmp_path)
    encode_corpus(model_folder, settings(tmp_path))
    path = tmp_path / "out/embeddings-00002.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match="embeddings-00002.npy: modified after it was written"):
        load_embeddings(tmp_path / "out", verify=True)
    assert load_embeddings(tmp_path / "out", rows=(0, 16), verify=True).shape == (16, E)
    path.unlink()
    with pytest.raises(InputError, match="embeddings-00002.npy: no such file"):
        load_embeddings(tmp_path / "out")
    for rows in ((0, 50), (5, 4), (-1, 2)):
        with pytest.raises(InputError, match="has rows 0 to 49"):
            load_embeddings(tmp_path / "out", rows)


def test_a_manifest_with_too_many_shares_is_an_error(tmp_path):
    """Without creating the list of their numbers."""
    manifest = {
        "shard": {"index": 0, "count": 2**62},
        "rows": 2,
        "dimension": 3,
        "model": {},
        "input": {},
        "config": {},
    }
    files.write_json(tmp_path / "manifest.json", manifest | {"shards": []})
    with pytest.raises(InputError, match=r"shares \[1, 2, 3, 4, 5, 6, 7, 8, 9, 10\] of 46"):
        load_embeddings(tmp_path)


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
def test_invalid_manifests_are_errors(tmp_path, change):
    """No file outside the folder is read."""
    (tmp_path / "out").mkdir()
    for folder in (tmp_path, tmp_path / "out"):
        np.save(folder / "x.npy", np.ones((2, 3), np.float32))
    manifest = {"shard": {"index": 0, "count": 1}, "rows": 2, "dimension": 3, "model": {}, "input": {}, "config": {}}
    manifest["shards"] = [{"shard": 0, "file": "x.npy", "rows": [0, 2]}]
    files.write_json(tmp_path / "out/manifest.json", manifest)
    assert load_embeddings(tmp_path / "out").shape == (2, 3)
    with pytest.raises(InputError, match="x.npy: modified after it was written"):  # without a checksum
        load_embeddings(tmp_path / "out", verify=True)
    files.write_json(tmp_path / "out/manifest.json", manifest | change)
    with pytest.raises(InputError, match="manifest.json: not a valid manifest of encode"):
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
def test_damaged_vectors_are_errors(tmp_path, header):
    header += b" " * (117 - len(header)) + b"\n"
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(24))
    with pytest.raises(InputError, match=str(path)):
        shards._read_shard(path)
