"""Logit lens and latent lens: the states, what the head and an index find in them, and the commands."""

import csv
import itertools
import json
import os
import pathlib
import shutil
import signal
import time

import datasets
import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.inference import postprocess, shards
from llm2vec_gen_jax.lens import generations, index, search
from llm2vec_gen_jax.lens.logit import STOP_WORDS, Candidate, logit_lens, over_tokens, whole_words
from llm2vec_gen_jax.lens.states import compression_states
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from tests.conftest import check_error, tiny_torch_model, write_jsonl
from tests.helpers.embedders import THOUGHTS, E, K, embedder_on

TEXTS = ["", "one", "a longer text with words", "é🙂 <|im_end|>", "x" * 90, "one"] * 9
CORPUS = [f"Sentence {number} of many. It has {number % 7} small words, or more!" for number in range(60)]
LAYERS = [0, 1, 2, 3]


# States


@pytest.fixture(scope="module")
def torch_states(tiny_folder):
    """states(rows of embeddings (T, D)) -> hidden_states (layers, T, D) of transformers for each."""
    import torch

    model = tiny_torch_model("qwen3")

    def states(row):
        with torch.no_grad():
            found = model.model(inputs_embeds=torch.tensor(np.array(row))[None], output_hidden_states=True)
        return np.stack([layer[0].numpy() for layer in found.hidden_states])

    return states


def test_states_are_the_hidden_states_of_transformers(embedder, torch_states):
    states = compression_states(embedder, TEXTS[:6], LAYERS)
    assert states.shape == (6, len(LAYERS), K, 32)
    table = np.asarray(embedder.backbone.frozen["embedding"])
    for found, ids in zip(states, embedder.tokenize(TEXTS[:6])):
        row = np.concatenate([table[ids], embedder.trainable["tokens"]])
        np.testing.assert_allclose(found, torch_states(row)[:, len(ids) + THOUGHTS :], atol=2e-5)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_last_states_are_what_the_heads_read(tiny, rank):
    embedder = embedder_on(tiny("qwen3"), rank)
    _, soft_prompts = embedder.encode(TEXTS, return_soft_prompts=True)
    states = compression_states(embedder, TEXTS, [3])[:, 0]
    np.testing.assert_allclose(embedder.model.heads(embedder.trainable, states)[1], soft_prompts, atol=2e-5)


def test_encoding_stacks_keys_and_values_of_the_layers_and_no_states(embedder):
    """What the lens asks of the scan costs those nothing who do not ask."""
    arguments = embedder.trainable, embedder.backbone.frozen, np.zeros((2, 8), np.int32), np.ones(2, np.int32)
    jaxpr = jax.make_jaxpr(embedder.model.encode)(*arguments)
    scans = [equation for equation in jax.tree.leaves(jaxpr.eqns) if equation.primitive.name == "scan"]
    shapes = [(x.aval.shape, scan.params["length"]) for scan in scans for x in scan.outvars]
    stacked = [shape for shape, length in shapes if shape[:1] == (length,)]  # the carry starts with the batch
    assert len(scans) == 1 and len(stacked) <= 2 and all(shape[2] == 2 and shape[4:] == (16,) for shape in stacked)


# Logit lens


def brute_force(embedder, hidden_BKD, top_k):
    head = np.asarray(embedder.model.head_VD(embedder.backbone.frozen), np.float64)
    logits = hidden_BKD.astype(np.float64) @ head.T
    odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
    probabilities = odds / odds.sum(axis=-1, keepdims=True)
    ids = np.argsort(-probabilities, axis=-1)[..., :top_k]
    return ids, np.take_along_axis(probabilities, ids, axis=-1)


