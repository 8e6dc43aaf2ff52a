"""Embedding and decoding for concurrent requests, batched in one thread and compiled ahead of time."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError, not_finite
from llm2vec_gen_jax.config import ServeConfig, options
from llm2vec_gen_jax.inference.encode import finite
from llm2vec_gen_jax.inference.generate import Sampling, compile_from_soft_prompts, generate_from_soft_prompts
from llm2vec_gen_jax.pretrained.tokenizer import CHARS_PER_TOKEN
from llm2vec_gen_jax.serving.batcher import Batcher

ROW = 256  # tokens of a packed row, see inference.encode
_MIN_NEW_TOKENS = 32  # of the compiled decoding programs


class Engine:
    """Embeds and decodes for many threads. observe: see Batcher.

    Its kinds of batches are ("embed", whether with soft prompts), whose items are token ids, and
    ("decode", new tokens, seed), whose items are (row number, soft prompts (K, D)).
    """

    def __init__(
        self, model: LLM2VecGen, config: ServeConfig, observe: Callable[[Any, float, int, int, float], None]
    ) -> None:
        options.require(config)
        self.model, self.config = model, config
        self.limit = model.text_length(config.max_length)
        self._check_instruction(config.instruction)
        self.batcher = Batcher(
            self._compute, self._cost, self._budget, config.max_wait_ms / 1000, config.max_waiting, observe
        )

    def tokenize(self, texts: Sequence[str], instruction: str, truncate: bool | None = None) -> list[np.ndarray]:
        """Returns the int32 token ids of each text. truncate: default that of the config.

        Raises InputError for invalid text, for texts that are too long if truncate is false, and for an instruction
        that leaves no tokens for a text.
        """
        self._check_instruction(instruction)
        if self.config.truncate if truncate is None else truncate:
            return self.model.tokenize(texts, instruction, self.limit)
        ids = self.model.tokenize(texts, instruction, self.limit + 1)
        for number, row in enumerate(ids):
            if len(row) > self.limit:
                raise InputError(f"input {number} is longer than the {self.limit} tokens that fit")
        return ids

    def _check_instruction(self, instruction: str) -> None:
        if len(instruction) * 4 < self.limit:  # a character has at most four bytes, and a byte at most one token
            return
        longest = self.limit * CHARS_PER_TOKEN
        if len(instruction) > longest or len(self.model.tokenize([instruction], "", self.limit)[0]) == self.limit:
            raise InputError(f"'instruction' leaves no tokens for a text: each input has at most {self.limit} tokens")

    def embed(self, ids: list[np.ndarray], soft_prompts: bool = False) -> Future:
        """Returns a Future of the embedding (E,) of each text, or of (embedding, soft prompts (K, D)); float32.

        The result of a text is None if it is not finite, so that other requests of the batch do not fail.
        """
        return self.batcher.submit(("embed", soft_prompts), ids)

    def decode(self, soft_prompts: Sequence[np.ndarray], max_tokens: int, seed: int) -> Future:
        """Returns a Future of the token ids decoded from each of soft_prompts (n, K, D), at least max_tokens of them
        unless decoding ended; None if the logits were not finite."""
        tokens = next(tokens for tokens in self._lengths() if tokens >= max_tokens)
        seed = seed if self.config.decode.temperature else 0  # greedy decoding is independent of the seed
        return self.batcher.submit(("decode", tokens, seed), list(enumerate(soft_prompts)))

    def require_finite(self, results: list[Any], key: str) -> list[Any]:
        """Returns the results of a request. Raises InputError naming the first input in `key` without a result."""
        for number, result in enumerate(results):
            if result is None:
                raise not_finite(f"{key!r} {number}", self.model.backbone.dtype)
        return results

    def compile_embedding(self) -> int:
        """Compiles all programs of `embed` without soft prompts. Returns their number."""
        return self.model.warmup(self.config.batch_size, self.config.max_length, show_progress_bar=True)

    def compile_decoding(self) -> int:
        """Compiles all programs of `embed` with soft prompts and of `decode`. Returns their number."""
        settings, model = self.config.decode, self.model
        count = model.warmup(settings.batch_size, self.config.max_length, True, show_progress_bar=True)
        shape = model.model.num_tokens, model.model.architecture.hidden_size
        programs = [(tokens, size) for tokens in self._lengths() for size in sorted({1, settings.batch_size})]
        with progress.bar(len(programs), "program", "compile decoding") as bar:
            for tokens, size in programs:
                compile_from_soft_prompts(model.backbone, (size, *shape), self._sampling(tokens))
                bar.update(1)
        return count + len(programs)

    def _lengths(self) -> list[int]:
        """Returns the compiled numbers of new tokens: 32, 64, 128, ... up to the configured maximum."""
        longest = self.config.decode.max_new_tokens
        lengths: list[int] = []
        while (tokens := _MIN_NEW_TOKENS << len(lengths)) < longest:
            lengths.append(tokens)
        return [*lengths, longest]

    def _cost(self, kind: Any, item: Any) -> int:
        return len(item) + self.model.model.num_appended if kind[0] == "embed" else 1

    def _budget(self, kind: Any) -> int:
        batch_size = self.config.batch_size if kind == ("embed", False) else self.config.decode.batch_size
        return batch_size * ROW if kind[0] == "embed" else batch_size

    def _compute(self, kind: Any, items: list[Any]) -> list[Any]:
        if kind[0] == "embed":
            return self._embed(kind[1], items)
        return self._decode(kind[1], kind[2], items)

    def _embed(self, soft_prompts: bool, ids: list[np.ndarray]) -> list[Any]:
        batch_size = self.config.decode.batch_size if soft_prompts else self.config.batch_size
        with progress.bar(len(ids), "text", "encode", enabled=False) as bar:
            stream = self.model.encode_windows([(None, ids)], batch_size, soft_prompts, bar, lambda *_: None)
            ((_, embeddings, prompts),) = stream
        results = list(zip(embeddings, prompts)) if prompts is not None else list(embeddings)
        is_finite = finite([embeddings, prompts] if prompts is not None else [embeddings])
        return [result if valid else None for result, valid in zip(results, is_finite)]

    def _decode(self, tokens: int, seed: int, items: list[tuple[int, np.ndarray]]) -> list[Any]:
        size = 1 if len(items) == 1 else self.config.decode.batch_size  # only these two are compiled
        numbers, rows = zip(*items, *[items[0]] * (size - len(items)))
        ids = generate_from_soft_prompts(self.model.backbone, np.stack(rows), self._sampling(tokens), seed, numbers)
        return ids[: len(items)]

    def _sampling(self, tokens: int) -> Sampling:
        return Sampling(tokens, self.config.decode.temperature, self.config.decode.top_p)
