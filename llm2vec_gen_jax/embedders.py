"""What can be evaluated: an object with `encode(texts, instruction) -> (n, E) float32`, joined with one space."""

import dataclasses
import time
from typing import Any

import numpy as np

from llm2vec_gen_jax import progress, sharding, teacher
from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.encode import finite
from llm2vec_gen_jax.errors import InputError, not_finite, quote
from llm2vec_gen_jax.formats import peft
from llm2vec_gen_jax.generate import Sampling, generate, ladder
from llm2vec_gen_jax.loading import LoadedBackbone, load_backbone, resolve_adapter


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


@dataclasses.dataclass(frozen=True)
class Teacher:
    """A backbone whose last hidden states are averaged, as the alignment targets are computed.

    frozen: its parameters, with the adapters merged.
    """

    backbone: LoadedBackbone
    frozen: Any
    causal: bool
    batch_size: int = 32
    max_length: int = 512
    show_progress: bool = False

    def encode(self, texts, instruction=""):
        """Returns the mean-pooled last hidden states (n, D) of texts."""
        ids = self.backbone.tokenizer.encode([_join(instruction, text) for text in texts], self.max_length)
        architecture, execution = self.backbone.architecture, self.backbone.execution
        shards = sharding.batch_shards(execution.mesh)
        few = shards << (-(-len(ids) // shards) - 1).bit_length()  # rows: powers of two, so that few shapes compile
        height = min(-(-self.batch_size // shards) * shards, few)
        order = np.argsort([-len(row) for row in ids], kind="stable")
        embeddings = np.zeros((len(ids), architecture.hidden_size), np.float32)
        with progress.bar(len(ids), "text", "encode", enabled=self.show_progress) as bar:
            for start in range(0, len(ids), height):
                rows = order[start : start + height]
                shape = (height, ladder(len(ids[rows[0]])))
                batch = [ids[row] for row in rows]
                found = teacher.pool_rows(architecture, self.frozen, self.causal, batch, shape, execution)
                for row in rows[~finite([found])]:
                    raise not_finite(f"text {row} (from 0), {quote(texts[row])}", self.backbone.dtype)
                embeddings[rows] = found
                bar.update(len(rows))
        return embeddings


@dataclasses.dataclass
class Clock:
    """Seconds that a number of queries took. The first batch of every shape compiles, so it counts only alone."""

    seconds: float = 0.0
    queries: int = 0
    compiling_seconds: float = 0.0
    compiling_queries: int = 0
    shapes: set = dataclasses.field(default_factory=set)

    def add(self, shape, seconds, queries):
        """Counts a batch: its shape, the seconds it took, and its number of queries."""
        if shape in self.shapes:
            self.seconds, self.queries = self.seconds + seconds, self.queries + queries
        else:
            self.compiling_seconds += seconds
            self.compiling_queries += queries
        self.shapes.add(shape)

    def read(self):
        """Returns seconds per query since the last reading, and None when there was none; the shapes stay known."""
        measured = (self.seconds, self.queries) if self.queries else (self.compiling_seconds, self.compiling_queries)
        self.seconds, self.queries, self.compiling_seconds, self.compiling_queries = 0.0, 0, 0.0, 0
        return measured[0] / measured[1] if measured[1] else None


@dataclasses.dataclass(frozen=True)
class Hyde:
    """HyDE (Gao et al. 2022): the LLM answers the query, greedily, and the teacher embeds the answer.

    The instruction and the text are the user's turn of a chat. clock: what writing the answers took.
    """

    backbone: LoadedBackbone
    teacher: Teacher
    max_new_tokens: int
    batch_size: int = 32
    max_length: int = 512
    show_progress: bool = False
    clock: Clock = dataclasses.field(default_factory=Clock)

    def answers(self, texts, instruction=""):
        """Returns the LLM's answers, in the order of the texts."""
        tokenizer, sampling = self.backbone.tokenizer, Sampling(self.max_new_tokens)
        prompts = [tokenizer.chat_prompt(_join(instruction, text), self.max_length) for text in texts]
        order = sorted(range(len(texts)), key=lambda row: -len(prompts[row]))
        answers = [""] * len(texts)
        with progress.bar(len(texts), "answer", "answer", enabled=self.show_progress) as bar:
            for start in range(0, len(texts), self.batch_size):
                rows = order[start : start + self.batch_size]
                ids = [prompts[row] for row in rows]
                began = time.perf_counter()
                for row, answer in zip(rows, generate(self.backbone, ids, sampling)):
                    if answer is None:
                        raise not_finite(f"text {row} (from 0), {quote(texts[row])}", self.backbone.dtype)
                    answers[row] = tokenizer.decode(answer).strip()
                shape = (len(rows), ladder(len(ids[0])))
                self.clock.add(shape, time.perf_counter() - began, len(rows))
                bar.update(len(rows))
        return answers

    def encode(self, texts, instruction=""):
        """Returns the teacher's vectors (n, D) of the answers that the LLM writes to texts."""
        return dataclasses.replace(self.teacher, max_length=self.max_length).encode(self.answers(texts, instruction))


def load(path, config):
    """Returns (query encoder, document encoder, identity) of the MODEL and the EvaluateConfig.

    identity: a dict that is the same for the same weights and settings, wherever they lie.
    """
    mesh, sizes = sharding.make_mesh(config.mesh), {"batch_size": config.batch_size, "show_progress": True}
    if config.kind == "student":
        if config.adapters:
            raise InputError("adapters are merged for kind=teacher and kind=hyde; a student has its own LoRA, if any")
        model = LLM2VecGen.from_pretrained(path, config.dtype, mesh=mesh, attention=config.kernels.attention)
        student = Student(model, **sizes)
        return student, student, _identity(config, model.backbone) | {"model": model.identity}
    adapters, causal = [resolve_adapter(adapter) for adapter in config.adapters], teacher.is_causal(config)
    backbone = load_backbone(path, config.dtype, mesh, config.kernels.attention)
    identity = _identity(config, backbone) | {
        "adapters": [peft.identity(adapter) for adapter in adapters],
        "attention": "causal" if causal else "bidirectional",
    }
    # Merging donates the weights that it changes; HyDE needs them as they were, to write.
    merged = (
        load_backbone(path, config.dtype, mesh, config.kernels.attention).frozen
        if adapters and config.kind == "hyde"
        else backbone.frozen
    )
    for adapter in adapters:
        merged = peft.merge(merged, adapter, backbone.architecture)
    document = Teacher(backbone, merged, causal, **sizes)
    if config.kind == "teacher":
        return document, document, identity
    query = Hyde(backbone, document, config.max_new_tokens, **sizes)
    return query, document, identity | {"max_new_tokens": config.max_new_tokens}


def _identity(config, backbone):
    return {"kind": config.kind, "backbone": backbone.identity, "dtype": backbone.dtype}


def _join(instruction, text):
    return f"{instruction} {text}" if instruction else text
