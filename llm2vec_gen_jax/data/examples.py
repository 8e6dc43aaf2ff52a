"""Tokenized training examples."""

import dataclasses
import functools
import hashlib

import numpy as np

from llm2vec_gen_jax.common.errors import InputError


@dataclasses.dataclass
class Examples:
    """Tokenised training data. ids are lists of int32 arrays; row: their rows in the source.

    extra: by name, the ids of other texts that are embedded like queries. target, negative_target: (n, E) float32.
    """

    query: list[np.ndarray]
    answer: list[np.ndarray]
    row: np.ndarray
    target: np.ndarray | None = None
    extra: dict[str, list[np.ndarray]] = dataclasses.field(default_factory=dict)
    negative_target: np.ndarray | None = None

    def __len__(self):
        return len(self.query)

    @functools.cached_property
    def digest(self):
        """16 hex digits that identify the ids and targets."""
        digest = self._digest_ids()
        for target in (self.target, self.negative_target):
            if target is not None:
                digest.update(np.ascontiguousarray(target).tobytes())
        return digest.hexdigest()[:16]

    def digest_ids(self):
        """16 hex digits that identify the ids alone."""
        return self._digest_ids().hexdigest()[:16]

    def _digest_ids(self):
        return digest_ids(self.query, self.answer, *self.extra.values())


def tokenize(records, tokenizer, config, num_appended, extra=None):
    """Returns Examples of {question, answer} records. Both are stripped; records with an empty answer (or
    negative_answer) are left out, and with config.finished_only those whose `finish` is "length".

    A query keeps max_query_length - num_appended tokens, so that the appended tokens have room. extra: {name: record
    -> text} of other texts that are tokenised like queries.
    """
    if config.max_query_length <= num_appended:
        raise InputError(f"data.max_query_length={config.max_query_length} must exceed the {num_appended} tokens added")
    answered = [all(record.get(name, "x").strip() for name in ("answer", "negative_answer")) for record in records]
    if config.finished_only:
        answered = [good and record["finish"] != "length" for good, record in zip(answered, records)]
    kept = np.flatnonzero(answered)
    if not len(kept):
        raise InputError(f"{config.responses}: every answer is empty{' or was cut' if config.finished_only else ''}")
    questions = [records[row]["question"].strip() for row in kept]
    answers = [records[row]["answer"].strip() for row in kept]

    def arrays(ids):
        return [np.array(row, np.int32) for row in ids]

    room = config.max_query_length - num_appended
    query = tokenizer.encode(questions, room)
    answer = tokenizer.encode_answers(answers, config.max_answer_length, config.answer_suffix)
    others = {
        name: arrays(tokenizer.encode([text(records[row]) for row in kept], room))
        for name, text in (extra or {}).items()
    }
    return Examples(arrays(query), arrays(answer), kept, extra=others)


def digest_ids(*texts):
    """Returns the running SHA-256 of lists of id arrays."""
    digest = hashlib.sha256()
    for arrays in texts:
        digest.update(np.array([len(ids) for ids in arrays]).tobytes())
        digest.update(np.concatenate(arrays).tobytes())
    return digest
