"""`LLM2VecGen.encode` by the conventions of sentence-transformers, and the commands `encode` and `decode`."""

import copy
import json
import os
import pathlib
import pickle
import shutil
import subprocess
import sys

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax import LLM2VecGen, load_embeddings
from llm2vec_gen_jax.common import files
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference import postprocess
from llm2vec_gen_jax.model import compressor
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.pretrained import model_directory
from tests.conftest import check_error, write_jsonl
from tests.helpers.commands import rows_of
from tests.helpers.embedders import THOUGHTS, E, K
from tests.helpers.processes import environment

TEXTS = ["", "one", "a longer text with words", "é🙂 <|im_end|> <question1>", "x" * 90, "one"]


@pytest.fixture(scope="session")
def model(talker):
    """An embedder on it, as it is before training."""
    method = LLM2VecGenModel(talker.architecture, K, THOUGHTS, E)
    trainable = compressor.init_trainable(method.compressor, jax.random.key(0), talker.frozen["embedding"])
    return LLM2VecGen(method, trainable, talker, prompts={"query": "Find:", "other": ""})


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory):
    """Its model directory."""
    folder = tmp_path_factory.mktemp("embedder") / "model"
    model_directory.save(folder, model.model, model.trainable, model.backbone, {})
    return folder


# Encode and decode


def test_encode_and_decode(command, model_folder, tmp_path):
    write_jsonl(tmp_path / "texts.jsonl", [{"body": text} for text in TEXTS])
    words = [f"input={tmp_path / 'texts.jsonl'}", "field=body", "output=out", "batch_size=4"]
    code, out, errors = command("encode", model_folder, *words, "save_soft_prompts=true")
    assert (code, "written: out (6 x 12)" in out) == (0, True), errors
    assert sorted(os.listdir("out")) == ["embeddings-00000.npy", "manifest.json", "soft_prompts-00000.npy"]
    embeddings, prompts = load_embeddings("out", verify=True), np.load("out/soft_prompts-00000.npy")
    loaded = LLM2VecGen.from_pretrained(model_folder)
    expected, expected_prompts = loaded.encode(TEXTS, return_soft_prompts=True)
    np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    np.testing.assert_allclose(prompts, expected_prompts, atol=1e-5)
    manifest = json.loads(pathlib.Path("out/manifest.json").read_text())
    assert (manifest["rows"], manifest["dimension"]) == embeddings.shape == (6, E)
    assert list(manifest["input"]["sha256"].values()) == [files.sha256_file(tmp_path / "texts.jsonl")]

    common = [model_folder, "max_new_tokens=9"]
    from_text = ["decode", *common, f"input={tmp_path / 'texts.jsonl'}", "field=body", "output=a.jsonl"]
    assert command(*from_text)[0] == 0
    assert command("decode", *common, "soft_prompts=out/soft_prompts-00000.npy", "output=b.jsonl")[0] == 0
    rows = rows_of("a.jsonl")
    assert [row["text"] for row in rows] == TEXTS
    assert [row["decoded"] for row in rows] == [row["decoded"] for row in rows_of("b.jsonl")]
    assert len({row["decoded"] for row in rows}) > 1
    code, out, _ = command("decode", *common, f"text={TEXTS[2]}")
    assert (code, json.loads(out)) == (0, rows[2])
    assert rows[2]["decoded"] == loaded.decode(expected_prompts, max_new_tokens=9)[2]


