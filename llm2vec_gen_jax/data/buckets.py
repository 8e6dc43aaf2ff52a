"""Padded lengths: few enough to compile, close enough to waste little."""

from collections.abc import Iterator, Sequence

import numpy as np

_MULTIPLE = 8  # padded lengths are multiples of this
_OCTAVE = 256  # tokens: row lengths are quarters of this, then of its doubles


def round_up(length, multiple=_MULTIPLE):
    """The least positive multiple that is not below `length`."""
    return max(-(-length // multiple), 1) * multiple


def choose_edges(lengths, count, waste=0.05):
    """Returns at most `count` padded lengths: as few as keep padding below `waste`, placed to make it least.

    Dynamic programming over the distinct lengths, rounded up to a multiple of 8.
    """
    padded, numbers = np.unique([round_up(length) for length in lengths], return_counts=True)
    real = max(int(np.sum(lengths)), 1)
    cumulative = np.concatenate([[0], np.cumsum(numbers)])
    best = [0.0] + [np.inf] * len(padded)  # least padded total of the first i distinct lengths
    choices = []
    for _ in range(min(count, len(padded))):
        following, choice = [0.0], [0]
        for end in range(1, len(padded) + 1):
            costs = [best[start] + padded[end - 1] * (cumulative[end] - cumulative[start]) for start in range(end)]
            choice.append(int(np.argmin(costs)))
            following.append(min(costs))
        best, choices = following, [*choices, choice]
        if best[-1] <= real / (1 - waste):
            break
    edges, end = [], len(padded)
    for choice in reversed(choices):
        if end:
            edges.append(int(padded[end - 1]))
            end = choice[end]
    return sorted(edges)


def row_length(length, base):
    """The row for a text of `length` tokens: `base`, or the least of 256, 320, 384, 448, 512, 640, ... above."""
    octave = _OCTAVE
    while 2 * octave < length:
        octave *= 2
    return max(-(-length * 4 // octave) * octave // 4, base)


def bucket_length(length):
    """The least of 8, 12, 16, 24, 32, 48, 64, ... that is not below `length`: the padded lengths that compile."""
    step = 8
    while step < length:
        if step + step // 2 >= length:
            return step + step // 2
        step *= 2
    return step


def longest_first(lengths: Sequence[int]) -> np.ndarray:
    """Returns the indices that sort texts by length, descending; texts of equal length keep their order."""
    return np.argsort([-length for length in lengths], kind="stable")


def length_sorted_batches(lengths: Sequence[int], batch_size: int, first: int = 0) -> Iterator[np.ndarray]:
    """Yields the indices of texts in batches, longest first, without the `first` longest ones."""
    order = longest_first(lengths)
    for start in range(first, len(order), batch_size):
        yield order[start : start + batch_size]
