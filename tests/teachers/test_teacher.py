"""Alignment targets equal torch's with PEFT adapters merged; adapters that do not fit are named."""

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch

from llm2vec_gen_jax import config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.formats import peft, weights
from llm2vec_gen_jax.pretrained.backbone import TEACHERS, load_backbone, resolve_adapter
from llm2vec_gen_jax.teachers import encoder
from llm2vec_gen_jax.training.train import train
from tests.conftest import one_device_mesh, tiny_torch_model, torch_outputs
from tests.helpers.adapters import ANSWERS, FAMILY, LORA, SHAPES, targets, write_adapter


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
def test_targets_equal_torch_with_the_adapter_added(tiny, tiny_folder, tmp_path, responses, more, ranks, scale):
    adapter = write_adapter(tmp_path / "adapter", LORA | more, ranks)
    backbone = load_backbone(str(tiny_folder(FAMILY)), "float32", one_device_mesh())
    before = jax.tree.map(np.array, backbone.frozen)
    found = targets(backbone, tiny_folder, responses, f"teacher.adapters={adapter}")
    model = tiny_torch_model(FAMILY)
    ids = tiny(FAMILY).tokenizer.encode(ANSWERS, 512)
    plain = pooled(model, ids, causal=False)
    add_adapter(model, adapter, {key: scale(key, rank) for key, rank in ranks.items()})
    expected = pooled(model, ids, causal=False)  # auto: bidirectional, because there is an adapter
    np.testing.assert_allclose(found, expected, atol=2e-5)
    assert np.abs(expected - plain).max() > 0.1
    jax.tree.map(np.testing.assert_array_equal, backbone.frozen, before)  # the student's backbone is the plain one


def test_two_adapters_are_merged_one_after_the_other(tiny, tiny_folder, tmp_path, responses):
    mntp = write_adapter(tmp_path / "mntp", LORA, EVERYWHERE, seed=1)
    # As LLM2Vec's second adapter names its weights.
    simcse = write_adapter(tmp_path / "simcse", LORA | {"lora_alpha": 4}, SOME, seed=2, prefix="layers")
    backbone = load_backbone(str(tiny_folder(FAMILY)), "float32", one_device_mesh())
    words = (f"teacher.adapters={mntp},{simcse}", "teacher.attention=causal")
    found = targets(backbone, tiny_folder, responses, *words)
    model = tiny_torch_model(FAMILY)
    add_adapter(model, mntp, {key: 3 for key in EVERYWHERE})
    add_adapter(model, simcse, {key: 1 for key in SOME})
    expected = pooled(model, tiny(FAMILY).tokenizer.encode(ANSWERS, 512), causal=True)
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
    frozen = peft.merge(backbone.frozen, [tmp_path / "adapter"], backbone.architecture)
    plain = load_backbone(str(tiny_folder(family)), "float32", one_device_mesh()).frozen
    moved = 0
    for (name, ours), (_, before) in zip(*(weights.tensors(tree, backbone.architecture) for tree in (frozen, plain))):
        if name != "lm_head.weight":
            np.testing.assert_allclose(ours, merged[name.removeprefix("model.")].numpy(), atol=1e-5, rtol=0)
            moved += np.abs(ours - before).max() > 0.01
    assert moved >= 7


@pytest.mark.parametrize("attention, causal", [("auto", True), ("causal", True), ("bidirectional", False)])
def test_targets_of_the_backbone_itself_equal_torch(tiny, tiny_folder, responses, attention, causal):
    found = targets(tiny(FAMILY), tiny_folder, responses, f"teacher.attention={attention}")
    expected = pooled(tiny_torch_model(FAMILY), tiny(FAMILY).tokenizer.encode(ANSWERS, 512), causal)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_another_backbone_teaches_and_the_student_keeps_its_weights(tiny, tiny_folder, tmp_path, responses):
    adapter = write_adapter(tmp_path / "adapter", LORA, SOME)
    student = load_backbone(str(tiny_folder("llama3")), "float32", one_device_mesh())
    before = jax.tree.map(np.array, student.frozen)
    words = (f"backbone.path={tiny_folder('llama3')}", f"teacher.path={tiny_folder(FAMILY)}")
    found = targets(student, tiny_folder, responses, *words, f"teacher.adapters={adapter}")
    model = tiny_torch_model(FAMILY)
    add_adapter(model, adapter, {key: 3 for key in SOME})
    expected = pooled(model, tiny(FAMILY).tokenizer.encode(ANSWERS, 512), causal=False)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    jax.tree.map(np.testing.assert_array_equal, student.frozen, before)
    again = targets(student, tiny_folder, responses, *words, f"teacher.adapters={adapter}")
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
        ("rank_pattern", "none"),
        ("alpha_pattern", {"(": 4}),
    ],
)
def test_an_adapter_that_is_not_plain_lora_is_named(tiny, tmp_path, field, value):
    settings = {key: old for key, old in (LORA | {field: value}).items() if value is not None or key != field}
    adapter = write_adapter(tmp_path / "adapter", settings, SOME)
    with pytest.raises(InputError, match=f"adapter_config.json: {field}"):
        peft.merge(tiny(FAMILY).frozen, [adapter], tiny(FAMILY).architecture)


