"""Texts to vectors: packed into rows of a few fixed lengths, read and tokenised ahead by a thread, order restored."""

import bisect
import collections
import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError, not_finite
from llm2vec_gen_jax.data.buckets import row_length
from llm2vec_gen_jax.model.execution import platform_jit
from llm2vec_gen_jax.model.llm2vec_gen import Packed
from llm2vec_gen_jax.parallel import sharding

WINDOW = 8192  # texts that are packed together
_BASES = (256, 384, 512)  # row lengths for texts that are shorter
_QUADRATIC = 2048  # in a row this long attention costs about as much as the matrix products (SmolLM2-135M)
_SHORT = (32, 64, 128)  # of a call that fits one row
_SHRINK = 4  # batches of n, n/4, n/16, ... rows compile, so that few rows are not padded to n


@functools.partial(platform_jit, static_argnums=(1,))
def _encode(model, soft_prompts, trainable, frozen, packed):
    return model.encode_packed(trainable, frozen, packed, soft_prompts)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One pass: `rows` lists of texts (their numbers), in an array of `height` rows of `width` tokens."""

    height: int
    width: int
    rows: list


def pack(lengths, base):
    """Returns rows [(width, texts)]: each text in the row that it fills best, the longest first.

    A text that fits no row opens one of `row_length`.
    """
    rows, gaps, least = [], [], min(lengths, default=0)
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        at = bisect.bisect_left(gaps, (lengths[text],))
        if at < len(gaps):
            free, row = gaps.pop(at)
        else:
            free, row = row_length(lengths[text], base), len(rows)
            rows.append((free, []))
        rows[row][1].append(text)
        if free - lengths[text] >= least:
            bisect.insort(gaps, (free - lengths[text], row))
    return rows


def pack_batches(lengths, batch_size, shards):
    """Returns the Batches of texts of these lengths (appended tokens included): a pure function of its arguments.

    batch_size: rows of 256 tokens in a pass; fewer of longer ones. shards: devices that split a batch.
    """
    total = sum(lengths)
    if 0 < total <= _SHORT[-1]:
        width = next(width for width in _SHORT if width >= total)
        return [Batch(shards, width, [list(range(len(lengths)))])]
    packings = [pack(lengths, base) for base in _BASES]
    rows = min(packings, key=lambda rows: sum(width * (1 + width / _QUADRATIC) for width, _ in rows))
    batches = []
    for width in sorted({width for width, _ in rows}, reverse=True):
        waiting = [texts for its_width, texts in rows if its_width == width]
        for height in heights(width, batch_size, shards):
            while len(waiting) >= height or (waiting and height == shards):
                batches.append(Batch(height, width, waiting[:height]))
                waiting = waiting[height:]
    return batches


def heights(width, batch_size, shards):
    """The numbers of rows that a pass may have, descending: multiples of `shards`, down to it."""
    most, found = max(batch_size * _BASES[0] // width // shards, 1), []
    while most > 1:
        found.append(most * shards)
        most //= _SHRINK
    return [*found, shards]


def shapes(max_length, batch_size, shards):
    """Returns every (rows, tokens) that texts of at most max_length tokens, the appended ones included, can need."""
    widths = {row_length(length, base) for base in _BASES for length in range(1, max_length + 1)}
    found = {(height, width) for width in widths for height in heights(width, batch_size, shards)}
    return sorted(found | {(shards, width) for width in _SHORT})


def computed_tokens(batches):
    """Tokens that the passes of a plan compute, padding included."""
    return sum(batch.height * batch.width for batch in batches)


def arrange(batch, ids, num_thought_tokens, num_appended):
    """Returns (Packed of a Batch, as numpy; its texts; the row and the slot of each, for indexing results)."""
    shape = (batch.height, batch.width)
    ids_BT, segments_BT, positions_BT = (np.zeros(shape, np.int32) for _ in range(3))
    first_BS = np.zeros((batch.height, batch.width // num_appended), np.int32)
    appended = -1 - np.arange(num_appended)
    places = []
    for row, texts in enumerate(batch.rows):
        start = 0
        for slot, text in enumerate(texts):
            end = start + len(ids[text])
            last = end + num_appended
            ids_BT[row, start:end] = ids[text]
            ids_BT[row, end:last] = appended
            segments_BT[row, start:last] = slot + 1
            positions_BT[row, start:last] = np.arange(last - start)
            first_BS[row, slot] = end + num_thought_tokens
            places.append((text, row, slot))
            start = last
    return Packed(ids_BT, segments_BT, positions_BT, first_BS), *np.array(places).T


@dataclasses.dataclass
class _Window:
    """The results of some texts while they are made. tag: whatever the caller gave with them."""

    tag: Any
    ids: list
    embeddings: np.ndarray
    soft_prompts: np.ndarray | None


def finite(arrays):
    """Whether all numbers of each row are finite: bool (n,), of arrays (n, ...)."""
    return np.logical_and.reduce([np.isfinite(x).all(axis=tuple(range(1, x.ndim))) for x in arrays])


def unpack(result, rows, slots):
    """Returns the arrays of a pass, without those that are None, at the places of its texts: (n, ...) each."""
    return [np.asarray(array)[rows, slots] for array in result if array is not None]


def repair(found, texts, rows, alone):
    """Computes anew, one by one, the texts of a pass that are not finite because another text of their row is not:
    a hidden token has the weight zero, and zero times NaN is NaN.

    found: arrays (n, ...) of n `texts`, changed in place. rows: the row of each. alone(text): the arrays (1, ...) of a
    text in a row of its own. Yields the texts that are not finite alone.
    """
    for place in np.flatnonzero(~finite(found)):
        if np.count_nonzero(rows == rows[place]) > 1:
            for array, one in zip(found, alone(texts[place])):
                array[place] = one[0]
        if not finite([array[place : place + 1] for array in found])[0]:
            yield texts[place]


def check_texts(inputs):
    """Returns the list of texts that `inputs`, a string or an iterable of them, holds.

    Raises InputError for all else: a dict or a table would iterate over its keys, a set in no order.
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


