"""Encoders that can be evaluated."""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from llm2vec_gen_jax.api import LLM2VecGen, load_configured_model
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import EvaluateConfig
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.teachers import hyde
from llm2vec_gen_jax.teachers.encoder import Teacher


class Encoder(Protocol):
    """Interface of an encoder."""

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Returns the embeddings (n, E), float32, of texts, each joined to the instruction by a space."""


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained model as an Encoder, or the teacher in its directory.

    max_length: tokens per text, including the compression tokens.
    """

    model: LLM2VecGen
    batch_size: int = 32
    max_length: int = 512
    show_progress: bool = False
    by_teacher: bool = False

    def encode(self, texts: Sequence[str], instruction: str = "") -> np.ndarray:
        """Returns the embeddings (n, E) of texts."""
        return self.model.encode(
            texts,
            prompt=instruction,
            batch_size=self.batch_size,
            max_length=self.max_length,
            show_progress_bar=self.show_progress,
            by_teacher=self.by_teacher,
        )


LoadedEncoder = Student | Teacher | hyde.Hyde


def load(path: str, config: EvaluateConfig) -> tuple[LoadedEncoder, LoadedEncoder, dict[str, Any]]:
    """Returns (query encoder, document encoder, identity) of the MODEL and an EvaluateConfig.

    identity: a dict that depends on the weights and the settings, but not on their location.
    """
    if config.kind != "student":
        if config.by_teacher != "none":
            raise InputError(
                f"by_teacher={config.by_teacher} is for kind=student, not for kind={config.kind}: remove it"
            )
        return hyde.load_baseline(path, config)
    if config.adapters:
        raise InputError("adapters= is for kind=teacher and kind=hyde: remove it for a trained model")
    model = load_configured_model(path, config, sharding.make_mesh(config.mesh))
    student = Student(model, config.batch_size, show_progress=True)
    identity = hyde.identity_of(config, model.backbone) | {"model": model.identity}
    if config.by_teacher == "none":
        return student, student, identity
    identity |= {"teacher": model.document_encoder.identity, "by_teacher": config.by_teacher}
    teacher = dataclasses.replace(student, by_teacher=True)
    return teacher if config.by_teacher == "all" else student, teacher, identity
