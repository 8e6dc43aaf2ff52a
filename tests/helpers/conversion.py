"""Embedders that are written and read again: shared by the tests of conversion, export and the hub."""

import jax
import numpy as np

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from tests.conftest import one_device_mesh


def load(path, dtype="float32"):
    return LLM2VecGen.from_pretrained(path, dtype=dtype, mesh=one_device_mesh())


def new_model(backbone, lora_rank=0, thoughts=2, width=24, count=10):
    """An untrained embedder whose every part does something."""
    model = LLM2VecGenModel(backbone.architecture, count, thoughts, width, lora_rank, 2.0 if lora_rank else 0.0)
    trainable = model.init(jax.random.key(1), backbone.frozen)
    if lora_rank:
        grown = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(2), x.shape), trainable["lora"])
        trainable["lora"] = grown
    return LLM2VecGen(model, trainable, backbone)


def same_trees(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)
