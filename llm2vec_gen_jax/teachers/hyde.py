"""HyDE (Gao et al. 2022): embed the answer that the LLM generates, and what that costs."""

import dataclasses
import time

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import not_finite, quote
from llm2vec_gen_jax.data.buckets import bucket_length
from llm2vec_gen_jax.formats import peft
from llm2vec_gen_jax.inference.generate import Sampling, generate
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone, load_backbone, resolve_adapter
from llm2vec_gen_jax.teachers import targets
from llm2vec_gen_jax.teachers.encoder import Teacher, join_instruction


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
        prompts = [tokenizer.chat_prompt(join_instruction(instruction, text), self.max_length) for text in texts]
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
                shape = (len(rows), bucket_length(len(ids[0])))
                self.clock.add(shape, time.perf_counter() - began, len(rows))
                bar.update(len(rows))
        return answers

    def encode(self, texts, instruction=""):
        """Returns the teacher's vectors (n, D) of the answers that the LLM writes to texts."""
        return dataclasses.replace(self.teacher, max_length=self.max_length).encode(self.answers(texts, instruction))


def load_baseline(path, config):
    """Returns (query encoder, document encoder, identity) of an EvaluateConfig with kind teacher or hyde.

    identity: a dict that is the same for the same weights and settings, wherever they lie.
    """
    mesh, sizes = sharding.make_mesh(config.mesh), {"batch_size": config.batch_size, "show_progress": True}
    adapters, causal = [resolve_adapter(adapter) for adapter in config.adapters], targets.is_causal(config)
    backbone = load_backbone(path, config.dtype, mesh, config.kernels.attention)
    identity = identity_of(config, backbone) | {
        "adapters": [peft.identity(adapter) for adapter in adapters],
        "attention": "causal" if causal else "bidirectional",
    }
    # Merging donates the weights that it changes; HyDE generates with the unmerged ones.
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


def identity_of(config, backbone):
    """Returns what every identity of an encoder starts with: its kind, its backbone and the dtype."""
    return {"kind": config.kind, "backbone": backbone.identity, "dtype": backbone.dtype}
