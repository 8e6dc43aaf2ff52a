"""Code of a user of the package, for the type checker only: tests/project/test_typing.py checks it strictly."""
# mypy: disallow-any-generics, disallow-untyped-calls, disallow-untyped-defs, warn-return-any

import pathlib
from collections.abc import Mapping
from typing import Any, assert_type

import jax
import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax import InputError, LLM2VecGen, LLM2VecGenTrainer, TrainingCallback, load_embeddings
from llm2vec_gen_jax.config import LossConfig, MeshConfig, TrainConfig, TrainSettings
from llm2vec_gen_jax.lens.logit import Candidate
from llm2vec_gen_jax.training.losses import alignment
from llm2vec_gen_jax.training.train import train


def use_embedder(path: pathlib.Path, texts: list[str]) -> None:
    model = LLM2VecGen.from_pretrained(path, dtype="float32", mesh=MeshConfig(data=1))
    assert_type(model, LLM2VecGen)
    assert_type(model.encode(texts, batch_size=8, truncate_dim=None), np.ndarray)
    assert_type(model.encode("text", convert_to_numpy=True), np.ndarray)
    assert_type(model.encode(texts, convert_to_numpy=False), jax.Array)
    embeddings, soft_prompts = model.encode(texts, return_soft_prompts=True)
    assert_type(embeddings, np.ndarray)
    assert_type(soft_prompts, NDArray[np.float32])
    assert_type(model.encode_query(texts, normalize_embeddings=True), np.ndarray)
    assert_type(model.encode_document(texts), np.ndarray)
    assert_type(model.decode(soft_prompts, max_new_tokens=64), list[str] | str)
    assert_type(model.similarity(embeddings, embeddings), NDArray[np.float32])
    assert_type(model.logit_lens("text"), list[list[Candidate]])
    assert_type(model.logit_lens(texts, top_k=5), list[list[list[Candidate]]])
    assert_type(model.tokenize(texts), list[NDArray[np.int32]])
    assert_type(model.warmup(), int)
    assert_type(model.identity, str)
    assert_type(model.prompts, dict[str, str])
    assert_type(model.special_tokens, list[str])
    assert_type(model.get_embedding_dimension(), int)
    assert_type(model.save_pretrained("copy"), None)
    assert_type(load_embeddings("vectors", rows=(0, 10)), np.ndarray)


class Log(TrainingCallback):
    def on_validation(self, record: Mapping[str, Any]) -> bool:
        return bool(record["loss"] < 0.1)


def train_in_memory(rows: list[dict[str, str]]) -> LLM2VecGen:
    trainer = LLM2VecGenTrainer(
        rows, "runs/x", train={"steps": 10}, loss=LossConfig(), callbacks=[Log()], local_files_only=True
    )
    assert_type(trainer.config, TrainConfig)
    assert_type(trainer.evaluate(), dict[str, float])
    return assert_type(trainer.train(), LLM2VecGen)


def run_training(responses: str) -> pathlib.Path:
    config = TrainConfig(train=TrainSettings(steps=10, output="runs/x"), loss=LossConfig(alignment=2.0))
    config.data.responses = responses
    assert_type(config.train.steps, int)
    assert_type(config.train.output, str | None)
    assert_type(config.optimizer.learning_rate, float)
    assert_type(config.teacher.adapters, list[str])
    assert_type(alignment(jax.numpy.zeros((2, 3)), jax.numpy.zeros((2, 3))), jax.Array)
    try:
        return assert_type(train(config, show_progress=False), pathlib.Path)
    except InputError as error:
        raise SystemExit(str(error)) from None
