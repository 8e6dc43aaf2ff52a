"""Hostile input of every reader: what is not refused as bad input is read, and nothing else ever happens.

A few examples each; LLM2VEC_GEN_FUZZ=5000 tries as many of each (hours).
"""

import asyncio
import contextlib
import copy
import dataclasses
import json
import os
import pathlib
import shutil

import hypothesis
import numpy as np
import pytest
import yaml
from hypothesis import strategies as st

from llm2vec_gen_jax import LLM2VecGen, config, data, directory, load_embeddings, options, vectors
from llm2vec_gen_jax.bulk import encode_corpus
from llm2vec_gen_jax.corpus import Corpus
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.execution import Execution
from llm2vec_gen_jax.formats import gguf, peft, published, torchzip, weights
from llm2vec_gen_jax.loading import open_backbone

from .conftest import one_device_mesh, tiny_torch_model, write_jsonl
from .embedders import TEXTS, K
from .test_gguf import write_gguf

FUZZ = hypothesis.settings(
    max_examples=int(os.environ.get("LLM2VEC_GEN_FUZZ", "20")),
    suppress_health_check=list(hypothesis.HealthCheck),
    deadline=None,
)
NUMBERS = st.integers() | st.integers(-3, 300) | st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400])
SCALARS = st.none() | st.booleans() | NUMBERS | st.floats() | st.text(max_size=6) | st.just("\ud800")
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
)


@st.composite
def altered(draw, value, words=()):
    """A copy of a JSON value with one part of it replaced, taken out, or added. words: keys and texts worth trying."""
    other = JSON | st.sampled_from(words) if words else JSON
    value = copy.deepcopy(value)
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 5)) == 0:
        return draw(other)
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    how = draw(st.integers(0, 9))
    if how == 0:
        del value[key]
    elif how == 1 and isinstance(value, dict):
        value[draw(st.text(max_size=6) | st.sampled_from([*words, "x"]))] = value.pop(key)
    elif how == 2 and isinstance(value, list):
        value.append(draw(other))
    else:
        value[key] = draw(altered(value[key], words))
    return value


