"""Integrations return the embeddings of `LLM2VecGen.encode`, and the examples of docs/integrations.md run."""

import asyncio
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

import llm2vec_gen_jax
from llm2vec_gen_jax import LLM2VecGen

ROOT = pathlib.Path(llm2vec_gen_jax.__file__).parent
LIBRARIES = {
    "sentence_transformers": "sentence_transformers",
    "langchain": "langchain_core",
    "llama_index": "llama_index",
}
RECIPES = re.findall(r"```python\n(.*?)```", (ROOT.parent / "docs/integrations.md").read_text(), re.DOTALL)
TEXTS = ["", "a text", "longer: " + "words " * 40, "Grüße 🙂"]  # of different lengths
PROMPTS = {"query": "Find:", "document": "Read"}


@pytest.fixture
def model(embedder):
    """A model with prompts."""
    return LLM2VecGen(embedder.model, embedder.trainable, embedder.backbone, PROMPTS)


# sentence-transformers


@pytest.fixture
def sentence_transformer(model):
    """The model as a SentenceTransformer."""
    library = pytest.importorskip("sentence_transformers")
    from llm2vec_gen_jax.integrations.sentence_transformers import LLM2VecGenModule

    module = LLM2VecGenModule(model)
    return library.SentenceTransformer(modules=[module], prompts=module.prompts, device="cpu")


def test_a_sentence_transformer_gives_the_same_vectors(model, sentence_transformer):
    import torch

    np.testing.assert_array_equal(sentence_transformer.encode(TEXTS), model.encode(TEXTS))
    np.testing.assert_array_equal(sentence_transformer.encode("a text"), model.encode("a text"))
    tensor = sentence_transformer.encode(TEXTS, convert_to_tensor=True)
    assert tensor.dtype == torch.float32 and tensor.shape == (4, model.get_embedding_dimension())
    assert sentence_transformer.get_embedding_dimension() == model.get_embedding_dimension()
    short = sentence_transformer.encode(TEXTS, truncate_dim=5, normalize_embeddings=True)
    np.testing.assert_allclose(short, model.encode(TEXTS, truncate_dim=5, normalize_embeddings=True), rtol=1e-6)


def test_a_sentence_transformer_respects_prompts(model, sentence_transformer):
    for method in ("encode_query", "encode_document"):
        result = getattr(sentence_transformer, method)(TEXTS)
        np.testing.assert_array_equal(result, getattr(model, method)(TEXTS))
        assert (result != model.encode(TEXTS)).any()
    result = sentence_transformer.encode(TEXTS, prompt="Another: ")
    np.testing.assert_array_equal(result, model.encode(TEXTS, prompt="Another:"))


def test_a_sentence_transformer_truncates_like_the_model(model, sentence_transformer):
    sentence_transformer.max_seq_length = 20
    expected = model.encode(TEXTS, max_length=20)
    np.testing.assert_array_equal(sentence_transformer.encode(TEXTS), expected)
    assert (expected != model.encode(TEXTS, max_length=40)).any()


def test_a_sentence_transformer_is_saved_and_loaded(model, sentence_transformer, tmp_path):
    expected = model.encode_query(TEXTS)
    sentence_transformer.save_pretrained(str(tmp_path / "saved"))
    again = type(sentence_transformer)(str(tmp_path / "saved"), trust_remote_code=True, device="cpu")
    np.testing.assert_allclose(again.encode_query(TEXTS), expected, rtol=1e-5, atol=1e-5)  # on all devices of the test


def test_hub_options_reach_the_backbone_of_a_saved_module(sentence_transformer, tmp_path, monkeypatch):
    sentence_transformer.save_pretrained(str(tmp_path / "saved"))
    given = {}

    def from_pretrained(path, **options):
        given.update(options)
        return load(path, **options)

    load = LLM2VecGen.from_pretrained
    monkeypatch.setattr(LLM2VecGen, "from_pretrained", from_pretrained)
    options = {"token": "hf_secret", "cache_folder": str(tmp_path / "cache"), "local_files_only": True}
    type(sentence_transformer)(str(tmp_path / "saved"), trust_remote_code=True, device="cpu", **options)
    assert given == {"token": "hf_secret", "cache_dir": str(tmp_path / "cache"), "local_files_only": True}


# LangChain and LlamaIndex


def test_langchain_gives_the_same_vectors(model):
    pytest.importorskip("langchain_core")
    from llm2vec_gen_jax.integrations.langchain import LLM2VecGenEmbeddings

    embeddings = LLM2VecGenEmbeddings(model, truncate_dim=7)
    query, documents = (
        model.encode(TEXTS[1], prompt="Find:", truncate_dim=7),
        model.encode_document(TEXTS, truncate_dim=7),
    )

    async def both():
        return await asyncio.gather(embeddings.aembed_query(TEXTS[1]), embeddings.aembed_documents(TEXTS))

    for result in ((embeddings.embed_query(TEXTS[1]), embeddings.embed_documents(TEXTS)), asyncio.run(both())):
        assert result == (query.tolist(), documents.tolist()) or result == [query.tolist(), documents.tolist()]


def test_llama_index_gives_the_same_vectors(model):
    pytest.importorskip("llama_index.core")
    from llm2vec_gen_jax.integrations.llama_index import LLM2VecGenEmbedding

    embedding = LLM2VecGenEmbedding(model, {"truncate_dim": 7})
    query, one = (model.encode(TEXTS[1], prompt=PROMPTS[name], truncate_dim=7).tolist() for name in PROMPTS)
    many = model.encode_document(TEXTS, truncate_dim=7).tolist()
    assert embedding.get_query_embedding(TEXTS[1]) == query
    assert embedding.get_text_embedding(TEXTS[1]) == one
    assert embedding.get_text_embedding_batch(TEXTS) == many
    assert asyncio.run(embedding.aget_query_embedding(TEXTS[1])) == query
    assert asyncio.run(embedding.aget_text_embedding(TEXTS[1])) == one
    assert asyncio.run(embedding.aget_text_embedding_batch(TEXTS)) == many


# All


@pytest.mark.parametrize("number, library", list(enumerate(LIBRARIES)))
def test_examples_run(number, library, model_folder, capsys):
    pytest.importorskip(LIBRARIES[library])
    recipe = RECIPES[number]
    assert f"llm2vec_gen_jax.integrations.{library} import" in recipe
    exec(compile(recipe.replace('"MODEL"', repr(str(model_folder))), f"recipe {library}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_no_optional_library_is_imported():
    modules = {path.stem for path in (ROOT / "integrations").glob("[a-z]*.py")}
    assert modules == {*LIBRARIES, "verify", "pytorch_encode"}
    code = "import sys, llm2vec_gen_jax.integrations; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT.parent, text=True).split()
    assert not {"torch", *LIBRARIES.values()} & set(modules)
    for path in ROOT.rglob("*.py"):
        for library in LIBRARIES:
            assert f"integrations.{library} import" not in path.read_text(), f"{path} imports an adapter"
