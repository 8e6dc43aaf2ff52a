"""Export of merged encoders and of backbones: plain transformers models, in several files, by several processes."""

import dataclasses
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.common.files import read_json
from llm2vec_gen_jax.formats import hf
from llm2vec_gen_jax.integrations.verify import TEXTS
from llm2vec_gen_jax.model.architecture import to_hf_config
from llm2vec_gen_jax.pretrained import export
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from tests.conftest import one_device_mesh, tiny_torch_model
from tests.formats.test_gguf import write_gguf
from tests.helpers.conversion import new_model, same_trees
from tests.helpers.processes import Process, environment, free_port


@pytest.mark.parametrize("family, rank", [("qwen3", 4), ("llama", 0)])
def test_the_merged_encoder_is_a_plain_transformers_model(tiny, tmp_path, family, rank):
    ours = new_model(tiny(family), rank)
    before = jax.tree.map(np.array, ours.backbone.frozen)
    ours.save_merged(tmp_path / "merged")
    same_trees(ours.backbone.frozen, before)
    [example] = re.findall(r"```python\n(.*?)```", (tmp_path / "merged" / "README.md").read_text(), re.DOTALL)
    names = {"FOLDER": str(tmp_path / "merged"), "texts": list(TEXTS[:6])}
    exec(compile(example, "example", "exec"), names)  # noqa: S102
    np.testing.assert_allclose(names["embeddings"].detach().numpy(), ours.encode(names["texts"]), atol=1e-4, rtol=0)


def test_large_backbones_are_written_in_several_files(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(hf, "MAX_FILE_BYTES", 20_000)
    export.save_backbone(tiny("llama"), tmp_path / "many")
    files = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 3 and all(f"-of-{len(files):05}" in name for name in files)
    again = load_backbone(str(tmp_path / "many"), "float32", one_device_mesh())
    same_trees(again.frozen, tiny("llama").frozen)
    assert again.identity == tiny("llama").identity


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_an_exported_config_has_the_maximum_length(tiny_folder, tmp_path, kind):
    """vLLM limits prompts to it; without it, a Llama gets transformers' default of 2,048."""
    source = tiny_folder("llama") if kind == "folder" else write_gguf(tmp_path / "m.gguf", tiny_torch_model("llama"))
    backbone = load_backbone(str(source), "float32", one_device_mesh())
    export.save_backbone(backbone, tmp_path / "exported")
    assert read_json(tmp_path / "exported" / "config.json")["max_position_embeddings"] == 1024
    without = dataclasses.replace(backbone.architecture, max_position_embeddings=None)
    assert without == backbone.architecture and without.to_dict() == backbone.architecture.to_dict()
    model = new_model(backbone)
    other = dataclasses.replace(model.model, architecture=without)
    assert LLM2VecGen(other, model.trainable, backbone).identity == model.identity
    export.save_backbone(dataclasses.replace(backbone, architecture=without), tmp_path / "without")
    again = load_backbone(str(tmp_path / "without"), "float32", one_device_mesh())
    assert again.identity == backbone.identity and "max_position_embeddings" not in to_hf_config(again.architecture)


ONE_OF_TWO = """
import sys
import jax
port, rank, backbone, model, output = sys.argv[1:]
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", 2, int(rank))
from llm2vec_gen_jax import LLM2VecGen, config
from llm2vec_gen_jax.pretrained import export
assert len(jax.devices()) == 8 and len(jax.local_devices()) == 4
embedder = LLM2VecGen.from_pretrained(model, "float32", backbone, config.MeshConfig(data=1, fsdp=4, tensor=2))
assert not embedder.backbone.frozen["embedding"].is_fully_addressable
embedder.save_pretrained(f"{output}/model")
embedder.save_merged(f"{output}/merged")
export.save_backbone(embedder.backbone, f"{output}/backbone")
"""


def test_two_processes_write_what_one_does(tiny, tiny_folder, tmp_path):
    """Weights split over two real processes of four devices: gathered one by one, written once, byte for byte."""
    port = free_port()
    one = new_model(tiny("qwen3"), 4)
    one.save_pretrained(tmp_path / "one" / "model")
    again = LLM2VecGen.from_pretrained(tmp_path / "one" / "model", "float32", mesh=one_device_mesh())
    again.save_merged(tmp_path / "one" / "merged")
    export.save_backbone(again.backbone, tmp_path / "one" / "backbone")
    words = [str(tiny_folder("qwen3")), str(tmp_path / "one" / "model"), str(tmp_path / "two")]
    started = [
        Process(
            [sys.executable, "-c", ONE_OF_TWO, str(port), str(rank), *words],
            env=environment(4),
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in started:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
    first, second = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert first.keys() == second.keys()
    differing = {str(path) for path in first if first[path] != second[path]}
    # The card names its folder; a merged weight is a sum, which devices may take in another order.
    assert differing <= {"model/README.md", "merged/model.safetensors"}
    merged = [load_file(tmp_path / name / "merged" / "model.safetensors") for name in ("one", "two")]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *merged)
