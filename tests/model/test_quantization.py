"""An int8 backbone: rounded as little as eight bits allow, the same on any devices, trainable, never written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm2vec_gen_jax import LLM2VecGen, config
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.model import lora, quantization
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.parallel.sharding import put_replicated
from llm2vec_gen_jax.pretrained import export
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from llm2vec_gen_jax.training import losses
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.train import train
from tests.conftest import one_device_mesh, write_jsonl


@pytest.mark.parametrize("name, shape", [("query", (2, 24, 3, 8)), ("output", (2, 3, 8, 24)), ("down", (2, 56, 24))])
def test_a_weight_is_off_by_half_a_step_at_most(name, shape):
    kernel = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kernel[:, ..., 0] = 0  # an output without weights
    rounded, scale = quantization.quantize(jnp.asarray(kernel), name)
    step = np.expand_dims(scale, quantization.contracted_axes(name))
    assert rounded.dtype == jnp.int8 and scale.shape == np.squeeze(step, quantization.contracted_axes(name)).shape
    assert (np.abs(rounded * step - kernel) <= step / 2 + 1e-6).all()
    assert np.abs(rounded).max() == 127


def loss_and_gradient(backbone, trainable):
    model = LLM2VecGenModel(backbone.architecture, 4, 0, 6, execution=backbone.execution)
    random = np.random.default_rng(1)
    ids = random.integers(0, 90, (2, 4, 16)).astype(np.int32)
    batch = {
        "query_lengths": np.array([16, 3, 9, 1], np.int32),
        "answer": ids[1],
        "answer_lengths": np.array([16, 5, 2, 8], np.int32),
        "target": random.normal(size=(4, 6)).astype(np.float32),
    }

    @jax.jit
    def total(trainable, frozen):
        cache = model.prefill(frozen, ids[0], batch["query_lengths"], 16)
        return losses.loss_fn(trainable, model, frozen, batch | {"query": cache}, config.LossConfig())[0]

    return jax.value_and_grad(total)(trainable, backbone.frozen)


@pytest.mark.slow
def test_loss_and_gradient_are_near_those_of_bfloat16_on_any_mesh(tiny_folder):
    folder = str(tiny_folder("qwen3"))
    plain = load_backbone(folder, "bfloat16", one_device_mesh())
    trainable = LLM2VecGenModel(plain.architecture, 4, 0, 6).init(jax.random.key(0), plain.frozen)
    expected, expected_gradient = loss_and_gradient(plain, trainable)
    found = []
    for mesh in (one_device_mesh(), sharding.make_mesh(config.MeshConfig(2, 2, 2))):
        backbone = load_backbone(folder, "int8", mesh)
        assert backbone.dtype == "int8" and backbone.identity == plain.identity
        found.append(loss_and_gradient(backbone, put_replicated(trainable, mesh)))
    (loss, gradient), (sharded_loss, sharded_gradient) = found
    assert abs(loss - expected) < 0.02 * expected
    for one, other, plain in zip(*map(jax.tree.leaves, (gradient, sharded_gradient, expected_gradient)), strict=True):
        size = np.linalg.norm(plain)
        assert np.linalg.norm(np.asarray(one) - np.asarray(plain)) < 0.1 * size
        assert np.linalg.norm(np.asarray(one) - np.asarray(other)) < 0.1 * size
    np.testing.assert_allclose(sharded_loss, loss, rtol=0.01)


def test_vectors_of_the_real_llm_keep_their_direction(smollm2, tmp_path_factory):
    trainable = LLM2VecGenModel(smollm2.architecture, 10, 0, 576).init(jax.random.key(0), smollm2.frozen)
    texts = ["How do I make bread rise?", "What is the capital of France?", "x = [i ** 2 for i in range(9)]"]
    vectors = {}
    for backbone in (smollm2, load_backbone("smollm2-135m", "int8", one_device_mesh())):
        model = LLM2VecGenModel(backbone.architecture, 10, 0, 576, execution=backbone.execution)
        vectors[backbone.dtype] = LLM2VecGen(model, trainable, backbone).encode(texts, normalize_embeddings=True)
    assert ((vectors["float32"] * vectors["int8"]).sum(axis=1) > 0.995).all()


def test_what_needs_the_weights_as_they_were_is_refused(tiny_folder, tmp_path):
    backbone = load_backbone(str(tiny_folder("qwen3")), "int8", one_device_mesh())
    with pytest.raises(InputError, match="merging adapters: not with an int8 backbone.*dtype=bfloat16"):
        lora.merge(backbone.frozen, {})
    with pytest.raises(InputError, match="writing the weights of a backbone: not with an int8 backbone"):
        export.save_backbone(backbone, tmp_path / "backbone")
    assert not (tmp_path / "backbone").exists()


def test_a_run_trains_on_int8_with_targets_of_the_plain_weights(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_jsonl(
        tmp_path / "responses.jsonl", [{"question": f"what is {n}", "answer": f"it is {n * n}"} for n in range(16)]
    )
    words = (f"backbone.path={tiny_folder('qwen3')}", "data.responses=responses.jsonl", "compression.num_tokens=4")
    words += ("train.batch_size=8", "train.steps=3", "train.log_every=1")
    losses = {}
    for dtype in ("bfloat16", "int8"):
        run = (*words, f"backbone.dtype={dtype}", f"train.output={dtype}")
        model = train(options.load(config.TrainConfig, None, run), show_progress=False)
        losses[dtype] = [row["loss"] for row in read_metrics(model.parent)]
    assert len(list((tmp_path / "responses.jsonl.targets").glob("*.npy"))) == 1  # one for both
    np.testing.assert_allclose(losses["int8"], losses["bfloat16"], rtol=0.02)
    assert LLM2VecGen.from_pretrained(tmp_path / "int8" / "model", dtype="int8").encode("what is 3").shape == (32,)