@pytest.mark.parametrize("state", ["hidden", "soft_prompts"])
def test_logit_lens_is_the_softmax_of_the_head(embedder, state):
    found = embedder.logit_lens(TEXTS, top_k=4, state=state)
    hidden = compression_states(embedder, TEXTS, [3])[:, 0]
    _, soft_prompts = embedder.encode(TEXTS, return_soft_prompts=True)
    ids, probabilities = brute_force(embedder, hidden if state == "hidden" else soft_prompts, 4)
    pieces = [*embedder.backbone.tokenizer.pieces, *(f"<{id_}>" for id_ in range(260, 264))]
    assert np.shape([[[one.probability for one in token] for token in text] for text in found]) == (len(TEXTS), K, 4)
    for text, (expected, likely) in zip(found, zip(ids, probabilities)):
        assert [[one.text for one in token] for token in text] == [[pieces[id_] for id_ in row] for row in expected]
        np.testing.assert_allclose([[one.probability for one in token] for token in text], likely, rtol=1e-3)


def test_logit_lens_of_one_text_of_none_and_of_nonsense(embedder):
    (alone,) = embedder.logit_lens(["one"], top_k=3)
    assert embedder.logit_lens("one", top_k=3) == alone and len(alone) == K
    assert embedder.logit_lens([]) == []
    for options in ({"state": "hiden"}, {"top_k": 0}, {"top_k": 265}):
        with pytest.raises(InputError, match=f"{next(iter(options))}.*({next(iter(options.values()))}|'hidden')"):
            embedder.logit_lens("one", **options)
    with pytest.raises(TypeError):
        embedder.logit_lens("one", topk=3)


def test_logit_lens_on_many_devices_is_that_of_one(embedder, tiny_folder):
    mesh = sharding.make_mesh(config.MeshConfig(2, 2, 2))
    many = embedder_on(load_backbone(str(tiny_folder("qwen3")), "float32", mesh))
    expected, found = (logit_lens(one, TEXTS[:7], 5) for one in (embedder, many))
    for a, b in zip(itertools.chain(*itertools.chain(*expected)), itertools.chain(*itertools.chain(*found))):
        assert a.probability == pytest.approx(b.probability, rel=1e-3)


def test_spellings_of_a_word_are_one_and_pieces_are_none():
    starts = frozenset({"paris", "land", "us", "the"})
    tokens = [(" paris", 0.1), ("Paris", 0.2), ("ynthesis", 0.1), (" the", 0.1), (" x", 0.1), (".", 0.1), ("\n", 0.1)]
    tokens = [Candidate(*token) for token in [*tokens, (" US", 0.05), (" de", 0.05), (" 42", 0.04), ("巴黎", 0.03)]]
    found = whole_words(tokens, starts)
    assert [word for word, _ in found] == ["paris", "US", "42", "巴黎"]
    assert found[0].probability == pytest.approx(0.3)
    assert "the" in [word for word, _ in whole_words(tokens, starts, stop_words=True)]
    assert over_tokens([found, []])[0] == ("paris", pytest.approx(0.15))
    assert {"the", "of", "is"} < STOP_WORDS


def test_words_of_a_real_vocabulary(smollm2):
    pieces = smollm2.tokenizer.pieces
    assert len(pieces) == smollm2.architecture.vocab_size and pieces[2] == "<|im_end|>"
    assert {" Paris", "ynthesis", " the"} <= set(pieces)
    text = "The capital of France is Paris."
    assert "".join(pieces[id_] for id_ in smollm2.tokenizer.encode([text], 99)[0]) == text
    words = logit_lens(embedder_on(smollm2), ["What is the capital of France?"], 5, words=True)
    shown = [word for token in words[0] for word, _ in token]
    assert shown and not {word.lower() for word in shown} & STOP_WORDS


# The index


