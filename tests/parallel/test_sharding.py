"""Loss and gradients do not depend on the mesh; a sharded load needs its shards and one tensor of host memory."""

import functools
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from llm2vec_gen_jax import config
from llm2vec_gen_jax.data.buckets import pad
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from llm2vec_gen_jax.training import losses
from tests.conftest import tiny_tokenizer, tiny_torch_model
from tests.helpers.processes import environment
from tests.parallel.test_multihost import free_address

B, T, S, K, E = 8, 12, 16, 3, 32


@pytest.fixture(scope="module")
def wide_folder(tmp_path_factory):
    """A Qwen3 of 8 heads and 8 key/value heads, which 2, 4 and 8 devices divide."""
    folder = tmp_path_factory.mktemp("wide")
    changes = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4, "tie_word_embeddings": False}
    tiny_torch_model("qwen3", **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@functools.cache
def loss_and_gradients(folder, shape, lora_rank):
    mesh = sharding.make_mesh(config.MeshConfig(*shape), jax.devices()[: int(np.prod(shape))])
    backbone = load_backbone(str(folder), "float32", mesh)
    model = LLM2VecGenModel(backbone.architecture, K, 1, E, lora_rank, 2.0)
    random = np.random.default_rng(0)
    lengths = random.integers(0, T + 1, B).astype(np.int32), random.integers(1, S + 1, B).astype(np.int32)
    rows = [[list(random.integers(4, 260, n)) for n in row] for row in lengths]
    batch = {
        "query": pad(rows[0], T),
        "query_lengths": lengths[0],
        "answer": pad(rows[1], S),
        "answer_lengths": lengths[1],
        "target": random.normal(size=(B, E)).astype(np.float32),
    }
    batch = sharding.put_batch(batch, mesh)
    trainable = jax.jit(model.init, out_shardings=sharding.replicated(mesh))(jax.random.key(0), backbone.frozen)

    @jax.jit
    def run(trainable, frozen, batch):
        if not lora_rank:
            batch = batch | {"query": model.prefill(frozen, batch["query"], batch["query_lengths"], T)}
        return jax.value_and_grad(losses.loss_fn, has_aux=True)(
            trainable, model, frozen, batch, config.LossConfig(chunk_tokens=16)
        )

    (loss, _), gradients = run(trainable, backbone.frozen, batch)
    return float(loss), {jax.tree_util.keystr(path): np.asarray(x) for path, x in jax.tree.leaves_with_path(gradients)}


SHAPES = [(8, 1, 1), (1, 8, 1), (1, 1, 2), (1, 1, 4), (1, 1, 8), (2, 2, 2)]


@pytest.mark.parametrize("shape, lora_rank", [*((shape, 0) for shape in SHAPES), ((2, 2, 2), 2)], ids=str)
def test_every_mesh_gives_loss_and_gradients_of_one_device(wide_folder, shape, lora_rank):
    expected_loss, expected = loss_and_gradients(wide_folder, (1, 1, 1), lora_rank)
    loss, gradients = loss_and_gradients(wide_folder, shape, lora_rank)
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5)
    assert gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        # Sums of float32 in another order.
        np.testing.assert_allclose(gradients[name], gradient, atol=3e-5 * np.abs(gradient).max(), err_msg=name)


# Memory

_LOAD = """
import json, pathlib, re, sys, threading, time

import jax

from llm2vec_gen_jax import config
from llm2vec_gen_jax.parallel import processes, sharding
from llm2vec_gen_jax.pretrained.backbone import load_backbone

folder, address, index = sys.argv[1:]
processes.initialize(config.TrainConfig(distributed=address, num_processes=2, process_id=int(index)))
mesh = sharding.make_mesh(config.MeshConfig(data=1, fsdp=2))
load_backbone(folder + "-small", "float32", mesh)  # whatever compiles or is imported on the way


def memory():  # its own: the pages of mapped files are the system's, which takes them back when it needs them
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024


def watch():
    while True:
        seen.append(memory())
        time.sleep(0.001)


seen = []
before = memory()
threading.Thread(target=watch, daemon=True).start()
frozen = load_backbone(folder, "float32", mesh).frozen
own = [sum(shard.data.nbytes for shard in x.addressable_shards) for x in jax.tree.leaves(frozen)]
print(json.dumps({"peak": max(seen) - before, "shards": sum(own), "largest": max(own), "samples": len(seen)}))
"""


def test_a_process_holds_its_shards_and_one_tensor(tmp_path):
    """Two real processes, half of a model of 400 MB each."""
    for name, layers in (("model", 12), ("model-small", 1)):
        model = tiny_torch_model("llama", hidden_size=768, intermediate_size=2816, num_hidden_layers=layers)
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer().save_pretrained(tmp_path / name)
        del model
    address = free_address()
    command = [sys.executable, "-c", _LOAD, str(tmp_path / "model"), address]
    started = [
        subprocess.Popen([*command, str(index)], env=environment(), stdout=subprocess.PIPE, text=True)
        for index in (0, 1)
    ]
    for process in started:
        out, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        print(out)
        found = json.loads(out.strip().splitlines()[-1])
        assert found["shards"] > 100e6 and found["samples"] > 100
        assert found["peak"] < found["shards"] + 1.1 * found["largest"] + 48e6  # the model has 317e6