def test_encode_leaves_nothing_behind_after_an_error(command, model_folder, tmp_path):
    (tmp_path / "texts.jsonl").write_text('{"text": "a"}\n{"text": 1}\n')
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    write_jsonl(tmp_path / "good.jsonl", [{"text": "a"}])
    for file, expected in (("texts.jsonl", "line 2: 'text'"), ("latin.txt", "line 1: not UTF-8")):
        check_error(command("encode", model_folder, f"input={tmp_path / file}", "output=out"), f"{file}, {expected}")
    words = [f"input={tmp_path / 'good.jsonl'}", "output=out"]
    check_error(command("encode", tmp_path / "nowhere", *words), "nowhere")
    check_error(command("encode", model_folder, *words, "max_length=4"), "max_length")
    check_error(command("encode", model_folder, *words, "field=txt"), "'txt'", "'text'")
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    (copy / "alignment_mlp").write_bytes(b"torn")
    check_error(command("encode", copy, *words), "alignment_mlp")
    assert os.listdir() == []
    (tmp_path / "file").touch()
    code, _, errors = command("encode", model_folder, words[0], f"output={tmp_path / 'file/out'}")
    assert (code, errors) == (2, f"error: {tmp_path / 'file'}: File exists\n")


# LLM2VecGen.encode, by the conventions of sentence-transformers


def test_one_string_gives_one_vector_and_a_list_keeps_its_order(model):
    embeddings = model.encode(TEXTS, batch_size=4)
    assert embeddings.shape == (6, E) and embeddings.dtype == np.float32 and isinstance(embeddings, np.ndarray)
    assert model.get_embedding_dimension() == E
    for text, expected in zip(TEXTS, embeddings):
        one = model.encode(text)
        assert one.shape == (E,)
        np.testing.assert_allclose(one, expected, atol=1e-5)
    order = [3, 1, 5, 0, 2, 4]
    np.testing.assert_allclose(model.encode([TEXTS[n] for n in order]), embeddings[order], atol=1e-5)
    np.testing.assert_allclose(embeddings[1], embeddings[5], atol=1e-5)
    assert np.abs(embeddings[0] - embeddings[1]).max() > 1e-3
    np.testing.assert_allclose(model.encode(np.array(TEXTS)), embeddings, atol=1e-5)
    np.testing.assert_allclose(model.encode(text for text in TEXTS), embeddings, atol=1e-5)


@hypothesis.given(st.lists(st.sampled_from([*TEXTS, "What is the capital of Peru?", "long " * 50]), max_size=4))
@hypothesis.settings(max_examples=15)
def test_a_text_has_the_same_vector_in_any_batch(model, others):
    text = "What is the capital of France?"
    expected = model.encode(text)
    for texts, row in (([text, *others], 0), ([*others, text], -1)):
        for batch_size in (1, 4):
            np.testing.assert_allclose(model.encode(texts, batch_size=batch_size)[row], expected, atol=1e-5)


def test_an_empty_list_gives_an_empty_array(model):
    for keywords, width in (({}, E), ({"truncate_dim": 5}, 5), ({"normalize_embeddings": True}, E)):
        found = model.encode([], **keywords)
        assert (found.shape, found.dtype) == ((0, width), np.float32)
    embeddings, prompts = model.encode([], return_soft_prompts=True)
    assert (embeddings.shape, prompts.shape) == ((0, E), (0, K, 32))
    assert model.decode(prompts) == []
    assert model.encode([], precision="int8").shape == (0, E)
    assert model.encode([], precision="binary").shape == (0, 2)


