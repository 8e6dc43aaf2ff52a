"""An embedder as it is before training, and what it must give: shared by the tests of encoding."""

import functools

import jax
import numpy as np

from llm2vec_gen_jax import LLM2VecGen
from llm2vec_gen_jax.data.buckets import pad
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding

K, THOUGHTS, E = 3, 1, 12
TEXTS = [f"Text {number}: " + "words and more " * (number * 7 % 11) for number in range(47)] + ["", "é🙂"]


@functools.partial(jax.jit, static_argnums=0)
def _plain(model, trainable, frozen, ids_BT, lengths_B):
    return model.encode(trainable, frozen, ids_BT, lengths_B)


def embedder_on(backbone, rank=0):
    """An embedder as it is before training; its LoRA, if any, changes the vectors."""
    model = LLM2VecGenModel(backbone.architecture, K, THOUGHTS, E, rank, 2.0)
    trainable = model.init(jax.random.key(0), backbone.frozen)
    if rank:
        noise = {name: pair | {"b": 0.1 + pair["b"]} for name, pair in trainable["lora"].items()}
        trainable = trainable | {"lora": noise}
    return LLM2VecGen(model, sharding.put_replicated(trainable, backbone.mesh), backbone)


def unpacked(embedder, texts):
    """(embeddings, soft prompts) of the plain pass: a row for each text."""
    ids = embedder.tokenize([*texts, *[""] * (-len(texts) % 25)])  # of one shape, so that it compiles once
    lengths_B = np.array([len(row) for row in ids], np.int32)
    found = _plain(embedder.model, embedder.trainable, embedder.backbone.frozen, pad(ids, 256), lengths_B)
    return [np.asarray(array)[: len(texts)] for array in found]
