"""`SentenceTransformer(MODEL_DIRECTORY)` computes in PyTorch, without JAX and this package, the vectors of this one."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import published
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from tests.conftest import one_device_mesh
from tests.helpers.conversion import load, new_model
from tests.helpers.hub import COMMIT, add_to_cache
from tests.helpers.tiny import tiny_tokenizer

library = pytest.importorskip("sentence_transformers")

FILES = {"modules.json", "config_sentence_transformers.json", "llm2vec_gen_module.py"}
TEXTS = ["", "a text", "longer: " + "words " * 40, "Grüße 🙂", "<|im_end|> <question1> are text"]  # mixed lengths
PROMPTS = {"query": "Find:", "document": "Read"}
# A process where neither JAX nor this package nor the published one can be imported.
SCRIPT = """
import json, sys
for name in ("jax", "flax", "llm2vec_gen_jax", "llm2vec_gen"):
    sys.modules[name] = None
import numpy as np
from sentence_transformers import SentenceTransformer

folder, out = sys.argv[1:]
texts = json.loads(sys.stdin.read())
model = SentenceTransformer(folder, trust_remote_code=True, device="cpu")
np.savez(out, plain=model.encode(texts), query=model.encode_query(texts), document=model.encode_document(texts))
"""


def open_folder(folder, **options):
    return library.SentenceTransformer(str(folder), trust_remote_code=True, device="cpu", **options)


def assert_same(found, expected, tolerance=1e-5):
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """(family, rank of the LoRA) -> (model with two thought tokens, its directory), made once."""
    made = {}

    def make(family="qwen3", rank=0):
        if (family, rank) not in made:
            bare = new_model(tiny(family), rank)
            model = LLM2VecGen(bare.model, bare.trainable, bare.backbone, PROMPTS)
            folder = tmp_path_factory.mktemp(family) / "model"
            model.save_pretrained(folder)
            made[family, rank] = model, folder
        return made[family, rank]

    return make


@pytest.mark.parametrize("family, rank", [("llama", 0), ("llama3", 2), ("qwen2", 2), ("qwen3", 0), ("qwen3", 2)])
def test_the_vectors_are_the_same(saved, family, rank):
    model, folder = saved(family, rank)
    other = open_folder(folder)
    assert_same(other.encode(TEXTS), model.encode(TEXTS))
    assert_same(other.encode(TEXTS, batch_size=1), model.encode(TEXTS))
    assert_same(other.encode(TEXTS[1]), model.encode(TEXTS[1]))
    assert other.get_embedding_dimension() == model.get_embedding_dimension()
    options = {"truncate_dim": 5, "normalize_embeddings": True}
    assert_same(other.encode(TEXTS, **options), model.encode(TEXTS, **options))
    assert other.similarity_fn_name == "cosine"
    assert_same(other.similarity(*2 * [other.encode(TEXTS)]), model.similarity(*2 * [model.encode(TEXTS)]))


def test_prompts_are_those_of_the_model(saved):
    model, folder = saved()
    other = open_folder(folder)
    assert other.prompts == {"query": "Find: ", "document": "Read "}
    assert_same(other.encode_query(TEXTS), model.encode_query(TEXTS))
    assert_same(other.encode_document(TEXTS), model.encode_document(TEXTS))
    assert_same(other.encode(TEXTS, prompt_name="document"), model.encode(TEXTS, prompt_name="document"))
    assert_same(other.encode(TEXTS, prompt="Another: "), model.encode(TEXTS, prompt="Another:"))
    again = open_folder(folder, prompts={"query": "Own: "})
    assert_same(again.encode_query(TEXTS), model.encode(TEXTS, prompt="Own:"))


def test_long_texts_are_truncated_with_room_for_the_tokens(saved):
    model, folder = saved()
    other = open_folder(folder)
    assert other.max_seq_length == model.max_seq_length
    other.max_seq_length = 20
    assert other.preprocess(TEXTS)["input_ids"].shape == (len(TEXTS), 20)
    expected = model.encode(TEXTS, max_length=20)
    assert_same(other.encode(TEXTS), expected)
    assert np.abs(expected - model.encode(TEXTS, max_length=40)).max() > 1e-3
    other.max_seq_length = 12
    with pytest.raises(ValueError, match="max_seq_length must exceed the 12 appended tokens"):
        other.encode(TEXTS)


def test_the_backbone_is_loaded_at_its_recorded_revision(tiny, tiny_folder, tmp_path):
    bare = new_model(tiny("qwen3"))
    backbone = dataclasses.replace(bare.backbone, name="someone/tiny", revision="v1")
    model = LLM2VecGen(bare.model, bare.trainable, backbone)
    model.save_pretrained(tmp_path / "model")
    add_to_cache(tmp_path / "cache", tiny_folder("qwen3"), "v1", COMMIT, "someone/tiny")
    other = open_folder(tmp_path / "model", cache_folder=str(tmp_path / "cache"), local_files_only=True)
    assert_same(other.encode(TEXTS), model.encode(TEXTS))


def test_a_directory_without_modules_is_not_opened(saved, tmp_path):
    """docs/pytorch.md tells the fix for this message."""
    _, folder = saved("qwen3", 0)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "modules.json").unlink()
    with pytest.raises(ValueError, match="Unrecognized model in .*copy"):
        open_folder(tmp_path / "copy")


def test_padding_may_be_on_the_left(saved):
    import torch

    model, folder = saved("qwen2", 2)
    module = open_folder(folder)[0]
    features = module.preprocess(TEXTS)
    length = features["attention_mask"].shape[1]
    for row, count in enumerate(features["attention_mask"].sum(dim=1).tolist()):
        for values in features.values():
            values[row] = values[row].roll(length - count)
    with torch.no_grad():
        assert_same(module(features)["sentence_embedding"].numpy(), model.encode(TEXTS))


def test_it_is_saved_and_loaded_again(saved, tmp_path):
    model, folder = saved("llama", 2)
    other = open_folder(folder)
    other.max_seq_length = 40
    other.save_pretrained(str(tmp_path / "saved"))
    shutil.move(tmp_path / "saved", tmp_path / "moved")
    again = open_folder(tmp_path / "moved")
    expected = model.encode_query(TEXTS, max_length=40)
    assert again.max_seq_length == 40
    assert_same(again.encode_query(TEXTS), expected)
    again.save_pretrained(str(tmp_path / "moved"))  # in place
    assert_same(open_folder(tmp_path / "moved").encode_query(TEXTS), expected)
    assert_same(load(tmp_path / "moved").encode(TEXTS), model.encode(TEXTS))  # still a model directory
    assert (tmp_path / "moved" / "README.md").read_text() == (folder / "README.md").read_text()


def test_prompts_come_back_from_a_sentence_transformer(saved, tmp_path):
    model, folder = saved()
    assert load(folder).prompts == PROMPTS
    assert LLM2VecGen.from_pretrained(folder, "float32", prompts={}).prompts == {}
    other = open_folder(folder)
    other.prompts |= {"document": None, "query": "Seek: ", "empty": ""}
    other.save_pretrained(str(tmp_path / "saved"))
    again = load(tmp_path / "saved")
    assert again.prompts == {"query": "Seek:", "empty": ""}
    assert_same(again.encode_query(TEXTS), other.encode_query(TEXTS))
    again.save_pretrained(tmp_path / "again")
    assert load(tmp_path / "again").prompts == again.prompts


def test_a_prompt_without_a_space_is_ignored_with_a_warning(saved, tmp_path, messages):
    shutil.copytree(saved()[1], tmp_path / "model")
    file = tmp_path / "model" / "config_sentence_transformers.json"
    file.write_text('{"prompts": {"query": "Query:", "document": "Read "}}')
    assert load(tmp_path / "model").prompts == {"document": "Read"}
    assert f"{file}: prompts['query'] is ignored" in messages()


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "expected a JSON object"),
        ('{"prompts": ["Find: "]}', "prompts is ['Find: '], expected names and texts"),
        ('{"prompts": {"query": 3}}', "prompts['query'] is 3, expected a text"),
        ('{"prompts": {"query": {"a": "b"}}}', "prompts['query'] is {'a': 'b'}, expected a text"),
        ('{"prompts": {"query": "\\ud800 "}}', "prompts['query'] is '\\ud800 ', expected a text"),
        ('{"prompts": {"a\\nb": 1}}', "prompts['a\\nb'] is 1"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_damaged_prompts_are_named(saved, tmp_path, text, message):
    shutil.copytree(saved()[1], tmp_path / "model")
    file = tmp_path / "model" / "config_sentence_transformers.json"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        load(tmp_path / "model")
    assert f"{file}: " in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)
    assert LLM2VecGen.from_pretrained(tmp_path / "model", "float32", prompts=PROMPTS).prompts == PROMPTS


# One compression token: no code in the folder


@pytest.fixture(scope="module")
def merged(tiny, tmp_path_factory):
    """(family, rank of the LoRA) -> (model with nine thought tokens and one compression token, its merged folder)."""

    def make(family, rank):
        bare = new_model(tiny(family), rank, thoughts=9, count=1)
        model = LLM2VecGen(bare.model, bare.trainable, bare.backbone, PROMPTS)
        folder = tmp_path_factory.mktemp(family) / "merged"
        model.save_merged(folder)
        return model, folder

    return make


@pytest.mark.parametrize(
    "family, rank",
    [("llama3", 2), ("qwen3", 0), *(pytest.param(family, 2, marks=pytest.mark.slow) for family in ("llama", "qwen2"))],
)
def test_one_compression_token_needs_no_code(merged, tmp_path, family, rank):
    model, folder = merged(family, rank)
    assert not list(folder.rglob("*.py"))
    [example] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    names = {"FOLDER": str(folder), "texts": TEXTS}
    exec(compile(example, "example", "exec"), names)  # noqa: S102
    other = names["model"]
    other.save_pretrained(str(tmp_path / "saved"))
    expected, queries = model.encode(TEXTS), model.encode_query(TEXTS)
    assert_same(names["embeddings"], expected)
    for loaded in (other, library.SentenceTransformer(str(tmp_path / "saved"), device="cpu")):
        assert loaded.max_seq_length == model.max_seq_length and loaded.similarity_fn_name == "cosine"
        assert loaded.get_embedding_dimension() == model.get_embedding_dimension()
        assert_same(loaded.encode(TEXTS), expected)
        assert_same(loaded.encode(TEXTS, batch_size=1), expected)
        assert_same(loaded.encode_query(TEXTS), queries)
        loaded.max_seq_length = 20
        assert loaded.preprocess(TEXTS)["input_ids"].shape == (len(TEXTS), 20)
        assert_same(loaded.encode(TEXTS), model.encode(TEXTS, max_length=20))
    assert np.abs(expected - model.encode(TEXTS, max_length=20)).max() > 1e-3


def test_heads_have_the_dtype_of_the_merged_backbone_or_the_one_that_is_chosen(tiny_folder, tmp_path):
    model = new_model(load_backbone(str(tiny_folder("qwen3")), "bfloat16", one_device_mesh()), count=1)
    model.save_merged(tmp_path / "merged")
    half = library.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    full = library.SentenceTransformer(str(tmp_path / "merged"), device="cpu", model_kwargs={"dtype": "float32"})
    kernel = np.asarray(model.trainable["alignment"]["kernel"])
    np.testing.assert_array_equal(full[3].linear.weight.detach().numpy().T, kernel)
    assert str(half[3].linear.weight.dtype) == "torch.bfloat16"
    found, expected = half.encode(TEXTS), full.encode(TEXTS)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.1 * np.abs(expected).max())


@pytest.mark.slow
def test_one_compression_token_on_the_default_backbone(smollm2, optimized, tmp_path):
    model = new_model(smollm2, thoughts=9, count=1, width=64)
    model.save_merged(tmp_path / "merged")
    texts = [*TEXTS, "In 1987, 12345 of them; déjà vu, 你好 🙂", "a long text " * 300]
    other = library.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert_same(other.encode(texts), model.encode(texts))


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("byte_level", [False, True])
def test_the_tokenizer_appends_the_tokens_after_those_that_it_adds(tmp_path, bos, byte_level):
    from tokenizers import processors
    from transformers import AutoTokenizer

    hf = tiny_tokenizer(bos)
    if byte_level:
        parts = [processors.ByteLevel(trim_offsets=False), hf.backend_tokenizer.post_processor]
        hf.backend_tokenizer.post_processor = processors.Sequence([part for part in parts if part])
    names = ["<question1>", "<question2>"]
    published.write_tokenizer(tmp_path, hf, names, append=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    start = [3] if bos else []
    added = tokenizer.convert_tokens_to_ids(names)
    assert added == [260, 261]
    text = hf.backend_tokenizer.encode("a <b", add_special_tokens=False).ids
    assert tokenizer("a <b")["input_ids"] == start + text + added
    assert tokenizer("a <b", truncation=True, max_length=5)["input_ids"] == start + text[: 3 - bos] + added
    assert not set(added) & set(tokenizer("<question1>")["input_ids"][:-2])


def test_half_precision_can_be_chosen(saved):
    import torch

    model, folder = saved()
    other = open_folder(folder, model_kwargs={"dtype": torch.bfloat16})
    assert other[0].encoder.dtype == torch.bfloat16
    found, expected = other.encode(TEXTS), model.encode(TEXTS)
    assert found.dtype == np.float32 and not np.array_equal(found, expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=0.1 * np.abs(expected).max())


def test_nothing_is_trained(saved):
    assert not any(parameter.requires_grad for parameter in open_folder(saved()[1]).parameters())


def test_it_runs_where_neither_jax_nor_this_package_is(saved, tmp_path):
    model, folder = saved("qwen3", 2)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["HF_MODULES_CACHE"] = str(tmp_path / "modules")
    command = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "out.npz")]
    subprocess.run(command, input=json.dumps(TEXTS), text=True, check=True, cwd=tmp_path, env=environment)
    with np.load(tmp_path / "out.npz") as found:
        assert_same(found["plain"], model.encode(TEXTS))
        assert_same(found["query"], model.encode_query(TEXTS))
        assert_same(found["document"], model.encode_document(TEXTS))


def test_convert_writes_it(saved, command, tmp_path):
    model, folder = saved()
    words = (folder, f"output={tmp_path / 'pt'}", f"backbone_output={tmp_path / 'backbone'}")
    code, _, errors = command("convert to_pytorch", *words)
    assert code == 0, errors
    assert FILES <= {path.name for path in (tmp_path / "pt").iterdir()}
    assert_same(open_folder(tmp_path / "pt").encode(TEXTS), model.encode(TEXTS))


def test_a_gguf_backbone_has_no_torch_files(saved, tmp_path):
    model, _ = saved()
    for name in ("smollm2-135m", "/a/model.gguf"):
        target = tmp_path / name.replace("/", "-")
        model_directory.save(target, model.model, model.trainable, model.backbone, {}, name=name)
        assert not FILES & {path.name for path in target.iterdir()}
        card = (target / "README.md").read_text()
        assert "convert to_pytorch" in card and 'SentenceTransformer("model-pt", trust_remote_code=True)' in card


@pytest.mark.slow
def test_the_default_model_gives_the_same_vectors(optimized, command, tmp_path):
    target = tmp_path / "pt"
    code, _, errors = command("convert to_pytorch", "smollm2-135m", f"output={target}", "dtype=float32")
    assert code == 0, errors
    texts = [*TEXTS[1:], "a long text " * 300]
    # Its alignment head, from a ridge regression, amplifies rounding differences than a trained one does.
    assert_same(open_folder(target).encode(texts), load(target).encode(texts), 1e-4)


@pytest.mark.parametrize("name", ["/no/such/folder", "no-such-name", "owner/not-there"])
def test_a_missing_backbone_is_named(saved, tmp_path, name):
    folder = tmp_path / "model"
    shutil.copytree(saved()[1], folder)
    run = folder / "run_config.yml"
    lines = run.read_text().splitlines()
    lines = [f"model_name_or_path: {name}" if line.startswith("model_name_or_path") else line for line in lines]
    run.write_text("\n".join(lines))
    with pytest.raises(FileNotFoundError) as caught:
        open_folder(folder)
    message = str(caught.value)
    assert f"the backbone {name} cannot be loaded" in message and str(run) in message and "\n" not in message


def test_wrong_inputs_are_refused(saved):
    other = open_folder(saved()[1])
    with pytest.raises(ValueError, match="must be strings"):
        other.encode([("a", "pair")])
    with pytest.raises(ValueError, match="trust_remote_code"):
        library.SentenceTransformer(str(saved()[1]), device="cpu")
