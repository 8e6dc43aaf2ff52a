"""Deterministic schedule of padded batches, prefetched by grain."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.data.buckets import choose_edges, pad
from llm2vec_gen_jax.data.examples import Examples


@dataclasses.dataclass(frozen=True)
class Batch:
    """Indices of the examples, and the padded lengths of queries (T), answers (S) and extra texts."""

    rows: np.ndarray
    T: int
    S: int
    extra: int = 0


class BatchSchedule:
    """Batches as a pure function of (seed, lengths, step): no state, so a run resumes from a step number.

    Examples are grouped into cells by padded query and answer length. An epoch is shuffled, sorted by cell and cut into
    batches; len % batch_size examples, different in every epoch, are left out. The batches are shuffled too.
    extra_lengths: of the longest extra text of each example. They do not define cells; a batch is padded to the bucket
    of its longest.
    """

    def __init__(
        self,
        query_lengths: Sequence[int] | np.ndarray,
        answer_lengths: Sequence[int] | np.ndarray,
        batch_size: int,
        max_buckets: int,
        shuffle: bool,
        seed: int,
        extra_lengths: Sequence[int] | np.ndarray = (),
    ) -> None:
        count = len(query_lengths)
        if count < batch_size:
            raise InputError(f"{count} examples do not fill a batch of {batch_size}: lower train.batch_size")
        # With few examples per cell, most batches would span several cells.
        buckets = min(max_buckets, max(1, int((count / (4 * batch_size)) ** 0.5)))
        self.query_edges = choose_edges(query_lengths, buckets)
        self.answer_edges = choose_edges(answer_lengths, buckets)
        self.query_cell = np.searchsorted(self.query_edges, query_lengths)
        self.answer_cell = np.searchsorted(self.answer_edges, answer_lengths)
        self.extra_lengths = np.asarray(extra_lengths)
        self.extra_edges: list[int] = choose_edges(extra_lengths, buckets) if len(extra_lengths) else []
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.batches_per_epoch = count // batch_size
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __getitem__(self, step: int) -> Batch:
        """Returns the batch of a training step, counted from 0."""
        epoch, index = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch if self.shuffle else 0)[index]

    def _make_epoch(self, epoch):
        if not self.shuffle:
            return [self._batch(rows) for rows in self._cut(np.arange(len(self.query_cell)))]
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.query_cell))[: self.batches_per_epoch * self.batch_size]
        query, answer = self.query_cell[order], self.answer_cell[order]
        # Query cells in alternating order, so that a batch at a boundary spans two adjacent cells.
        batches = self._cut(order[np.lexsort((np.where(answer % 2, -query, query), answer))])
        return [self._batch(batches[index]) for index in random.permutation(len(batches))]

    def _cut(self, rows):
        return list(rows[: len(rows) // self.batch_size * self.batch_size].reshape(-1, self.batch_size))

    def _batch(self, rows):
        T = self.query_edges[self.query_cell[rows].max()]
        S = self.answer_edges[self.answer_cell[rows].max()]
        if not self.extra_edges:
            return Batch(rows, T, S)
        return Batch(rows, T, S, self.extra_edges[np.searchsorted(self.extra_edges, self.extra_lengths[rows].max())])


def rows_of_part(batch_size: int, part: int, parts: int) -> slice:
    """Returns the rows of one of the equal parts of a batch. Raises InputError if it does not divide."""
    if batch_size % parts:
        raise InputError(f"train.batch_size={batch_size} is not divisible by {parts} processes")
    size = batch_size // parts
    return slice(part * size, (part + 1) * size)


class Batches:
    """The padded batches of a schedule by step, a data source for grain: rows part * B / parts ... of each."""

    def __init__(self, examples: Examples, schedule: BatchSchedule, part: int, parts: int) -> None:
        self.examples, self.schedule = examples, schedule
        self.local = rows_of_part(schedule.batch_size, part, parts)

    def __len__(self) -> int:
        return 2**40  # the number of epochs is unlimited

    def __getitem__(self, step: int) -> dict[str, np.ndarray]:
        assert self.examples.target is not None
        batch = self.schedule[step]
        rows = batch.rows[self.local]
        query = [self.examples.query[row] for row in rows]
        arrays = {
            "query": pad(query, batch.T),
            "query_lengths": np.array([len(ids) for ids in query], np.int32),
            "target": np.asarray(self.examples.target[rows], np.float32),
        }
        if self.examples.answer:
            answer = [self.examples.answer[row] for row in rows]
            arrays |= {"answer": pad(answer, batch.S), "answer_lengths": np.array(list(map(len, answer)), np.int32)}
        if self.examples.extra:
            extra = [[ids[row] for ids in self.examples.extra.values()] for row in rows]
            arrays["extra"] = np.stack([pad(texts, batch.extra) for texts in extra])
            arrays["extra_lengths"] = np.array([[len(ids) for ids in texts] for texts in extra], np.int32)
        if self.examples.negative_target is not None:
            arrays["negative_target"] = np.asarray(self.examples.negative_target[rows], np.float32)
        return arrays


def iterate(batches: Any, first: int, last: int) -> Iterator[dict[str, np.ndarray]]:
    """Yields the batches of steps first ... last - 1, prefetched in threads. batches: a data source of grain."""
    dataset = grain.MapDataset.source(batches)[first:last]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def count_tokens(batch: Mapping[str, Any]) -> tuple[int, int]:
    """Returns (real, padded) numbers of tokens of a batch with arrays NAME and NAME_lengths."""
    names = [name for name in batch if f"{name}_lengths" in batch]
    return sum(batch[f"{name}_lengths"].sum() for name in names), sum(batch[name].size for name in names)