@hypothesis.given(st.lists(st.lists(st.integers(0, 3), max_size=7), max_size=12), st.integers(1, 40), st.integers(1, 9))
def test_contexts_are_drawn_once_each_within_the_limits(ids, limit, per_token):
    drawn = index.choose_contexts(ids, limit, per_token, 0)
    prefixes = [tuple(ids[text][: position + 1]) for text, position in drawn]
    assert [tuple(row) for row in drawn] == sorted({tuple(row) for row in drawn})
    assert len(set(prefixes)) == len(prefixes) and all(len(prefix) > 2 for prefix in prefixes)
    every = {tuple(row[:end]) for row in ids for end in range(3, len(row) + 1)}
    tokens = [prefix[-1] for prefix in every]
    assert all([prefix[-1] for prefix in prefixes].count(token) <= per_token for token in tokens)
    assert len(drawn) == min(limit, sum(min(tokens.count(token), per_token) for token in set(tokens)))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A corpus as a file."""
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", [{"text": text} for text in CORPUS])


@pytest.fixture(scope="module")
def index_folder(model_folder, corpus, tmp_path_factory):
    """An index of it, float32."""
    folder = tmp_path_factory.mktemp("index") / "index"
    settings = {"contexts": 90, "batch_size": 8, "precision": "float32", "layers": list("0123"), "dtype": "float32"}
    count = index.build_index(model_folder, config.BuildIndexConfig(input=str(corpus), output=str(folder), **settings))
    assert count == 90
    return folder


def test_vectors_of_an_index_are_the_states_of_its_contexts(index_folder, embedder, torch_states):
    index = search.Index(index_folder, embedder.backbone)
    assert (index.layers, index.count) == (LAYERS, 90) and len(set(map(tuple, index.contexts))) == 90
    table = np.asarray(embedder.backbone.frozen["embedding"])
    known = {tuple(ids.tolist()) for ids in embedder.tokenize(CORPUS, limit=256)}
    for row, (text, position) in enumerate(index.contexts):
        ids = index._ids[index._offsets[text] : index._offsets[text + 1]]
        assert tuple(ids.tolist()) in known
        expected = postprocess.l2_normalize(torch_states(table[ids])[:, position])
        np.testing.assert_allclose([index.vectors(layer)[row] for layer in LAYERS], expected, atol=1e-5)


@pytest.mark.parametrize("top_k, layers", [(3, None), (1, [2]), (500, [0, 3])])
def test_search_is_brute_force(index_folder, embedder, monkeypatch, top_k, layers):
    monkeypatch.setattr(search, "_CHUNK", 16)
    monkeypatch.setattr(search, "_QUERIES", 7)
    index = search.Index(index_folder, embedder.backbone)
    queries = np.random.default_rng(0).normal(size=(17, 32)).astype(np.float32)
    cosines, of_layer, rows = index.search(queries, top_k, layers)
    every = np.concatenate([index.vectors(layer) for layer in layers or LAYERS])
    expected = postprocess.l2_normalize(queries) @ every.T
    order = np.argsort(-expected, axis=1, kind="stable")[:, :top_k]
    np.testing.assert_allclose(cosines, np.take_along_axis(expected, order, axis=1), atol=1e-6)
    at = np.searchsorted(layers or LAYERS, of_layer) * index.count + rows
    np.testing.assert_allclose(np.take_along_axis(expected, at, axis=1), cosines, atol=1e-6)
    assert all(len(set(row)) == len(row) == min(top_k, len(every)) for row in at.tolist())


def test_a_text_of_the_corpus_is_its_own_neighbor(index_folder, embedder):
    """What is searched for is found: the state of a context has cosine 1 with itself, and its word is shown."""
    index = search.Index(index_folder, embedder.backbone)
    cosines, layers, rows = index.search(np.asarray(index.vectors(2)[5:9]), 1, [2])
    np.testing.assert_allclose(cosines, 1, atol=1e-6)
    assert (layers == 2).all() and rows[:, 0].tolist() == [5, 6, 7, 8]
    near = index.neighbor(cosines[0, 0], 2, rows[0, 0])
    text, position = index.contexts[5]
    ids = index._ids[index._offsets[text] : index._offsets[text + 1]].tolist()
    whole = embedder.backbone.tokenizer.decode(ids)
    assert f"{near.before}{near.word}{near.after}" in whole and whole in CORPUS
    assert embedder.backbone.tokenizer.decode([ids[position]]).strip() in near.word


def test_a_word_is_shown_whole_in_its_sentence(smollm2):
    text = "First one. The photosynthesis of plants, which is slow! Then rain falls."
    ids = smollm2.tokenizer.encode([text], 99)[0]
    shown = [search.in_sentence(smollm2.tokenizer, ids, position) for position in range(len(ids))]
    assert ("The ", "photosynthesis", " of plants, which is slow!") in shown
    assert ("The photosynthesis of ", "plants", ", which is slow!") in shown
    assert ("Then rain ", "falls", ".") in shown and ("First ", "one", ".") in shown
    assert all("".join(part) in text for part in shown)
    long = smollm2.tokenizer.encode(["word " * 60 + "middle" + " word" * 60], 200)[0]
    before, word, after = search.in_sentence(smollm2.tokenizer, long, 60)
    assert word == "middle" and before.startswith("… ") and after.endswith(" …") and len(before) < 90


def test_latent_lens_compares_the_layers_that_are_asked_for(index_folder, embedder):
    index = search.Index(index_folder, embedder.backbone)
    found = search.latent_lens(embedder, index, TEXTS[:3], top_k=2, layers=["3", "1"], same_layer=True)
    assert [list(text) for text in found] == [[1, 3]] * 3
    states = compression_states(embedder, TEXTS[:3], [3])[:, 0]
    for text, state in zip(found, states):
        best = (postprocess.l2_normalize(state) @ index.vectors(3).T).max(axis=1)
        np.testing.assert_allclose([token[0].cosine for token in text[3]], best, atol=1e-6)
        assert all(near.layer == 3 for token in text[3] for near in token)
    assert search.latent_lens(embedder, index, []) == []
    free = search.latent_lens(embedder, index, TEXTS[:3], top_k=2, layers=[3])
    assert all(a[0].cosine >= b[0].cosine for one, two in zip(free, found) for a, b in zip(one[3], two[3]))
    for layers in (["4"], ["-1"], ["x"]):
        with pytest.raises(InputError, match=f"layers.*{layers[0]}"):
            search.latent_lens(embedder, index, TEXTS[:1], layers=layers)


def test_an_index_of_another_backbone_is_refused(index_folder, tiny, tmp_path):
    with pytest.raises(InputError, match="another backbone"):
        search.Index(index_folder, tiny("llama"))
    with pytest.raises(InputError, match="build_index"):
        search.Index(tmp_path, tiny("llama"))
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(InputError, match="its index.json is not of .*build_index"):
        search.Index(tmp_path, tiny("llama"))


def test_a_damaged_index_is_named(index_folder, embedder, tmp_path):
    for name in ("layer-01.npy", "contexts.npy"):
        folder = tmp_path / name
        shutil.copytree(index_folder, folder)
        content = bytearray((folder / name).read_bytes())
        content[-5] ^= 1
        (folder / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} was modified after it was built"):
            search.Index(folder, embedder.backbone).vectors(1)


def test_a_finished_index_that_cannot_be_renamed_is_kept(model_folder, corpus, tmp_path, monkeypatch):
    settings = config.BuildIndexConfig(
        input=str(corpus), dtype="float32", layers=["1"], contexts=20, output=str(tmp_path / "index")
    )

    def refuse(*_):
        raise OSError("not empty")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="not empty"):
        patch.setattr(index.os, "rename", refuse)
        index.build_index(model_folder, settings)
    before = contents(tmp_path / "index.partial")
    monkeypatch.setattr(index, "_states", refuse)  # nothing is computed again
    index.build_index(model_folder, settings)
    after = contents(tmp_path / "index")
    assert after == {name: before[name] for name in after} and "progress.json" not in after


@pytest.mark.parametrize("damaged", ["layer-01.npy", "ids.npy", None])
def test_an_interrupted_index_that_is_damaged_is_begun_again(
    model_folder, corpus, tmp_path, monkeypatch, damaged, messages
):
    common = {"input": str(corpus), "batch_size": 1, "dtype": "float32", "layers": ["1", "2"], "contexts": 100000}
    whole, cut = (config.BuildIndexConfig(**common, output=str(tmp_path / name)) for name in ("whole", "cut"))
    index.build_index(model_folder, whole)
    keep, calls = index._write_progress, []

    def stop(*arguments):
        keep(*arguments)
        calls.append(arguments[-1])
        if arguments[-1]:
            raise KeyboardInterrupt

    monkeypatch.setattr(index, "_FLUSH_EVERY", 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(index, "_write_progress", stop)
        index.build_index(model_folder, cut)
    if damaged:
        path = tmp_path / "cut.partial" / damaged
        content = bytearray(path.read_bytes())
        content[140] ^= 1  # of the first numbers, behind the header
        path.write_bytes(content if damaged == "ids.npy" else content[:200])
    messages()
    index.build_index(model_folder, cut)
    assert ("modified after it was written; started again" in messages()) == bool(damaged)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def contents(folder):
    return {path.name: path.read_bytes() for path in pathlib.Path(folder).iterdir()}


@pytest.mark.slow
def test_an_index_goes_on_after_a_kill_with_the_same_bytes(launch, model_folder, corpus, tmp_path):
    words = [f"input={corpus}", "contexts=100000", "contexts_per_token=1000", "batch_size=1", "dtype=float32"]
    done = launch(tmp_path, "lens", "build_index", str(model_folder), *words, "output=whole")
    assert done.wait(300) == 0, done.stderr.read()
    begun = launch(tmp_path, "lens", "build_index", str(model_folder), *words, "output=killed")
    journal = tmp_path / "killed.partial" / "progress.json"
    while begun.poll() is None and not (journal.exists() and json.loads(journal.read_text())["done"]):
        time.sleep(0.002)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert not (tmp_path / "killed").exists(), "it was faster than the kill"
    at = json.loads(journal.read_text())["done"]
    for layer in journal.parent.glob("layer-*.npy"):  # what is behind the record may be torn
        array = np.lib.format.open_memmap(layer, "r+")
        assert 0 < at < len(array)
        array[at:] = 7
        array.flush()
    other = launch(tmp_path, "lens", "build_index", str(model_folder), *words, "output=killed", "seed=1")
    _, errors = other.communicate()
    assert other.returncode == 2 and "config.seed: 0 -> 1" in errors
    again = launch(tmp_path, "lens", "build_index", str(model_folder), *words, "output=killed")
    assert again.wait(300) == 0, again.stderr.read()
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert sorted(os.listdir(tmp_path)) == ["killed", "whole"]


# Commands


def test_the_commands_of_the_lens(command, model_folder, index_folder, tmp_path, embedder):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS[:4]])
    common = [model_folder, f"input={texts}", "dtype=float32"]
    code, out, errors = command("lens logit", *common, "output=a.jsonl", "words=false", "top_k=2")
    assert (code, "written: a.jsonl (4 lines)" in out) == (0, True), errors
    rows = [json.loads(line) for line in pathlib.Path("a.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == TEXTS[:4]
    expected = embedder.logit_lens(TEXTS[:4], top_k=2)
    assert [[[one["text"] for one in token] for token in row["tokens"]] for row in rows] == [
        [[one.text for one in token] for token in text] for text in expected
    ]
    code, out, _ = command("lens logit", model_folder, "text=one", "words=false")
    assert (code, out.splitlines()[0]) == (0, "one") and len(out.strip().splitlines()) == 1 + K
    code, out, errors = command("lens query", *common, f"index={index_folder}", "output=b.jsonl", "layers=1,3")
    assert code == 0, errors
    rows = [json.loads(line) for line in pathlib.Path("b.jsonl").read_text().splitlines()]
    assert [(row["text"], row["layer"]) for row in rows] == [(text, layer) for text in TEXTS[:4] for layer in (1, 3)]
    assert {len(row["tokens"]) for row in rows} == {K} and {"word", "cosine", "layer"} < set(rows[0]["tokens"][0][0])
    code, out, _ = command("lens query", model_folder, "text=one", f"index={index_folder}", "top_k=1", "layers=2")
    assert code == 0 and out.startswith("one   [layer 2]\n") and len(out.strip().splitlines()) == 1 + K

    check_error(command("lens logit", *common, "output=a.jsonl"), "output=a.jsonl: already exists")
    check_error(command("lens logit", model_folder), "text= and input=")
    check_error(command("lens query", *common), "index is required")
    check_error(command("lens query", *common, f"index={tmp_path}"), "index.json", "build_index")
    check_error(command("lens build_index", model_folder, f"input={texts}", "output=i", "layers=9"), "layers: 9")
    check_error(command("lens logits", model_folder), "unknown action 'logits'", "did you mean 'logit'")
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "a"}])
    check_error(command("lens build_index", model_folder, f"input={short}", "output=i"), "more than 2 tokens")


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_generations_are_of_the_published_sample(command, model_folder, embedder, tmp_path, suffix):
    texts = [f'Text "{number}",\nof two lines' for number in range(30)]
    file = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    words = [model_folder, f"input={file}", "limit=5", "max_new_tokens=4", "dtype=float32"]
    code, _, errors = command("lens generations", *words, f"output=out.{suffix}")
    assert code == 0, errors
    raw = pathlib.Path(f"out.{suffix}").read_bytes().decode()
    rows = list(csv.DictReader(raw.splitlines(keepends=True))) if suffix == "csv" else None
    rows = rows or [json.loads(line) for line in raw.splitlines()]
    expected = datasets.Dataset.from_dict({"text": texts}).shuffle(seed=42).select(range(5))["text"]
    assert [row["input_text"] for row in rows] == list(expected)
    _, soft_prompts = embedder.encode(list(expected), return_soft_prompts=True)
    decoded = [row["output_text"].replace("\r\n", "\n") for row in rows]
    assert decoded == [text.replace("\r\n", "\n") for text in embedder.decode(soft_prompts, max_new_tokens=4)]
    check_error(command("lens generations", *words, "output=out.txt"), "out.txt", ".csv or .jsonl")
    assert generations.sample(texts, None, 0) == texts


def test_decode_reads_every_shard_of_a_folder(command, model_folder, tmp_path):
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in TEXTS[:6]])
    words = [f"input={texts}", "output=out", "shard_size=4", "save_soft_prompts=true"]
    assert command("encode", model_folder, *words)[0] == 0
    common = [model_folder, "max_new_tokens=5", "temperature=0.8", "top_p=0.9", "seed=3"]
    assert command("decode", *common, f"input={texts}", "output=a.jsonl")[0] == 0
    assert command("decode", *common, "soft_prompts=out", "output=b.jsonl")[0] == 0
    a, b = (pathlib.Path(name).read_text().splitlines() for name in ("a.jsonl", "b.jsonl"))
    assert [json.loads(line)["decoded"] for line in a] == [json.loads(line)["decoded"] for line in b]
    assert len(b) == 6
    assert command("encode", model_folder, f"input={texts}", "output=plain")[0] == 0
    check_error(command("decode", *common, "soft_prompts=plain"), "plain", "save_soft_prompts=true")
    check_error(command("decode", *common, f"soft_prompts={tmp_path}"), "manifest.json")
    assert shards.load_soft_prompts("out").shape == (6, K, 32) and E == 12
