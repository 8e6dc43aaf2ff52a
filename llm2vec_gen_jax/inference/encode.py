"""Encoding: texts packed into rows of a few fixed lengths, tokenized ahead in a thread, results in input order."""

import bisect
import collections
import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError, not_finite
from llm2vec_gen_jax.data.buckets import row_length
from llm2vec_gen_jax.model.attention import SHARED
from llm2vec_gen_jax.model.execution import platform_jit
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel, Packed
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone

T = TypeVar("T")
IdLists = Sequence[NDArray[np.int32]]

WINDOW = 8192  # texts that are packed together
_BASES = (256, 384, 512)  # row lengths for shorter texts
_QUADRATIC = 2048  # row length at which attention costs about as much as the matrix products (SmolLM2-135M)
_SHORT = (32, 64, 128)  # row lengths for a call that fits one row
_SHRINK = 4  # compiled batch sizes are n, n/4, n/16, ..., so that a few rows are not padded to n


@functools.partial(platform_jit, static_argnums=(1,))
def _encode(
    model: LLM2VecGenModel, soft_prompts: bool, trainable: Any, frozen: Any, packed: Packed
) -> tuple[jax.Array, jax.Array | None]:
    return model.encode_packed(trainable, frozen, packed, soft_prompts)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One forward pass over `height` rows of `width` tokens; rows: indices of the texts in each row.

    shared: tokens that all texts start with, which are computed once per row.
    """

    height: int
    width: int
    rows: list[list[int]]
    shared: int = 0


def shared_prefix(ids: IdLists) -> int:
    """Returns the number of tokens that all texts start with."""
    shortest = min(map(len, ids), default=0)
    starts = np.array([row[:shortest] for row in ids]).reshape(len(ids), shortest)
    equal = (starts == starts[:1]).all(axis=0)
    return int(np.argmin(np.append(equal, False)))


def pack(lengths: Sequence[int], base: int, shared: int = 0) -> list[tuple[int, list[int]]]:
    """Returns rows [(width, texts)], by best-fit decreasing bin packing.

    A text that fits into no row starts one of `row_length`. shared: see Batch.
    """
    rows: list[tuple[int, list[int]]] = []
    gaps: list[tuple[int, int]] = []  # (free tokens, row), sorted
    own = [length - shared for length in lengths]
    shortest = min(own, default=0)
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        index = bisect.bisect_left(gaps, (own[text],))
        if index < len(gaps):
            free, row = gaps.pop(index)
        else:
            width, row = row_length(lengths[text], base), len(rows)
            free = width - shared
            rows.append((width, []))
        rows[row][1].append(text)
        if free - own[text] >= shortest:
            bisect.insort(gaps, (free - own[text], row))
    return rows


def pack_batches(lengths: Sequence[int], batch_size: int, shards: int, shared: int = 0) -> list[Batch]:
    """Returns the Batches for texts of `lengths` tokens, including the appended tokens. Deterministic.

    batch_size: rows of 256 tokens per pass, fewer if they are longer. shards: devices over which a batch is split.
    shared: see Batch.
    """
    total = sum(lengths) - shared * max(len(lengths) - 1, 0)
    if 0 < total <= _SHORT[-1]:
        width = next(width for width in _SHORT if width >= total)
        return [Batch(shards, width, [list(range(len(lengths)))], shared)]
    packings = [pack(lengths, base, shared) for base in _BASES]
    rows = min(packings, key=lambda rows: sum(width * (1 + width / _QUADRATIC) for width, _ in rows))
    batches = []
    for width in sorted({width for width, _ in rows}, reverse=True):
        remaining = [texts for row_width, texts in rows if row_width == width]
        for height in heights(width, batch_size, shards):
            while len(remaining) >= height or (remaining and height == shards):
                batches.append(Batch(height, width, remaining[:height], shared))
                remaining = remaining[height:]
    return batches


def plan_window(model: LLM2VecGenModel, backbone: LoadedBackbone, ids: IdLists, batch_size: int) -> list[Batch]:
    """Returns the Batches for texts that are packed together, with their common prefix, such as an instruction, shared.

    The prefix is that of the ids, because a tokenizer may merge the end of an instruction with the text.
    """
    dtype, head_dim = backbone.frozen["embedding"].dtype, model.architecture.head_dim
    shared = shared_prefix(ids) if model.execution.shares_prefix(head_dim, dtype) else 0
    lengths = [len(row) + model.num_appended for row in ids]
    return pack_batches(lengths, batch_size, sharding.batch_shards(backbone.mesh), shared)


def heights(width: int, batch_size: int, shards: int) -> list[int]:
    """Returns the possible numbers of rows of a pass, descending: multiples of `shards`."""
    multiple, result = max(batch_size * _BASES[0] // width // shards, 1), []
    while multiple > 1:
        result.append(multiple * shards)
        multiple //= _SHRINK
    return [*result, shards]


def shapes(max_length: int, batch_size: int, shards: int) -> list[tuple[int, int]]:
    """Returns all possible (rows, tokens) for texts of at most max_length tokens, including the appended tokens."""
    widths = {row_length(length, base) for base in _BASES for length in range(1, max_length + 1)}
    long = {(height, width) for width in widths for height in heights(width, batch_size, shards)}
    return sorted(long | {(shards, width) for width in _SHORT})


def computed_tokens(batches: Iterable[Batch]) -> int:
    """Returns the number of tokens computed for Batches, including padding."""
    return sum(batch.height * batch.width for batch in batches)


def arrange(
    batch: Batch, ids: IdLists, num_thought_tokens: int, num_appended: int
) -> tuple[Packed, np.ndarray, np.ndarray, np.ndarray]:
    """Returns (Packed of a Batch, as numpy; indices of its texts; row and slot of each text in the results)."""
    shape = (batch.height, batch.width)
    ids_BT, segments_BT, positions_BT = (np.zeros(shape, np.int32) for _ in range(3))
    first_BS = np.zeros((batch.height, batch.width // num_appended), np.int32)
    appended = -1 - np.arange(num_appended)
    positions, shared = [], batch.shared
    for row, texts in enumerate(batch.rows):
        start = shared
        ids_BT[row, :start] = ids[texts[0]][:shared]
        segments_BT[row, :start] = SHARED
        positions_BT[row, :start] = np.arange(shared)
        for slot, text in enumerate(texts):
            end = start + len(ids[text]) - shared
            last = end + num_appended
            ids_BT[row, start:end] = ids[text][shared:]
            ids_BT[row, end:last] = appended
            segments_BT[row, start:last] = slot + 1
            positions_BT[row, start:last] = np.arange(shared, shared + last - start)
            first_BS[row, slot] = end + num_thought_tokens
            positions.append((text, row, slot))
            start = last
    arrays: Any = ids_BT, segments_BT, positions_BT, first_BS
    return Packed(*arrays), *np.array(positions).T


@dataclasses.dataclass
class _Window:
    """Partial results of a window of texts. tag: see encode_windows."""

    tag: Any
    ids: IdLists
    embeddings: NDArray[np.float32]
    soft_prompts: NDArray[np.float32] | None


def finite(arrays: Iterable[np.ndarray]) -> NDArray[np.bool_]:
    """Returns whether all values of each row of arrays (n, ...) are finite: bool (n,)."""
    return np.logical_and.reduce([np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in arrays])


def unpack(result: Iterable[Any], rows: np.ndarray, slots: np.ndarray) -> list[np.ndarray]:
    """Returns the results of a pass that are not None, by text: arrays (n, ...). All processes of the mesh call it."""
    return [sharding.to_numpy(array)[rows, slots] for array in result if array is not None]


def repair(
    results: Sequence[np.ndarray], texts: np.ndarray, rows: np.ndarray, alone: Callable[[int], Sequence[np.ndarray]]
) -> Iterator[int]:
    """Recomputes, one by one, texts that are not finite and share a row with others.

    A text that overflows makes all texts of its row NaN: masked tokens have weight zero, and 0 * NaN is NaN.
    results: arrays (n, ...) of n `texts`, updated in place. rows: row of each text. alone(text): arrays (1, ...) of a
    text in a row without others. Yields the texts that are not finite alone.
    """
    for index in np.flatnonzero(~finite(results)):
        if np.count_nonzero(rows == rows[index]) > 1:
            for array, recomputed in zip(results, alone(texts[index])):
                array[index] = recomputed[0]
        if not finite([array[index : index + 1] for array in results])[0]:
            yield texts[index]


def check_texts(inputs: Any) -> list[str]:
    """Returns the list of texts of a string or an iterable of strings.

    Raises InputError for anything else: iterating over a dict or a table gives keys, over a set an arbitrary order.
    """
    if isinstance(inputs, str):
        return [inputs]
    keyed = isinstance(inputs, bytes | Mapping | set | frozenset) or hasattr(inputs, "columns")
    if keyed or not isinstance(inputs, Iterable) or getattr(inputs, "ndim", 1) != 1:
        raise InputError(f"inputs must be a string or a list of them (of a table, one column), found {_name(inputs)}")
    texts = list(inputs)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"input {number} must be a string, found {_name(text)}")
    return texts


def _name(value: object) -> str:
    return type(value).__name__


def encode_windows(
    model: LLM2VecGenModel,
    trainable: Any,
    backbone: LoadedBackbone,
    windows: Iterable[tuple[T, IdLists]],
    batch_size: int,
    soft_prompts: bool,
    bar: Any,
    on_not_finite: Callable[[T, int], None] | None = None,
) -> Generator[tuple[T, NDArray[np.float32], NDArray[np.float32] | None]]:
    """Yields (tag, embeddings (n, E), soft prompts (n, K, D) or None) for each (tag, n id lists).

    A pass is dispatched before the results of the previous one are fetched, across windows; a thread reads `windows`
    and arranges the passes (see plan_window). bar: a tqdm bar, updated by texts. on_not_finite(tag, index): called for
    a text with NaN or infinite results, default raises InputError; if it returns, the results are yielded unchanged.
    """
    on_not_finite = on_not_finite or _raise_not_finite(backbone)
    mesh, K, D = backbone.mesh, model.num_tokens, model.architecture.hidden_size

    def passes():
        for tag, ids in windows:
            embeddings = np.zeros((len(ids), model.embedding_size), np.float32)
            window = _Window(tag, ids, embeddings, np.zeros((len(ids), K, D), np.float32) if soft_prompts else None)
            for batch in plan_window(model, backbone, ids, batch_size):
                packed, *where = arrange(batch, ids, model.num_thought_tokens, model.num_appended)
                yield window, packed, where
            yield window, None, None

    def finish(window, result, where, tokens):
        texts, rows, slots = where
        results = unpack(result, rows, slots)
        for text in repair(results, texts, rows, lambda text: alone(window.ids[text])):
            on_not_finite(window.tag, int(text))
        for array, values in zip((window.embeddings, window.soft_prompts), results):
            array[texts] = values
        bar.update(len(texts))
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-3):,.0f} tokens/s", refresh=False)

    def alone(ids):
        [batch] = plan_window(model, backbone, [ids], batch_size)
        packed, _, *where = arrange(batch, [ids], model.num_thought_tokens, model.num_appended)
        packed = sharding.put_rows(packed, mesh)
        return unpack(_encode(model, soft_prompts, trainable, backbone.frozen, packed), *where)

    dispatched: collections.deque[tuple[Any, ...]] = collections.deque()
    tokens = 0

    def completed():
        window, result, *rest = dispatched.popleft()
        if result is None:
            yield window.tag, window.embeddings, window.soft_prompts
        else:
            finish(window, result, *rest)

    with contextlib.closing(ahead(passes())) as stream:
        for window, packed, where in stream:
            if packed is None:
                dispatched.append((window, None))
            else:
                tokens += int(np.count_nonzero(packed.segments_BT))
                result = _encode(model, soft_prompts, trainable, backbone.frozen, sharding.put_rows(packed, mesh))
                dispatched.append((window, result, where, tokens))
            while len(dispatched) > 1:
                yield from completed()
    while dispatched:
        yield from completed()


def _raise_not_finite(backbone: LoadedBackbone) -> Callable[[Any, int], None]:
    def on_not_finite(_: Any, index: int) -> None:
        raise not_finite(f"text {index} (from 0)", backbone.dtype)

    return on_not_finite


def warmup(
    model: LLM2VecGenModel,
    trainable: Any,
    backbone: LoadedBackbone,
    max_length: int,
    batch_size: int,
    soft_prompts: bool,
    show_progress_bar: bool = False,
) -> int:
    """Compiles all programs for texts of at most max_length tokens, without running them. Returns their number."""
    shards = sharding.batch_shards(backbone.mesh)
    needed = shapes(max_length, batch_size, shards)
    with progress.bar(len(needed), "program", "compile", enabled=show_progress_bar) as bar:
        for height, width in needed:
            shapes_of = [(height, width)] * 3 + [(height, width // model.num_appended)]
            arrays: Any = (np.zeros(shape, np.int32) for shape in shapes_of)
            packed = sharding.put_rows(Packed(*arrays), backbone.mesh)
            _encode.compile(model, soft_prompts, trainable, backbone.frozen, packed)
            bar.update(1)
    return len(needed)


def ahead(iterable: Iterable[T], depth: int = 4) -> Generator[T]:
    """Yields the items of an iterable, which a thread reads up to `depth` ahead. Propagates its exceptions."""
    items: queue.Queue[Any] = queue.Queue(depth)
    stop, end = threading.Event(), object()

    def put(item):
        while not stop.is_set():
            try:
                return items.put(item, timeout=0.1)
            except queue.Full:
                pass

    def read():
        try:
            for item in iterable:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    # A daemon: a blocked read of standard input must not keep an interrupted process alive.
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)  # a thread in native code at interpreter exit would abort the process
