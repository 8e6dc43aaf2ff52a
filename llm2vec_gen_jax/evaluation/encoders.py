"""What can be evaluated: an object with `encode(texts, instruction) -> (n, E) float32`, joined with one space."""

import dataclasses

from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.teachers import hyde


@dataclasses.dataclass(frozen=True)
class Student:
    """A trained embedder. max_length: tokens of a text, the compression tokens included."""

    model: LLM2VecGen
    batch_size: int = 32
    max_length: int = 512
    show_progress: bool = False

    def encode(self, texts, instruction=""):
        """Returns the embeddings (n, E) of texts."""
        return self.model.encode(
            texts,
            prompt=instruction,
            batch_size=self.batch_size,
            max_length=self.max_length,
            show_progress_bar=self.show_progress,
        )


def load(path, config):
    """Returns (query encoder, document encoder, identity) of the MODEL and the EvaluateConfig.

    identity: a dict that is the same for the same weights and settings, wherever they lie.
    """
    if config.kind != "student":
        return hyde.load_baseline(path, config)
    if config.adapters:
        raise InputError("adapters are merged for kind=teacher and kind=hyde; a student has its own LoRA, if any")
    mesh = sharding.make_mesh(config.mesh)
    model = LLM2VecGen.from_pretrained(path, config.dtype, mesh=mesh, attention=config.kernels.attention)
    student = Student(model, config.batch_size, show_progress=True)
    return student, student, hyde.identity_of(config, model.backbone) | {"model": model.identity}
