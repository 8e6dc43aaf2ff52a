"""PEFT folders on the tiny models, and the targets of teachers."""

import hashlib
import json

import numpy as np
import safetensors.numpy

from llm2vec_gen_jax import config
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.teachers.targets import compute_targets

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


def settings_of(tiny_folder, *words):
    return options.load(config.TrainConfig, None, [f"backbone.path={tiny_folder(FAMILY)}", *words])


def targets(backbone, tiny_folder, responses, *words, answers=ANSWERS):
    return compute_targets(backbone, settings_of(tiny_folder, *words), answers, str(responses))


def kept(responses):
    """The files of targets. Beside them must be their records alone."""
    found = sorted(responses.with_name("responses.jsonl.targets").iterdir())
    whole = [path for path in found if path.suffix == ".npy"]
    assert found == sorted([*whole, *(path.with_suffix(".json") for path in whole)])
    return whole


def interrupted(file, targets, order, done):
    """Leaves what a computation of `file` leaves that was ended when `done` texts were through."""
    file.unlink(missing_ok=True)
    cut = np.zeros_like(targets)
    cut[order[:done]] = targets[order[:done]]
    np.save(file.with_suffix(".partial.npy"), cut)
    digest = hashlib.sha256(cut[order[:done]].tobytes()).hexdigest()
    record = {"done": done, "shape": list(cut.shape), "sha256": digest}
    file.with_suffix(".partial.json").write_text(json.dumps(record))
