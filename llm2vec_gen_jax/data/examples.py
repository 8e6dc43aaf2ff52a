"""Tokenized training examples."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llm2vec_gen_jax.common.errors import InputError


@dataclasses.dataclass
class Examples:
    """Tokenized training data; ids are lists of int32 arrays.

    row: indices of the records (n,). answer: empty if no loss reads answers. extra: {name: ids} of additional texts
    that are embedded like queries.
    target, negative_target: (n, E) float32.
    """

    query: list[np.ndarray]
    answer: list[np.ndarray]
    row: np.ndarray
    target: np.ndarray | None = None
    extra: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    negative_target: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.query)

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that identify the ids and targets."""
        digest = self._digest_ids()
        for target in (self.target, self.negative_target):
            if target is not None:
                digest.update(np.ascontiguousarray(target).tobytes())
        return digest.hexdigest()[:16]

    def digest_ids(self) -> str:
        """Returns 16 hex digits that identify the ids without the targets."""
        return self._digest_ids().hexdigest()[:16]

    def _digest_ids(self):
        return digest_ids(self.query, self.answer, *self.extra.values())


def tokenize(
    records: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    config: Any,
    num_appended: int,
    extra: Mapping[str, Callable[[int, Mapping[str, Any]], str]] | None = None,
) -> Examples:
    """Returns Examples of {question, answer} records, both stripped.

    Omits records with an empty answer (or negative_answer), and with config.finished_only those whose `finish` is
    "length". Queries are truncated to max_query_length - num_appended tokens. tokenizer: a Tokenizer. config: a
    DataConfig. extra: {name: (number of the usable record, record) -> text} for additional texts that are tokenized
    like queries.
    """
    if config.max_query_length <= num_appended:
        raise InputError(
            f"data.max_query_length={config.max_query_length} must exceed the {num_appended} appended tokens"
        )
    usable = [all(record.get(name, "x").strip() for name in ("answer", "negative_answer")) for record in records]
    if config.finished_only:
        usable = [answered and record["finish"] != "length" for answered, record in zip(usable, records)]
    chosen = [record for record, is_usable in zip(records, usable) if is_usable]
    if not chosen:
        raise InputError(f"{config.responses}: every answer is empty{' or truncated' if config.finished_only else ''}")
    questions = [record["question"].strip() for record in chosen]
    answers = [record["answer"].strip() for record in chosen]

    def arrays(ids):
        return [np.array(row, np.int32) for row in ids]

    max_length = config.max_query_length - num_appended
    query = tokenizer.encode(questions, max_length)
    answer = tokenizer.encode_answers(answers, config.max_answer_length, config.answer_suffix)
    extra_ids = {
        name: arrays(tokenizer.encode([text(*pair) for pair in enumerate(chosen)], max_length))
        for name, text in (extra or {}).items()
    }
    return Examples(arrays(query), arrays(answer), np.flatnonzero(usable), extra=extra_ids)


def digest_ids(*texts: Sequence[np.ndarray]) -> Any:
    """Returns the SHA-256 hash object of lists of id arrays."""
    digest = hashlib.sha256()
    for arrays in texts:
        digest.update(np.array([len(ids) for ids in arrays]).tobytes())
        digest.update(np.concatenate(arrays).tobytes())
    return digest
