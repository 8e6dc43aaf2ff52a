"""Hostile data: texts in JSON lines and tables, embeddings and the records of their encoding."""

import dataclasses
import json
import shutil

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax import LLM2VecGen, config, load_embeddings
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.data.records import read_records
from llm2vec_gen_jax.data.texts import Corpus
from llm2vec_gen_jax.inference import shards
from llm2vec_gen_jax.serving.encode_corpus import encode_corpus
from tests.conftest import write_jsonl
from tests.helpers.embedders import TEXTS
from tests.helpers.fuzzing import FUZZ, altered, contained, damaged, dumped, refused_or

# Texts

ROWS = [{"question": "q", "answer": "a", "id": 1}, {"question": "é", "answer": "b", "id": "x"}]


@hypothesis.given(st.lists(altered(ROWS[0], ["question", "answer", "id"]), max_size=3), st.binary(max_size=9))
@FUZZ
def test_any_lines_of_json(tmp_path, rows, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(dumped(row) + b"\n" for row in rows) + end)
    records = refused_or(read_records, path, ("question", "answer"))
    for record in records or ():
        assert {"question", "answer"} <= set(record) and isinstance(record["question"] + record["answer"], str)
    for id_field in (None, "id"):
        found = refused_or(lambda id_field=id_field: list(Corpus(str(path), "question", id_field).read()))
        assert all(isinstance(row.text, str) for row in found or ())


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """The bytes of a table of texts in each binary format."""
    import pyarrow
    import pyarrow.parquet

    folder, table = tmp_path_factory.mktemp("tables"), pyarrow.table({"text": ["one", "two"], "id": [1, 2]})
    pyarrow.parquet.write_table(table, folder / "x.parquet")
    for name, make in (("file", pyarrow.ipc.new_file), ("stream", pyarrow.ipc.new_stream)):
        with make(folder / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_offsets_and_letters_of_an_arrow_file_are_checked(tmp_path, tables):
    whole, path = tables["file.arrow"], tmp_path / "file.arrow"
    offsets = (3).to_bytes(4, "little") + (6).to_bytes(4, "little")
    for old, new in ((b"onetwo", b"one\xff\xffo"), (offsets, b"\xff" * 8)):
        assert whole.count(old) == 1
        path.unlink(missing_ok=True)  # an Arrow file is mapped: never altered in place
        path.write_bytes(whole.replace(old, new))
        with pytest.raises(InputError, match="damaged or not readable"):
            list(Corpus(str(path)).read())


@hypothesis.given(st.data(), st.sampled_from(["x.parquet", "file.arrow", "stream.arrow"]))
@FUZZ
def test_any_damage_of_a_table(tmp_path, tables, data, name):
    path = tmp_path / name
    path.unlink(missing_ok=True)  # an Arrow file is mapped: never altered in place
    path.write_bytes(data.draw(damaged(tables[name])))
    refused_or(lambda: Corpus(str(path)).count())
    refused_or(lambda: list(Corpus(str(path), id_field="id").read()))


def test_two_columns_of_one_name_are_refused(tmp_path):
    import pyarrow

    table = pyarrow.table([["one"], ["two"], [1]], names=["text", "text", "id"])
    with pyarrow.ipc.new_file(tmp_path / "x.arrow", table.schema) as writer:
        writer.write_table(table)
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    for name in ("x.arrow", "x.parquet"):
        with pytest.raises(InputError, match=f"{name}: two columns are called 'text'"):
            list(Corpus(str(tmp_path / name)).read())
        with pytest.raises(InputError, match=f"{name}: two columns are called 'text'"):
            Corpus(str(tmp_path / name)).count()


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("state.json", "{}"),
        ("state.json", "["),
        ("state.json", '{"_data_files": [{"filename": "/dev/zero"}]}'),
        ("state.json", '{"_data_files": 5}'),
        ("dataset_info.json", "[" * 5000),
        ("dataset_info.json", '{"features": {"text": {"dtype": "x", "_type": "Value"}}}'),
        ("data-00000-of-00001.arrow", "ARROW1"),
    ],
)
def test_a_damaged_dataset_is_refused(tmp_path, tables, file, content):
    import datasets

    datasets.Dataset.from_dict({"text": ["one"]}).save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / file).unlink()
    (tmp_path / "saved" / file).write_text(content)
    with pytest.raises(InputError, match="saved: damaged or not readable"):
        list(Corpus(str(tmp_path / "saved")).read())
    for splits in ("[", "{}", '{"splits": 5}', '{"splits": [5]}', "9" * 5000):
        (tmp_path / "dataset_dict.json").write_text(splits)
        with pytest.raises(InputError, match="dataset_dict.json: "):
            Corpus(str(tmp_path))