def test_truncation_comes_before_normalisation(model):
    plain = model.encode(TEXTS)
    found = model.encode(TEXTS, truncate_dim=5, normalize_embeddings=True)
    expected = plain[:, :5] / np.linalg.norm(plain[:, :5], axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_array_equal(model.encode(TEXTS, truncate_dim=5), plain[:, :5])
    np.testing.assert_allclose(np.linalg.norm(model.encode("a", normalize_embeddings=True)), 1, atol=1e-6)
    for wrong in (0, E + 1, -1):
        with pytest.raises(InputError, match=f"truncate_dim.*{wrong}"):
            model.encode(TEXTS, truncate_dim=wrong)


def test_precisions(model):
    plain = model.encode(TEXTS)
    int8 = model.encode(TEXTS, precision="int8")
    assert (int8.shape, int8.dtype) == ((6, E), np.int8)
    low, high = plain.min(axis=0), plain.max(axis=0)
    np.testing.assert_allclose(
        (int8.astype(float) + 128) / 255 * (high - low) + low, plain, atol=(high - low).max() / 255
    )
    assert (int8.min(axis=0) == -128).all() and (int8.max(axis=0) >= 126).all()  # rounding of 255 steps
    binary = model.encode(TEXTS, precision="binary")
    assert (binary.shape, binary.dtype) == ((6, 2), np.int8)  # 12 signs in 2 bytes
    bits = np.unpackbits((binary.astype(np.int16) + 128).astype(np.uint8), axis=1)[:, :E]
    np.testing.assert_array_equal(bits, plain > 0)
    assert model.encode("a", precision="binary").shape == (2,)
    np.testing.assert_array_equal(model.encode(TEXTS, precision="uint8"), int8.astype(np.int16) + 128)
    np.testing.assert_array_equal(model.encode(TEXTS, precision="ubinary"), np.packbits(plain > 0, axis=-1))
    with pytest.raises(InputError, match="precision 'int9'.*'int8'"):
        model.encode(TEXTS, precision="int9")
    with pytest.raises(InputError, match="'int8' needs more than one text"):
        model.encode("a", precision="int8")


def test_prompts_are_joined_with_one_space(model):
    expected = model.encode("Find: me")
    np.testing.assert_allclose(model.encode("me", prompt="Find:"), expected, atol=1e-6)
    np.testing.assert_allclose(model.encode("me", prompt_name="query"), expected, atol=1e-6)
    np.testing.assert_allclose(model.encode(["me"], prompt_name="query")[0], expected, atol=1e-6)
    np.testing.assert_allclose(model.encode_query("me"), expected, atol=1e-6)
    plain = model.encode("me")
    for found in (
        model.encode("me", prompt=""),
        model.encode("me", prompt_name="other"),
        model.encode_document("me"),
        model.encode_query("me", prompt=""),
        model.encode_query("me", prompt_name="other"),
    ):
        np.testing.assert_allclose(found, plain, atol=1e-6)
    assert np.abs(plain - expected).max() > 1e-3
    with pytest.raises(InputError, match="prompt_name 'qurey' is unknown.*'query'"):
        model.encode("me", prompt_name="qurey")


def test_lengths_soft_prompts_and_arrays(model):
    long = "abcdefgh" * 10
    room = 20 - K - THOUGHTS  # a token per byte
    np.testing.assert_allclose(model.encode(long, max_length=20), model.encode(long[:room]), atol=1e-5)
    assert np.abs(model.encode(long, max_length=20) - model.encode(long)).max() > 1e-3
    for wrong in (K + THOUGHTS, 1, 0):
        with pytest.raises(InputError, match="max_length must exceed the 4 appended tokens"):
            model.encode(long, max_length=wrong)
    embedding, prompts = model.encode("a", return_soft_prompts=True)
    assert (embedding.shape, prompts.shape) == ((E,), (K, 32))
    embeddings, many = model.encode(["b", "a"], return_soft_prompts=True)
    np.testing.assert_allclose(many[1], prompts, atol=1e-5)
    assert model.decode(prompts, max_new_tokens=6) == model.decode(many, max_new_tokens=6)[1]
    array = model.encode(["b", "a"], convert_to_numpy=False)
    assert isinstance(array, jax.Array)
    np.testing.assert_allclose(array, embeddings, atol=1e-5)


def test_what_encode_does_not_know_is_an_error(model):
    for name in ("convert_to_tensor", "normalize", "device"):
        with pytest.raises(TypeError, match=name):
            model.encode("a", **{name: True})
    for texts, expected in ((["a", None], "input 1.*NoneType"), ([b"a"], "input 0.*bytes"), ([["a"]], "input 0.*list")):
        with pytest.raises(InputError, match=expected):
            model.encode(texts)
    with pytest.raises(InputError, match="input 1.*surrogate"):
        model.encode(["a", "b\ud800"])
    with pytest.raises(InputError, match="batch_size=0: expected an integer >= 1"):
        model.encode("a", batch_size=0)


class Table:
    """Iterates over the names of its columns, as a data frame does."""

    columns = ("text", "label")

    def __iter__(self):
        return iter(self.columns)


@pytest.mark.parametrize(
    "inputs, named",
    [
        ({"a": "b"}, "dict"),
        (Table(), "one column.*Table"),
        ({"a", "b"}, "set"),
        (b"ab", "bytes"),
        (None, "NoneType"),
        (5, "int"),
        (np.array([["a"]]), "ndarray"),
        (np.array("a"), "ndarray"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(model, inputs, named):
    for call in (model.encode, model.encode_query, model.logit_lens):
        with pytest.raises(InputError, match=f"inputs must be a string or a list of them.*{named}"):
            call(inputs)


def test_data_frames_are_refused_and_their_columns_taken(model):
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"text": ["a", "b"]})
    with pytest.raises(InputError, match="one column.*DataFrame"):
        model.encode(frame)
    np.testing.assert_array_equal(model.encode(frame["text"]), model.encode(["a", "b"]))


NAN = float("nan")


@pytest.mark.parametrize(
    "method, options, named",
    [
        ("encode", {"batch_size": -1}, "batch_size=-1"),
        ("encode", {"batch_size": 2.5}, "batch_size=2.5"),
        ("encode", {"batch_size": "4"}, "batch_size='4'"),
        ("encode", {"batch_size": True}, "batch_size=True"),
        ("encode", {"max_length": "9"}, "max_length='9'"),
        ("encode", {"max_length": 9.5}, "max_length=9.5"),
        ("encode", {"truncate_dim": 2.0}, "truncate_dim=2.0"),
        ("encode", {"normalize_embeddings": "no"}, "normalize_embeddings='no'"),
        ("encode", {"return_soft_prompts": "no"}, "return_soft_prompts='no'"),
        ("encode", {"convert_to_numpy": 0}, "convert_to_numpy=0"),
        ("encode", {"show_progress_bar": None}, "show_progress_bar=None"),
        ("encode", {"prompt": 5}, "prompt=5"),
        ("encode", {"prompt_name": 5}, "prompt_name 5 is unknown"),
        ("encode", {"precision": 8}, "precision 8 is unknown"),
        ("warmup", {"batch_size": 0}, "batch_size=0"),
        ("logit_lens", {"top_k": 0}, "top_k=0"),
        ("logit_lens", {"top_k": 2.5}, "top_k=2.5"),
        ("logit_lens", {"batch_size": -1}, "batch_size=-1"),
        ("logit_lens", {"state": 5}, "state 5 is unknown"),
        ("decode", {"max_new_tokens": 0}, "max_new_tokens=0"),
        ("decode", {"max_new_tokens": 1.5}, "max_new_tokens=1.5"),
        ("decode", {"temperature": NAN}, "temperature=nan"),
        ("decode", {"temperature": -1}, "temperature=-1"),
        ("decode", {"temperature": float("inf")}, "temperature=inf"),
        ("decode", {"temperature": "1"}, "temperature='1'"),
        ("decode", {"top_p": 1.5}, "top_p=1.5"),
        ("decode", {"top_p": NAN}, "top_p=nan"),
        ("decode", {"top_p": -0.1}, "top_p=-0.1"),
        ("decode", {"batch_size": 0}, "batch_size=0"),
        ("decode", {"batch_size": -1}, "batch_size=-1"),
        ("decode", {"seed": -1}, "seed=-1"),
        ("decode", {"seed": 0.5}, "seed=0.5"),
    ],
)
def test_arguments_are_checked_like_the_keys_of_commands(model, method, options, named):
    subject = {"decode": [np.zeros((1, K, 32))], "warmup": []}.get(method, [["a"]])
    with pytest.raises(InputError, match=f"^{named}"):
        getattr(model, method)(*subject, **options)


def test_what_cannot_be_loaded_like_that_is_refused(model_folder):
    for dtype in ("int4", "uint8", "float64", "fp16", "half", "", None, 16, "bfloat17"):
        with pytest.raises(InputError, match="^dtype="):
            LLM2VecGen.from_pretrained(model_folder, dtype=dtype)
    for options, named in (
        ({"attention": "flash"}, "attention=flash: unknown"),
        ({"attention": None}, "attention=None: unknown"),
        ({"mesh": "auto"}, "mesh must be"),
        ({"prompts": ["query"]}, "prompts must be a dict"),
        ({"prompts": {"query": 5}}, "prompts must be a dict"),
    ):
        with pytest.raises(InputError, match=named):
            LLM2VecGen.from_pretrained(model_folder, **options)


def test_soft_prompts_of_different_lengths_are_refused(model):
    with pytest.raises(InputError, match="soft prompts must be one array"):
        model.decode([[[1.0]], [[1.0], [2.0]]])


def test_the_home_is_known_in_paths(model, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(model_folder, tmp_path / "model")
    loaded = LLM2VecGen.from_pretrained("~/model")
    loaded.save_pretrained("~/again")
    loaded.save_merged(pathlib.Path("~/merged"))
    assert {path.name for path in tmp_path.iterdir()} >= {"model", "again", "merged"}
    np.testing.assert_array_equal(LLM2VecGen.from_pretrained("~/again").encode("a"), loaded.encode("a"))
    with pytest.raises(InputError, match="dtype=int4"):
        loaded.save_pretrained("~/third", dtype="int4")


def test_similarity_is_the_cosine(model):
    embeddings = model.encode(TEXTS)
    found = model.similarity(embeddings, embeddings[:2] * 7)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(found, unit @ unit[:2].T, atol=1e-6)
    assert model.similarity(embeddings[0], embeddings).shape == (1, 6)
    assert np.isfinite(model.similarity(np.zeros((1, E)), embeddings)).all()
    for scale in (1e-44, 3e38):  # the norm or the squares are beyond float32
        large = np.full((1, E), scale, np.float32)
        np.testing.assert_allclose(model.similarity(large, np.ones(E)), 1, rtol=1e-6)
    for other, message in ((np.ones(E + 1), "different dimensions"), (np.full(E, 1e300), "NaN or infinity")):
        with pytest.raises(InputError, match=f"similarity: .*{message}"):
            model.similarity(embeddings, other)


def test_integers_of_a_range_beyond_float32_are_refused():
    embeddings = np.array([[0, 3e38], [1, -3e38]], np.float32)
    for precision in ("int8", "uint8"):
        with pytest.raises(InputError, match="the range of dimension 1 exceeds float32"):
            postprocess.quantize(embeddings, precision)


FORKED = """
import os, sys, warnings
import numpy as np
from llm2vec_gen_jax import LLM2VecGen

warnings.simplefilter("ignore")
model = LLM2VecGen.from_pretrained(sys.argv[1])
model.encode("a")
prompts = np.zeros((model.model.num_tokens, model.model.architecture.hidden_size))
for call in (
    lambda: model.encode("a"),
    lambda: model.encode_query(["a"]),
    lambda: model.decode(prompts),
    lambda: model.logit_lens("a"),
    lambda: model.warmup(),
    lambda: LLM2VecGen.from_pretrained(sys.argv[1]),
):
    if child := os.fork():
        os.waitpid(child, 0)
        continue
    try:
        call()
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
"""


def test_a_fork_is_refused_and_does_not_hang(model_folder):
    words = [sys.executable, "-c", FORKED, model_folder]
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert len(lines) == 6, done.stderr
    assert all(line.startswith("InputError JAX was used by process ") and '"spawn"' in line for line in lines)


def test_a_model_is_copied_but_not_pickled(embedder):
    copied = copy.copy(embedder)
    copied.prompts = {"query": "q"}
    assert embedder.prompts != copied.prompts
    np.testing.assert_array_equal(copied.encode("a"), embedder.encode("a"))
    with pytest.raises(TypeError, match="cannot be pickled: pass the path"):
        pickle.dumps(embedder)
