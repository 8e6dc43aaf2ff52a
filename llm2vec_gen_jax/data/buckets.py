"""Bucketing of lengths: few padded lengths to compile, with little padding."""

from collections.abc import Iterator, Sequence

import numpy as np

_MULTIPLE = 8  # padded lengths are multiples of this
_OCTAVE = 256  # tokens; row lengths are multiples of a quarter of this, times a power of two


def round_up(length: int, multiple: int = _MULTIPLE) -> int:
    """Returns the smallest positive multiple that is at least `length`."""
    return max(-(-length // multiple), 1) * multiple


def choose_edges(lengths: Sequence[int] | np.ndarray, count: int, waste: float = 0.05) -> list[int]:
    """Returns the fewest padded lengths, at most `count`, with a padding fraction of at most `waste`.

    They minimize padding, by dynamic programming over the distinct lengths, rounded up to a multiple of 8.
    """
    padded, counts = np.unique([round_up(length) for length in lengths], return_counts=True)
    real = max(int(np.sum(lengths)), 1)
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    best = [0.0] + [np.inf] * len(padded)  # minimum padded total of the first i distinct lengths
    choices: list[list[int]] = []
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


def row_length(length: int, base: int) -> int:
    """Returns the row length for `length` tokens: the smallest of 256, 320, 384, 448, 512, 640, ..., or `base`."""
    octave = _OCTAVE
    while 2 * octave < length:
        octave *= 2
    return max(-(-length * 4 // octave) * octave // 4, base)


def bucket_length(length: int) -> int:
    """Returns the smallest of 8, 12, 16, 24, 32, 48, 64, ... that is at least `length`."""
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


def pad(ids: Sequence[Sequence[int] | np.ndarray], length: int) -> np.ndarray:
    """Right-pads id sequences with zeros to an int32 array (n, length)."""
    out = np.zeros((len(ids), length), np.int32)
    for row, values in enumerate(ids):
        out[row, : len(values)] = values
    return out
