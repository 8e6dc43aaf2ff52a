"""HyDE (Gao et al. 2022): embeddings of the answer that the LLM generates, and the time per query."""

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import not_finite, quote
from llm2vec_gen_jax.config import EvaluateConfig, hub_options
from llm2vec_gen_jax.data.buckets import bucket_length, length_sorted_batches
from llm2vec_gen_jax.formats import peft
from llm2vec_gen_jax.inference.generate import Sampling, generate
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone, load_backbone, resolve_adapter
from llm2vec_gen_jax.teachers import targets
from llm2vec_gen_jax.teachers.encoder import Teacher, join_instruction


@dataclasses.dataclass
class Clock:
    """Time per query. The first batch of each shape includes compilation; it counts only if there is no other."""

    seconds: float = 0.0
    queries: int = 0
    compiling_seconds: float = 0.0
    compiling_queries: int = 0
    shapes: set[tuple[int, int]] = dataclasses.field(default_factory=set)

    def add(self, shape: tuple[int, int], seconds: float, queries: int) -> None:
        """Adds a batch with its shape, run time and number of queries."""
        if shape in self.shapes:
            self.seconds, self.queries = self.seconds + seconds, self.queries + queries
        else:
            self.compiling_seconds += seconds
            self.compiling_queries += queries
        self.shapes.add(shape)

    def read(self) -> float | None:
        """Returns the seconds per query since the last call, None without queries. Keeps the set of shapes."""
        measured = (self.seconds, self.queries) if self.queries else (self.compiling_seconds, self.compiling_queries)
        self.seconds, self.queries, self.compiling_seconds, self.compiling_queries = 0.0, 0, 0.0, 0
        return measured[0] / measured[1] if measured[1] else None


@dataclasses.dataclass(frozen=True)
class Hyde:
    """HyDE (Gao et al. 2022): the LLM answers the query greedily, and the teacher embeds the answer.

    Instruction and text form the user turn of the chat template. clock: generation time.
    """

    backbone: LoadedBackbone
    teacher: Teacher
    max_new_tokens: int
    batch_size: int = 32
    max_length: int = 512
    show_progress: bool = False
    clock: Clock = dataclasses.field(default_factory=Clock)

    def answers(self, texts: Sequence[str], instruction: str = "") -> list[str]:
        """Returns the LLM's answers, in the order of the texts."""
        tokenizer, sampling = self.backbone.tokenizer, Sampling(self.max_new_tokens)
        prompts = [tokenizer.chat_prompt(join_instruction(instruction, text), self.max_length) for text in texts]
        answers = [""] * len(texts)
        with progress.bar(len(texts), "answer", "answer", enabled=self.show_progress) as bar:
            for rows in length_sorted_batches([len(prompt) for prompt in prompts], self.batch_size):
                ids = [prompts[row] for row in rows]
                began = time.perf_counter()
                for row, answer in zip(rows, generate(self.backbone, ids, sampling)):
                    if answer is None:
                        raise not_finite(f"text {row} (from 0), {quote(texts[row])}", self.backbone.dtype)
                    answers[row] = tokenizer.decode(answer).strip()
                shape = (len(rows), bucket_length(len(ids[0])))
                self.clock.add(shape, time.perf_counter() - began, len(rows))
                bar.update(len(rows))
        return answers

    def encode(self, texts: Sequence[str], instruction: str = "") -> NDArray[np.float32]:
        """Returns the teacher's vectors (n, D) of the LLM's answers to texts."""
        return dataclasses.replace(self.teacher, max_length=self.max_length).encode(self.answers(texts, instruction))


def load_baseline(path: str, config: EvaluateConfig) -> tuple[Teacher | Hyde, Teacher, dict[str, Any]]:
    """Returns (query encoder, document encoder, identity) of an EvaluateConfig with kind teacher or hyde.

    identity: a dict that depends on weights and settings, not on paths.
    """
    mesh = sharding.make_mesh(config.mesh)
    settings: dict[str, Any] = {"batch_size": config.batch_size, "show_progress": True}
    adapters = [resolve_adapter(adapter, hub_options(config)) for adapter in config.adapters]
    causal, source = targets.is_causal(config), (path, config.dtype, mesh, config.kernels.attention)
    hub = hub_options(config, config.revision)
    backbone = load_backbone(*source, hub)
    identity = identity_of(config, backbone) | {
        "adapters": [peft.identity(adapter) for adapter in adapters],
        "attention": "causal" if causal else "bidirectional",
    }
    # Merging donates the weights that it changes; HyDE generates with the unmerged weights.
    merged = load_backbone(*source, hub).frozen if adapters and config.kind == "hyde" else backbone.frozen
    merged = peft.merge(merged, adapters, backbone.architecture)
    document = Teacher(backbone, merged, causal, **settings)
    if config.kind == "teacher":
        return document, document, identity
    query = Hyde(backbone, document, config.max_new_tokens, **settings)
    return query, document, identity | {"max_new_tokens": config.max_new_tokens}


def identity_of(config: EvaluateConfig, backbone: LoadedBackbone) -> dict[str, Any]:
    """Returns the part of the identity that all encoders share: kind, backbone and dtype."""
    return {"kind": config.kind, "backbone": backbone.identity, "dtype": backbone.dtype}