@st.composite
def damaged(draw, content):
    """Bytes with a few pieces of them overwritten, cut out, repeated or put in, most near the start."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, min(len(content), 200)) | st.integers(0, len(content)))
        piece = draw(st.binary(max_size=9) | st.integers(0, 2**64 - 1).map(lambda n: n.to_bytes(8, "little")))
        length = draw(st.sampled_from([0, len(piece), 1, len(content)]))
        content[place : place + length] = piece
    return bytes(content)


def dumped(value):
    """JSON as bytes, lone surrogates too."""
    return json.dumps(value, ensure_ascii=True).encode()


@contextlib.contextmanager
def contained(folder):
    """No file outside of `folder`, which lies in a folder of its own, is made, changed or removed by the block."""

    def outside():
        paths = [path for path in folder.parent.rglob("*") if not path.is_relative_to(folder)]
        return {path: path.stat().st_mtime_ns for path in paths}

    before = outside()
    yield
    assert outside() == before


def refused_or(read, *arguments, **more):
    """What read(...) returns, or None where it refuses its input. Anything else that it raises is a failure."""
    try:
        return read(*arguments, **more)
    except InputError as error:
        assert str(error)  # lone surrogates may be in it: the standard error stream escapes them
        return None


# Settings

SCHEMAS = [
    getattr(config, name)
    for name in config.__all__
    if name.endswith("Config") and name not in ("BackboneConfig", "DistributedConfig", "SizesConfig")
]
KEYS = sorted({field.name for schema in SCHEMAS for field in dataclasses.fields(schema)})
SETTINGS = {key: options.to_dict(config.TrainConfig())[key] for key in ("backbone", "teacher", "optimizer", "lora")}


@hypothesis.given(st.sampled_from(SCHEMAS), altered(SETTINGS, KEYS), st.booleans())
@FUZZ
def test_any_config_file(tmp_path, schema, values, flow):
    path = tmp_path / "config.yaml"
    path.write_bytes(dumped(values) if flow else yaml.safe_dump(values, allow_unicode=False).encode())
    loaded = refused_or(options.load, schema, path)
    assert loaded is None or type(loaded) is schema


@hypothesis.given(st.binary(max_size=60) | damaged(yaml.safe_dump(SETTINGS).encode()))
@FUZZ
def test_any_bytes_as_a_config_file(tmp_path, content):
    (tmp_path / "config.yaml").write_bytes(content)
    refused_or(options.load, config.TrainConfig, tmp_path / "config.yaml")


@hypothesis.given(st.data(), st.sampled_from(SCHEMAS))
@FUZZ
def test_any_words_of_the_command_line(data, schema):
    keys = st.sampled_from(options._leaves(schema)) | st.text(max_size=9)
    values = st.text(max_size=9) | JSON.map(str) | st.sampled_from(["[", "[[", "{a: b}", "${x}", "???", "1e999", "nan"])
    words = data.draw(st.lists(st.tuples(keys, values).map("=".join) | st.text(max_size=9), max_size=3))
    loaded = refused_or(options.load, schema, None, words)
    assert loaded is None or options.to_yaml(loaded)


# Texts

ROWS = [{"question": "q", "answer": "a", "id": 1}, {"question": "é", "answer": "b", "id": "x"}]


@hypothesis.given(st.lists(altered(ROWS[0], ["question", "answer", "id"]), max_size=3), st.binary(max_size=9))
@FUZZ
def test_any_lines_of_json(tmp_path, rows, end):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(dumped(row) + b"\n" for row in rows) + end)
    records = refused_or(data.read_records, path, ("question", "answer"))
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


@hypothesis.given(st.data(), st.sampled_from(["x.parquet", "file.arrow", "stream.arrow"]))
@FUZZ
def test_any_damage_of_a_table(tmp_path, tables, data, name):
    path = tmp_path / name
    path.unlink(missing_ok=True)  # an Arrow file is mapped: never altered in place
    path.write_bytes(data.draw(damaged(tables[name])))
    refused_or(lambda: Corpus(str(path)).count())
    refused_or(lambda: list(Corpus(str(path), id_field="id").read()))


# Models

HEADS = ("reconstruction_mlp", "alignment_mlp", "reconstruction_mlp.safetensors", "encoder/adapter_model.safetensors")
RECORDS = ("encoder_decoder_config.json", "encoder/adapter_config.json", "tokenizer.json", "llm2vec_gen_jax.json")


@pytest.fixture(scope="module")
def model_copy(model_folder, tmp_path_factory):
    """model_copy() -> a model directory in a folder of its own, to be damaged."""
    place = tmp_path_factory.mktemp("damaged")

    def make():
        shutil.rmtree(place / "model", ignore_errors=True)
        return pathlib.Path(shutil.copytree(model_folder, place / "model"))

    return make


def read_model(path, backbone):
    return directory.to_model(directory.read(path), backbone, path)


@hypothesis.given(st.data(), st.sampled_from([*HEADS, *RECORDS, "run_config.yml"]))
@FUZZ
def test_any_damage_of_a_model(model_copy, tiny, data, name):
    path = model_copy()
    (path / name).write_bytes(data.draw(damaged((path / name).read_bytes())))
    with contained(path):
        refused_or(read_model, path, tiny("qwen3"))


@hypothesis.given(st.data(), st.sampled_from([*RECORDS, "run_config.yml"]))
@FUZZ
def test_any_record_of_a_model(model_copy, tiny, data, name):
    path = model_copy()
    value = yaml.safe_load((path / name).read_text())
    if name == "tokenizer.json":
        value = {"added_tokens": value["added_tokens"]}  # all that is read of it here
    value = data.draw(altered(value, ["../x", "/etc/passwd", "last_3_tokens", "LORA", "<question1>"]))
    (path / name).write_bytes(dumped(value))
    with contained(path):
        refused_or(read_model, path, tiny("qwen3"))


@st.composite
def safetensors_files(draw, content):
    """A safetensors file with another header."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header = dumped(draw(altered(header, ["F32", "BF16", "I8", "F8_E4M3", "../x"])))
    said = draw(st.sampled_from([len(header), 0, len(header) + 1, 2**40, 2**64 - 1]))
    return said.to_bytes(8, "little") + header + content[8 + length :]


@hypothesis.given(st.data())
@FUZZ
def test_any_header_of_safetensors(model_copy, tiny, data):
    path = model_copy()
    file = path / data.draw(st.sampled_from([name for name in HEADS if name.endswith(".safetensors")]))
    file.write_bytes(data.draw(safetensors_files(file.read_bytes())))
    refused_or(published.read, path)


@hypothesis.given(st.data())
@FUZZ
def test_any_adapter(tmp_path, tiny, data):
    backbone, folder = tiny("qwen3"), tmp_path / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rank, D = 2, backbone.architecture.hidden_size
    key = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    F = backbone.architecture.intermediate_size
    tensors = {key.format("A"): np.ones((rank, D), np.float32), key.format("B"): np.ones((F, rank), np.float32)}
    published.write_safetensors(folder / "adapter_model.safetensors", tensors)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 4, "bias": "none", "target_modules": ["up_proj"]}
    if data.draw(st.booleans()):
        settings = data.draw(altered(settings, ["rank_pattern", "alpha_pattern", "use_rslora", "gaussian"]))
    else:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(data.draw(safetensors_files(file.read_bytes())))
    (folder / "adapter_config.json").write_bytes(dumped(settings))

    def read():
        file = folder / "adapter_config.json"
        config = peft.check(peft.read_json(file), file)
        return peft.read(peft._load(folder / "adapter_model.safetensors"), config, backbone.architecture, folder)

    refused_or(read)