# Vectors


@pytest.fixture(scope="module")
def loaded_once(embedder):
    """Every model that is asked for is the embedder: not loaded in each example."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LLM2VecGen, "from_pretrained", lambda *_, **__: embedder)
        yield


@pytest.fixture(scope="module")
def encoded(loaded_once, tmp_path_factory):
    """encoded(format) -> (a folder of vectors in a folder of its own, its settings), to be damaged."""
    made, place = {}, tmp_path_factory.mktemp("encoded")
    write_jsonl(place / "texts.jsonl", [{"text": text} for text in TEXTS[:5]])

    def make(format):
        settings = config.EncodeConfig(input=str(place / "texts.jsonl"), shard_size=2, format=format, warmup=False)
        settings.dtype, settings.max_length, settings.save_soft_prompts = "float32", 60, True
        if format not in made:
            settings.output = str(place / "made" / format)
            encode_corpus("model", settings)
            made[format] = settings.output
        folder = place / "damaged" / format
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(made[format], folder)
        (folder.parent / "embeddings-secret.npy").write_bytes(b"of somebody else")
        return folder, dataclasses.replace(settings, output=str(folder))

    return make


def altered_manifest(draw, folder):
    """Alters the manifest in place; what follows from its checksums is the writer's business."""
    words = ["../embeddings-secret.npy", "/etc/passwd", "embeddings-00001.npy", ".", ""]
    value = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_bytes(dumped(draw(altered(value, words))))


@hypothesis.given(st.data(), st.sampled_from(["npy", "parquet"]), st.booleans(), st.booleans())
@FUZZ
def test_any_manifest_of_vectors(encoded, data, format, verify, whole):
    folder, _ = encoded(format)
    altered_manifest(data.draw, folder)
    rows = None if whole else data.draw(st.tuples(st.integers(-1, 6), st.integers(-1, 6)))
    for read in (lambda: load_embeddings(folder, rows, verify), lambda: shards.load_soft_prompts(folder)):
        found = refused_or(read)
        assert found is None or found.dtype.kind in "fiu"


@hypothesis.given(st.data(), st.sampled_from(["npy", "parquet"]))
@FUZZ
def test_any_damage_of_vectors(encoded, data, format):
    folder, _ = encoded(format)
    before = np.array(load_embeddings(folder))
    for file in (folder / f"embeddings-00000.{format}", folder / "soft_prompts-00000.npy"):
        content = data.draw(damaged(file.read_bytes()))
        file.unlink()  # it may be mapped: never altered in place
        file.write_bytes(content)
    refused_or(load_embeddings, folder)
    refused_or(shards.load_soft_prompts, folder)
    found = refused_or(load_embeddings, folder, verify=True)
    assert found is None or np.array_equal(found, before)  # the damage was none


@hypothesis.given(st.data(), st.sampled_from(["manifest.json", "progress.jsonl"]))
@FUZZ
def test_encode_goes_on_from_any_record(encoded, data, name):
    """It refuses the folder, or ends with vectors that are whole; either way, it touches nothing but the folder."""
    folder, settings = encoded("npy")
    expected = np.array(load_embeddings(folder))
    manifest = json.loads((folder / "manifest.json").read_text())
    words = ["../embeddings-secret.npy", "/etc/passwd", "."]
    if name == "manifest.json":
        altered_manifest(data.draw, folder)
    else:  # as a kill leaves it
        (folder / "manifest.json").unlink()
        record = {key: manifest[key] for key in ("model", "input", "config", "shard")}
        rows = data.draw(altered(manifest["shards"], words))
        rows = rows if isinstance(rows, list) else [rows]
        (folder / "progress.jsonl").write_bytes(b"".join(dumped(row) + b"\n" for row in rows))
        (folder / "progress.jsonl.run.json").write_bytes(dumped(record))
    with contained(folder):
        if refused_or(encode_corpus, "model", settings) is not None:
            found = refused_or(load_embeddings, folder, verify=True)
            assert found is None or np.allclose(found, expected, atol=1e-6)
