"""Deterministic schedule of padded batches, read through grain."""

import dataclasses
import functools

import grain
import numpy as np

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.data.buckets import choose_edges


@dataclasses.dataclass(frozen=True)
class Batch:
    """Which examples make a batch, and the lengths (T, S) that they are padded to; extra: that of the extra texts."""

    rows: np.ndarray
    T: int
    S: int
    extra: int = 0


class BatchSchedule:
    """Batches as a pure function of (seed, lengths, step): no state, so a run resumes from an integer.

    Examples fall into cells by their padded query and answer lengths. An epoch is shuffled, then sorted by cell and
    cut, so only len % batch_size examples (others every epoch) sit out; the order of its batches is shuffled too.
    extra_lengths: the longest extra text of each example. They have no cells: a batch takes the edge that holds them.
    """

    def __init__(self, query_lengths, answer_lengths, batch_size, max_buckets, shuffle, seed, extra_lengths=()):
        count = len(query_lengths)
        if count < batch_size:
            raise InputError(f"{count} examples do not fill a batch of {batch_size}: lower train.batch_size")
        # With few examples, many cells would only make batches that straddle them.
        buckets = min(max_buckets, max(1, int((count / (4 * batch_size)) ** 0.5)))
        self.query_edges = choose_edges(query_lengths, buckets)
        self.answer_edges = choose_edges(answer_lengths, buckets)
        self.query_cell = np.searchsorted(self.query_edges, query_lengths)
        self.answer_cell = np.searchsorted(self.answer_edges, answer_lengths)
        self.extra_lengths = np.asarray(extra_lengths)
        self.extra_edges = choose_edges(extra_lengths, buckets) if len(extra_lengths) else []
        self.batch_size, self.shuffle, self.seed = batch_size, shuffle, seed
        self.batches_per_epoch = count // batch_size
        self._epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __getitem__(self, step):
        """Returns the Batch of a training step, counted from 0."""
        epoch, index = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch if self.shuffle else 0)[index]

    def _make_epoch(self, epoch):
        if not self.shuffle:
            return [self._batch(rows) for rows in self._cut(np.arange(len(self.query_cell)))]
        random = np.random.default_rng([self.seed, epoch])
        order = random.permutation(len(self.query_cell))[: self.batches_per_epoch * self.batch_size]
        query, answer = self.query_cell[order], self.answer_cell[order]
        # Queries up and down in turn, so that the two cells that a batch may straddle are neighbours.
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


class Batches:
    """The padded batches of a Plan by step: what grain reads. Process p of P holds rows p*B/P ... of each batch."""

    def __init__(self, examples, plan, process, processes):
        if plan.batch_size % processes:
            raise InputError(f"train.batch_size={plan.batch_size} does not divide over {processes} processes")
        self.examples, self.plan = examples, plan
        size = plan.batch_size // processes
        self.local = slice(process * size, (process + 1) * size)

    def __len__(self):
        return 2**40  # there is always another epoch

    def __getitem__(self, step):
        batch = self.plan[step]
        rows = batch.rows[self.local]
        query = [self.examples.query[row] for row in rows]
        answer = [self.examples.answer[row] for row in rows]
        arrays = {
            "query": pad(query, batch.T),
            "query_lengths": np.array([len(ids) for ids in query], np.int32),
            "answer": pad(answer, batch.S),
            "answer_lengths": np.array([len(ids) for ids in answer], np.int32),
            "target": np.asarray(self.examples.target[rows], np.float32),
        }
        if self.examples.extra:
            extra = [[ids[row] for ids in self.examples.extra.values()] for row in rows]
            arrays["extra"] = np.stack([pad(texts, batch.extra) for texts in extra])
            arrays["extra_lengths"] = np.array([[len(ids) for ids in texts] for texts in extra], np.int32)
        if self.examples.negative_target is not None:
            arrays["negative_target"] = np.asarray(self.examples.negative_target[rows], np.float32)
        return arrays


def pad(ids, length):
    """Right-pads id sequences with zeros to an int32 array (n, length)."""
    out = np.zeros((len(ids), length), np.int32)
    for row, values in enumerate(ids):
        out[row, : len(values)] = values
    return out


def iterate(batches, first, last):
    """Yields the batches of steps first ... last - 1 through grain, padded ahead of time in threads."""
    dataset = grain.MapDataset.source(batches)[first:last]
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)))


def count_tokens(batch):
    """Returns (real, computed) tokens of a padded batch, in which the lengths of NAME are NAME_lengths."""
    names = [name for name in batch if f"{name}_lengths" in batch]
    return sum(batch[f"{name}_lengths"].sum() for name in names), sum(batch[name].size for name in names)