@hypothesis.given(st.data(), st.sampled_from(["config.json", "generation_config.json", "model.safetensors"]))
@FUZZ
def test_any_backbone(tiny_folder, tmp_path, data, name):
    folder = tmp_path / "outer" / "backbone"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(tiny_folder("llama3"), folder)
    if name == "model.safetensors":
        (folder / name).write_bytes(data.draw(safetensors_files((folder / name).read_bytes())))
    else:
        words = ["llama", "qwen3", "llama3", "silu", "full_attention", "../x"]
        value = json.loads((folder / name).read_text())
        (folder / name).write_bytes(dumped(data.draw(altered(value, words))))

    def read():
        backbone, source = open_backbone(str(folder), Execution(one_device_mesh()))
        return weights.load(source, backbone.architecture, one_device_mesh(), np.dtype("float32"))

    with contained(folder):
        refused_or(read)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    """The bytes of a GGUF file, and where its tensors begin."""
    path = write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf", tiny_torch_model("llama3"))
    content = pathlib.Path(path).read_bytes()
    return content, gguf.GGUFSource(path).reader.data_offset


@hypothesis.given(st.data())
@FUZZ
def test_any_metadata_of_gguf(tmp_path, gguf_file, data):
    content, start = gguf_file
    path = tmp_path / "model.gguf"
    path.unlink(missing_ok=True)  # it is mapped: never altered in place
    path.write_bytes(data.draw(damaged(content[:start])) + content[start:])

    def read():
        source = gguf.GGUFSource(path)
        architecture, _ = gguf.read_architecture(source)
        gguf.read_tokenizer(source), gguf.stop_ids(source)
        weights.fingerprint_values(source, architecture)

    refused_or(read)


@hypothesis.given(st.data())
@FUZZ
def test_any_damage_of_a_head(tmp_path, data):
    path = tmp_path / "head"
    torchzip.write(path, {"projection.weight": np.ones((2, 2), np.float32)}, {"size": 1})
    content = path.read_bytes()
    path.write_bytes(data.draw(damaged(content)))
    found = refused_or(torchzip.read, path)
    assert found is None or all(isinstance(value, np.ndarray) for value in found[0].values())


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
    for read in (lambda: load_embeddings(folder, rows, verify), lambda: vectors.load_soft_prompts(folder)):
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
    refused_or(vectors.load_soft_prompts, folder)
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


# The server


@pytest.fixture(scope="module")
def ask(embedder):
    """ask(method, path, content, headers) -> the response of a server in this process."""
    httpx = pytest.importorskip("httpx")
    for needed in ("orjson", "prometheus_client", "starlette", "uvicorn"):
        pytest.importorskip(needed, reason="needs requirements-serve.txt")
    from llm2vec_gen_jax.serve import Server

    settings = config.ServeConfig(max_length=60, batch_size=2, max_inputs=3, max_body_bytes=20000, max_wait_ms=0)
    settings.decode.max_new_tokens, settings.decode.batch_size, settings.decode.temperature = 2, 2, 0.5
    server = Server(embedder, settings, "tiny", None)
    server.ready = True

    def send(method, path, content=b"", headers=None):
        async def one():
            transport = httpx.ASGITransport(server.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
                return await client.request(method, path, content=content, headers=headers)

        return asyncio.run(one())

    return send


SOFT = np.ones((K, 32)).tolist()
BODIES = [
    ("/v1/embeddings", {"input": ["one", "two"], "dimensions": 3, "encoding_format": "base64", "soft_prompts": True}),
    ("/v1/embeddings", {"input": "one", "model": "tiny", "user": "x", "instruction": "Find:"}),
    ("/v1/decode", {"input": ["one"], "max_tokens": 2, "seed": 5}),
    ("/v1/decode", {"soft_prompts": [SOFT], "max_tokens": 1, "seed": 2**31}),
]


def check_answer(response):
    assert response.status_code == 200 or 400 <= response.status_code < 500, response.text
    assert "application/json" in response.headers["content-type"]
    assert response.status_code == 200 or set(response.json()) == {"error"}


@hypothesis.given(st.data(), st.sampled_from(BODIES))
@FUZZ
def test_any_body_of_a_request(ask, data, what):
    path, body = what
    words = ["base64", "float", "soft_prompts", "input", "seed", "tiny"]
    check_answer(ask("POST", path, dumped(data.draw(altered(body, words)))))


@hypothesis.given(st.data(), st.sampled_from(BODIES))
@FUZZ
def test_any_bytes_of_a_request(ask, data, what):
    path, body = what
    content = data.draw(damaged(dumped(body)) | st.binary(max_size=40))
    check_answer(ask(data.draw(st.sampled_from(["POST", "GET", "PUT"])), path, content))


@hypothesis.given(st.text(max_size=12), st.text(st.characters(codec="latin-1"), max_size=12))
@FUZZ
def test_any_path_and_header(ask, name, value):
    from urllib.parse import quote

    response = ask("GET", f"/v1/models/{quote(name)}", headers={"authorization": quote(value), "content-length": "x"})
    check_answer(response)
