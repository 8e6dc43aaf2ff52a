"""A loaded model as a server uses it: many threads ask, one computes, in shapes that were compiled before."""

import numpy as np

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError, not_finite
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.inference.encode import finite
from llm2vec_gen_jax.inference.generate import Sampling, generate_from_soft_prompts
from llm2vec_gen_jax.pretrained.tokenizer import CHARS_PER_TOKEN
from llm2vec_gen_jax.serving.batcher import Batcher

_ROW = 256  # tokens: see encode.plan
_LEAST_NEW_TOKENS = 32  # of the programs that decode


class Engine:
    """Embeds and decodes for many threads. config: a ServeConfig. observe: see Batcher.

    The kinds of work are ("embed", with soft prompts or not) of int32 ids, and ("decode", tokens, seed) of
    (number of the row, soft prompts (K, D)).
    """

    def __init__(self, model, config, observe):
        options.require(config)
        self.model, self.config = model, config
        self.limit = model.text_length(config.max_length)
        self._check_instruction(config.instruction)
        self.batcher = Batcher(
            self._compute, self._cost, self._budget, config.max_wait_ms / 1000, config.max_waiting, observe
        )

    def tokenize(self, texts, instruction):
        """Returns int32 ids of each text. Raises InputError for text that is not valid, or too long if none is cut, and
        for an instruction that leaves no room for a text."""
        self._check_instruction(instruction)
        if self.config.truncate:
            return self.model.tokenize(texts, instruction, self.limit)
        ids = self.model.tokenize(texts, instruction, self.limit + 1)
        for number, row in enumerate(ids):
            if len(row) > self.limit:
                raise InputError(f"input {number} is longer than the {self.limit} tokens that this server reads")
        return ids

    def _check_instruction(self, instruction):
        if len(instruction) * 4 < self.limit:  # no character has more tokens than bytes
            return
        longest = self.limit * CHARS_PER_TOKEN
        if len(instruction) > longest or len(self.model.tokenize([instruction], "", self.limit)[0]) == self.limit:
            raise InputError(
                f"'instruction' leaves no room for a text in the {self.limit} tokens that are read of each"
            )

    def embed(self, ids, soft_prompts=False):
        """Returns a Future of the embedding (E,) of each text, or of (embedding, soft prompts (K, D)); float32. None
        where they are not finite: an error of this text's request, not of those that are computed with it."""
        return self.batcher.submit(("embed", soft_prompts), ids)

    def decode(self, soft_prompts, max_tokens, seed):
        """Returns a Future of the ids that the LLM reads out of each of soft_prompts (n, K, D), not yet cut; None where
        its logits were not finite."""
        tokens = next(tokens for tokens in self._lengths() if tokens >= max_tokens)
        seed = seed if self.config.decode.temperature else 0  # greedy: all seeds are one kind
        return self.batcher.submit(("decode", tokens, seed), list(enumerate(soft_prompts)))

    def check(self, results, key):
        """Returns the results of a request. Raises InputError for the first of its `key` that has none."""
        for number, result in enumerate(results):
            if result is None:
                raise not_finite(f"{key!r} {number}", self.model.backbone.dtype)
        return results

    def warmup(self):
        """Compiles all that requests can need. Returns the number of programs."""
        config, model = self.config, self.model
        count = model.warmup(config.batch_size, config.max_length, show_progress_bar=True)
        if not config.decode.enabled:
            return count
        count += model.warmup(config.decode.batch_size, config.max_length, True, show_progress_bar=True)
        row = np.zeros((model.model.num_tokens, model.model.architecture.hidden_size), np.float32)
        sizes = sorted({1, config.decode.batch_size})
        with progress.bar(len(sizes) * len(self._lengths()), "program", "compile decoding") as bar:
            for tokens in self._lengths():
                for size in sizes:
                    self._decode(tokens, 0, [(0, row)] * size)
                    bar.update(1)
        return count + bar.total

    def _lengths(self):
        """The numbers of new tokens that compile: 32, 64, 128, ... and the most that a request can ask for."""
        most, lengths = self.config.decode.max_new_tokens, []
        while (tokens := _LEAST_NEW_TOKENS << len(lengths)) < most:
            lengths.append(tokens)
        return [*lengths, most]

    def _cost(self, kind, item):
        return len(item) + self.model.model.num_appended if kind[0] == "embed" else 1

    def _budget(self, kind):
        batch_size = self.config.batch_size if kind == ("embed", False) else self.config.decode.batch_size
        return batch_size * _ROW if kind[0] == "embed" else batch_size

    def _compute(self, kind, items):
        what, *options = kind
        return self._embed(*options, items) if what == "embed" else self._decode(*options, items)

    def _embed(self, soft_prompts, ids):
        batch_size = self.config.decode.batch_size if soft_prompts else self.config.batch_size
        with progress.bar(len(ids), "text", "encode", enabled=False) as bar:
            stream = self.model.encode_windows([(None, ids)], batch_size, soft_prompts, bar, lambda *_: None)
            ((_, embeddings, prompts),) = stream
        results = list(zip(embeddings, prompts)) if soft_prompts else list(embeddings)
        sound = finite([embeddings, prompts] if soft_prompts else [embeddings])
        return [result if good else None for result, good in zip(results, sound)]

    def _decode(self, tokens, seed, items):
        settings = self.config.decode
        size = 1 if len(items) == 1 else settings.batch_size  # two shapes compile
        numbers, rows = zip(*items, *[items[0]] * (size - len(items)))
        sampling = Sampling(tokens, settings.temperature, settings.top_p)
        ids = generate_from_soft_prompts(self.model.backbone, np.stack(rows), sampling, seed, numbers)
        return ids[: len(items)]