def test_adapter_weights_that_do_not_fit_are_named(tiny, tmp_path):
    def merge(name, change, settings=LORA):
        adapter = tmp_path / name
        write_adapter(adapter, settings, SOME)
        file = adapter / "adapter_model.safetensors"
        safetensors.numpy.save_file(change(safetensors.numpy.load_file(file)), file)
        peft.merge(tiny(FAMILY).frozen, [str(adapter)], tiny(FAMILY).architecture)

    name = "base_model.model.model.layers.{}.lora_A.weight"
    one = np.ones((4, 32), np.float32)
    for layer, key in (("key", "3.self_attn.q_proj"), ("module", "0.self_attn.qkv_proj")):
        with pytest.raises(InputError, match=f"layers.{key}.lora_A.weight is not a LoRA weight"):
            merge(layer, lambda tensors, key=key: tensors | {name.format(key): one})
    with pytest.raises(InputError, match="layers.0.self_attn.q_proj has only lora_B"):
        merge("half", lambda tensors: {k: v for k, v in tensors.items() if k != name.format("0.self_attn.q_proj")})
    with pytest.raises(InputError, match="q_proj has rank 4, expected 8"):
        merge("rank", lambda tensors: tensors, LORA | {"r": 8})
    with pytest.raises(InputError, match="no LoRA weights"):
        merge("empty", lambda tensors: {})
    with pytest.raises(InputError, match=r"layers.0.self_attn.q_proj has shapes .*\(4, 30\).*weight \(32, 32\)"):
        merge("shape", lambda tensors: tensors | {name.format("0.self_attn.q_proj"): one[:, :30].copy()})
    (tmp_path / "rank/adapter_model.safetensors").write_bytes(b"\0" * 40)
    with pytest.raises(InputError, match="adapter_model.safetensors: damaged or truncated"):
        peft.merge(tiny(FAMILY).frozen, [str(tmp_path / "rank")], tiny(FAMILY).architecture)


def test_a_missing_adapter_is_named(tiny, tiny_folder, responses, tmp_path):
    (tmp_path / "empty").mkdir()
    for path, expected in ((tmp_path / "empty", "adapter_config.json"), (tmp_path / "none", "adapter_config.json")):
        with pytest.raises(InputError, match=f"{path}: not a PEFT adapter: no {expected}"):
            targets(tiny(FAMILY), tiny_folder, responses, f"teacher.adapters={path}")


def test_the_default_backbones_teacher_knows_paraphrases():
    """The adapters that come with the package, on pairs from nobody's data: (text, the same, words in common only)."""
    triples = (
        ("A child is playing the piano.", "A kid plays a keyboard instrument.", "A child is eating the pear."),
        ("The bank raised its interest rates.", "Borrowing became dearer.", "The river rose above its banks."),
        ("How can I get my money back?", "I want a refund.", "How can I get my monkey to sleep?"),
    )
    backbone = load_backbone("smollm2-135m", "float32", one_device_mesh())  # merging takes its weights
    causal = spread(backbone, backbone.frozen, True, triples)
    frozen = peft.merge(backbone.frozen, map(resolve_adapter, TEACHERS), backbone.architecture)
    trained = spread(backbone, frozen, False, triples)
    assert (trained > causal).all() and (trained > 0).sum() >= 2


def spread(backbone, frozen, causal, triples):
    """Cosine of each first text with the second less that with the third."""
    ids = backbone.tokenizer.encode([text for triple in triples for text in triple], 64)
    pooled = encoder.pool_rows(backbone.architecture, frozen, causal, ids, (len(ids), 16), backbone.execution)
    pooled = (pooled / np.linalg.norm(pooled, axis=1, keepdims=True)).reshape(len(triples), 3, -1)
    return (pooled[:, 0] * (pooled[:, 1] - pooled[:, 2])).sum(axis=1)


def test_adapters_of_a_teacher_that_reads_none_are_refused(tiny, tiny_folder, responses, tmp_path):
    words = (f"data.responses={responses}", f"train.output={tmp_path / 'run'}", "teacher.adapters=[a]")
    words += (f"backbone.path={tiny_folder(FAMILY)}", "teacher.kind=file", "teacher.path=targets.npy")
    with pytest.raises(InputError, match="teacher.adapters are for teacher.kind=llm2vec, not for file"):
        train(options.load(config.TrainConfig, None, words), False, tiny(FAMILY))
