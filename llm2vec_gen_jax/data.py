"""Training data: records, their ids, and a deterministic plan of padded batches that grain reads."""

import dataclasses
import functools
import hashlib
import pathlib

import grain
import numpy as np

from llm2vec_gen_jax.errors import InputError, nearest
from llm2vec_gen_jax.files import is_broken, read_jsonl

_MULTIPLE = 8  # padded lengths are multiples of this


def read_records(source, columns, split="train", limit=None, key="input"):
    """Returns a list of dicts with the string `columns` (and `id`, when there is one) of a JSONL[.gz] file or a
    Hugging Face dataset.

    key: the setting that names the source, for errors.
    Raises InputError naming file, line and column for a missing column, a value that is no string, or no rows.
    """
    path = pathlib.Path(source).expanduser()
    if not path.exists() and path.suffix in (".jsonl", ".gz", ".json"):
        raise InputError(f"{key}={source}: no such file")
    if path.exists():
        rows = ((f"{source}, line {number}", row) for number, row in read_jsonl(path))
    else:
        rows = ((f"{source}, row {number}", row) for number, row in enumerate(_hub_dataset(source, split)))
    records = []
    for where, row in rows:
        if limit is not None and len(records) == limit:
            break
        if not isinstance(row.get("id", 0), (str, int)):
            raise InputError(f"{where}: 'id' must be a string or a whole number, found {row['id']!r}")
        for column in columns:
            if column not in row:
                raise InputError(f"{where}: no column {column!r}{nearest(column, row)}")
            if not isinstance(row[column], str):
                raise InputError(f"{where}: {column!r} must be a string, found {type(row[column]).__name__}")
        record = {key: row[key] for key in ("id", *columns) if key in row}
        for key, value in record.items():
            if isinstance(value, str) and is_broken(value):
                raise InputError(f"{where}: {key!r} holds half of a surrogate pair, which is no valid text")
        records.append(record)
    if not records:
        raise InputError(f"{source}: no rows")
    return records


def read_texts(path, field):
    """Returns the texts of a .txt file (one per line) or of `field` of a .jsonl[.gz] file."""
    from llm2vec_gen_jax.files import read_lines

    if pathlib.Path(path).suffix == ".txt":
        texts = [line for _, line in read_lines(path)]
        if not texts:
            raise InputError(f"{path}: no lines")
        return texts
    return [row[field] for row in read_records(path, (field,))]


def _hub_dataset(source, split):
    import datasets

    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # datasets raises many types; all of them mean that it cannot be had
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"data {source!r} (split {split!r}): neither a file nor a dataset ({reason})") from None


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


@dataclasses.dataclass(frozen=True)
class Batch:
    """Which examples make a batch, and the lengths (T, S) that they are padded to; extra: that of the extra texts."""

    rows: np.ndarray
    T: int
    S: int
    extra: int = 0


class Plan:
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