def _name(value):
    return type(value).__name__


def encode_windows(model, trainable, backbone, windows, batch_size, soft_prompts, bar, refuse=None):
    """Yields (tag, embeddings (n, E), soft prompts (n, K, D) or None), float32, of each (tag, n id lists).

    The next pass is dispatched before the results of the last are fetched, across windows; `windows` is read, and its
    passes are arranged, by a thread. bar: a tqdm bar, moved by texts. refuse(tag, number): is called for a text of
    which the vectors hold NaN or infinity, and raises what names it; where it returns, they are yielded as they are.
    """
    refuse = refuse or _refuse(backbone)
    mesh, K, D = backbone.mesh, model.num_tokens, model.architecture.hidden_size
    shards = sharding.batch_shards(mesh)

    def passes():
        for tag, ids in windows:
            embeddings = np.zeros((len(ids), model.embedding_size), np.float32)
            window = _Window(tag, ids, embeddings, np.zeros((len(ids), K, D), np.float32) if soft_prompts else None)
            lengths = [len(row) + model.num_appended for row in ids]
            for batch in pack_batches(lengths, batch_size, shards):
                packed, *where = arrange(batch, ids, model.num_thought_tokens, model.num_appended)
                yield window, packed, where
            yield window, None, None

    def finish(window, result, where, tokens):
        texts, rows, slots = where
        found = unpack(result, rows, slots)
        for text in repair(found, texts, rows, lambda text: alone(window.ids[text])):
            refuse(window.tag, int(text))
        for array, values in zip((window.embeddings, window.soft_prompts), found):
            array[texts] = values
        bar.update(len(texts))
        bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-3):,.0f} tokens/s", refresh=False)

    def alone(ids):
        [batch] = pack_batches([len(ids) + model.num_appended], batch_size, shards)
        packed, _, *where = arrange(batch, [ids], model.num_thought_tokens, model.num_appended)
        packed = sharding.put_batch(packed, mesh)
        return unpack(_encode(model, soft_prompts, trainable, backbone.frozen, packed), *where)

    dispatched, tokens = collections.deque(), 0

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
                result = _encode(model, soft_prompts, trainable, backbone.frozen, sharding.put_batch(packed, mesh))
                dispatched.append((window, result, where, tokens))
            while len(dispatched) > 1:
                yield from completed()
    while dispatched:
        yield from completed()


def _refuse(backbone):
    def refuse(_, number):
        raise not_finite(f"text {number} (from 0)", backbone.dtype)

    return refuse


def warmup(model, trainable, backbone, max_length, batch_size, soft_prompts, show_progress_bar=False):
    """Compiles every program that texts of up to max_length tokens can need. Returns their number."""
    shards = sharding.batch_shards(backbone.mesh)
    needed = shapes(max_length, batch_size, shards)
    with progress.bar(len(needed), "program", "compile", enabled=show_progress_bar) as bar:
        for height, width in needed:
            packed = Packed(*(np.zeros((height, width), np.int32) for _ in range(3)), None)
            packed = packed.replace(first_BS=np.zeros((height, width // model.num_appended), np.int32))
            _encode(model, soft_prompts, trainable, backbone.frozen, sharding.put_batch(packed, backbone.mesh))
            bar.update(1)
    return len(needed)


def ahead(iterable, depth=4):
    """Yields the items of an iterable, which a thread makes up to `depth` ahead. Its exceptions come through."""
    made, stop, end = queue.Queue(depth), threading.Event(), object()

    def put(item):
        while not stop.is_set():
            try:
                return made.put(item, timeout=0.1)
            except queue.Full:
                pass

    def make():
        try:
            for item in iterable:
                put((item, None))
                if stop.is_set():
                    return
            put((end, None))
        except BaseException as error:
            put((end, error))

    # A daemon: a read of standard input that nobody ends must not keep an interrupted process alive.
    thread = threading.Thread(target=make, daemon=True)
    thread.start()
    try:
        while True:
            item, error = made.get()
            if error is not None:
                raise error
            if item is end:
                return
            yield item
    finally:
        stop.set()
        thread.join(timeout=5)  # a thread that is inside native code when Python ends would abort the process
