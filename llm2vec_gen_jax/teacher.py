"""Alignment targets: the teacher's vector of every response, computed once and kept, or read from a file."""

import functools
import hashlib
import pathlib
import time

import jax
import numpy as np
from safetensors import SafetensorError

from llm2vec_gen_jax import distributed, locks, preemption, progress, sharding
from llm2vec_gen_jax.data import choose_edges, pad
from llm2vec_gen_jax.download import cache_folder
from llm2vec_gen_jax.errors import InputError, not_finite, quote
from llm2vec_gen_jax.execution import platform_jit
from llm2vec_gen_jax.files import (
    fingerprint,
    install_command,
    new_array,
    read_array,
    read_json,
    sha256_file,
    visible,
    write_json,
)
from llm2vec_gen_jax.formats import peft
from llm2vec_gen_jax.loading import EMBEDDER_PATTERNS, load_backbone, open_backbone, resolve_adapter, resolve_embedder
from llm2vec_gen_jax.model import Model

_FLUSH_EVERY = 20  # batches between records of how far a target file is
_HASHED = 8192  # vectors that are read at a time to see whether they are what was written


def is_causal(config):
    """Whether the llm2vec teacher of a TeacherConfig attends causally.

    Without adapters an untrained bidirectional pass is far worse than the causal one, so `auto` depends on them.
    """
    return config.attention == "causal" or (config.attention == "auto" and not config.adapters)


def read_targets(path, records, rows):
    """Returns the targets (len(rows), E) that a .npy (records, E) holds for the used rows.

    Raises InputError when it is no such array.
    """
    targets = read_array(path, "teacher.path")
    if targets.ndim != 2 or len(targets) != records or not np.issubdtype(targets.dtype, np.floating):
        raise InputError(
            f"teacher.path={path}: expected a float array ({records} rows of data.responses, E), "
            f"found {targets.dtype} {targets.shape}"
        )
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinite
        targets = np.asarray(targets[rows], np.float32)
    if not (sound := np.isfinite(targets).all(axis=1)).all():
        raise InputError(f"teacher.path={path}: row {rows[np.argmin(sound)]} (from 0) holds NaN or infinity")
    return targets


def targets_of(backbone, config, answers, responses):
    """Returns (targets (n, E) float32, backbone) of stripped answers by the teacher of a TrainConfig.

    They are kept beside the responses file under a hash of teacher and texts; an interrupted computation goes on
    where it stopped. An llm2vec teacher with adapters or another backbone takes the student's place, which is then
    loaded again: there is never a second copy, and only the returned backbone may be used afterwards.
    """
    if config.teacher.kind == "sentence_transformers":
        return _by_sentence_transformers(config.teacher, answers, responses), backbone
    return _by_llm2vec(backbone, config, answers, responses)


def _by_llm2vec(backbone, config, answers, responses):
    """Mean-pooled last hidden states: E is the width D of the teacher's backbone."""
    path, mesh, attention = config.teacher.path, backbone.mesh, backbone.execution.attention
    adapters = [resolve_adapter(adapter) for adapter in config.teacher.adapters]
    causal = is_causal(config.teacher)
    reader = open_backbone(path, backbone.execution)[0] if path else backbone
    quantized = backbone.dtype == "int8"  # targets are of the weights as they are
    dtype = "bfloat16" if quantized else backbone.dtype
    ids = reader.tokenizer.encode(answers, config.data.max_answer_length)
    key = {
        "backbone": reader.identity,
        "dtype": dtype,
        "adapters": [peft.identity(adapter) for adapter in adapters],
        "causal": causal,
        "ids": fingerprint(ids),
    }
    shards = sharding.batch_shards(mesh)
    batch_size = -(-config.teacher.batch_size // shards) * shards
    edges = choose_edges([len(row) for row in ids], 8)
    replaced = bool(path or adapters or quantized)

    def make():
        frozen = backbone.frozen
        if path or quantized:
            frozen = backbone.frozen = None  # one copy at a time
            frozen = load_backbone(path or config.backbone.path, dtype, mesh, attention).frozen
        for adapter in adapters:
            frozen = peft.merge(frozen, adapter, reader.architecture)

        def embed(rows):
            batch = [ids[row] for row in rows]
            width = edges[np.searchsorted(edges, max(map(len, batch)))]
            vectors = pool_rows(reader.architecture, frozen, causal, batch, (batch_size, width), backbone.execution)
            for row in rows[~np.isfinite(vectors).all(axis=1)]:
                raise not_finite(f"{responses}: the target of {quote(answers[row])}", dtype)
            return vectors

        return embed, reader.architecture.hidden_size

    targets, computed = _kept(responses, key, [len(row) for row in ids], batch_size, make, together=True)
    if computed and replaced:
        backbone.frozen = None
        backbone = load_backbone(config.backbone.path, config.backbone.dtype, mesh, attention)
    return targets, backbone


def pool_rows(architecture, frozen, causal, ids, shape, execution):
    """Returns the llm2vec teacher's vectors (n, D), float32, of n id lists, padded to `shape` rows and tokens."""
    batch = [*ids, *[[]] * (shape[0] - len(ids))]
    lengths_B = np.array([len(row) for row in batch], np.int32)
    arrays = sharding.put_rows((pad(batch, shape[1]), lengths_B), execution.mesh)
    model = Model(architecture, 1, 0, architecture.hidden_size, execution=execution)
    return sharding.read(_mean_pool(model, causal, frozen, *arrays))[: len(ids)]


@functools.partial(platform_jit, static_argnums=(1,))
def _mean_pool(model, causal, frozen, ids_BT, lengths_B):
    return model.mean_pool(frozen, ids_BT, lengths_B, causal)


def _by_sentence_transformers(config, answers, responses):
    """Any model of that library, with its own pooling; texts are cut to its own longest length."""
    if config.path is None:
        raise InputError("teacher.path is needed: the folder or hub id of a sentence-transformers model")
    folder = resolve_embedder(config.path)
    files = sorted({path for pattern in EMBEDDER_PATTERNS for path in visible(folder, pattern)})
    key = {
        "embedder": {str(path.relative_to(folder)): sha256_file(path) for path in files},
        "prompt": config.prompt,
        "normalize": config.normalize,
        "texts": fingerprint(answers),
    }

    def make():
        embedder = _load_embedder(config.path, folder)

        def embed(rows):
            vectors = embedder.encode_document(
                [answers[row] for row in rows],
                prompt=config.prompt,
                batch_size=config.batch_size,
                normalize_embeddings=config.normalize,
                show_progress_bar=False,
            )
            for row in np.asarray(rows)[~np.isfinite(vectors).all(axis=1)]:
                name = f"teacher.path={config.path}: the vector of {quote(answers[row])}"
                raise InputError(f"{name} holds NaN or infinity")
            return vectors

        return embed, embed([0]).shape[1]

    return _kept(responses, key, [len(answer) for answer in answers], config.batch_size, make)[0]


def _load_embedder(path, folder):
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise InputError(
            f"teacher.kind=sentence_transformers needs that library: {install_command('teachers')} ({error})"
        ) from None
    try:
        return SentenceTransformer(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"teacher.path={path}: not a model of sentence-transformers ({reason})") from None


def _kept(responses, key, lengths, batch_size, make, together=False):
    """Returns (targets, whether they were computed now): from the file beside the responses that `key` names, which
    is filled where it does not exist yet.

    make() loads the teacher and returns (embed, E), where embed(rows) gives the vectors (len(rows), E) of texts.
    together: it takes all processes to embed; otherwise process 0 does it alone. It alone reads and writes files.
    """
    file = _folder(responses) / f"{fingerprint(key)}.npy"
    computed = not distributed.on_first(lambda: _is_kept(file))
    if computed:
        first = jax.process_index() == 0
        lock = locks.Lock(file.with_suffix(".lock"))
        try:
            waiting = False
            while not distributed.on_first(lambda: _acquire(lock)):
                if first and not waiting:
                    print(f"waiting for another process, which holds {lock.path}", flush=True)
                waiting = True
                if distributed.stop_requested():
                    raise preemption.Stopped(f"{file}: stopped as asked, while another process computes it")
            computed = not distributed.on_first(lambda: _is_kept(file))  # else the other process has
            if computed and (together or first):
                stop = distributed.stop_requested if together or jax.process_count() == 1 else lambda: False
                embed, width = make()
                with preemption.deferred():
                    _fill(file, lengths, batch_size, embed, width, stop, together)
        finally:
            lock.release()
        distributed.wait_for_all("teacher targets")
    if not file.exists():
        raise InputError(f"{file}: was written by process 0, but cannot be seen here: data must be on a shared disk")
    if jax.process_index() != 0 and not _is_kept(file):
        raise InputError(f"{file}: cannot be read here as process 0 wrote it: data must be on a shared disk")
    return np.load(file), computed


def _folder(responses):
    path = pathlib.Path(responses)
    return path.with_name(path.name + ".targets") if path.exists() else cache_folder() / "targets"


def _acquire(lock, seconds=1.0):
    """Returns whether this process got the lock within some time."""
    end = time.monotonic() + seconds
    while not lock.acquire():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _is_kept(file):
    """Whether a file of targets is there, as its record beside it says."""
    if not file.exists():
        return False
    try:
        record = read_json(file.with_suffix(".json"))
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        found = {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256_file(file)}
    except (InputError, OSError, ValueError, EOFError):  # numpy's, of a header or a length that is damaged
        record, found = {}, None
    if record != found:
        print(f"{file}: is not what was written, or has no record of it; computed again", flush=True)
    return record == found


class _Partial:
    """A file of targets (n, width) that is filled text by text in a given order, and a record of how far it is.

    The record has a digest of the vectors in that order: a file that does not fit it is begun again.
    """

    def __init__(self, file, order, width):
        self.file, self.order, self.shape = file, order, (len(order), width)
        self.path, self.marker = file.with_name(f"{file.stem}.partial.npy"), file.with_name(f"{file.stem}.partial.json")
        self.targets = self._begun()
        if self.targets is None:
            self.done, self.digest = 0, hashlib.sha256()
            self.marker.unlink(missing_ok=True)
            self.targets = new_array(self.path, self.shape)

    def _begun(self):
        """Returns the array of an interrupted computation; None where there is none, or not what was written."""
        if not (self.marker.exists() and self.path.exists()):
            return None
        try:
            record, targets = read_json(self.marker), np.lib.format.open_memmap(self.path, "r+")
            if targets.shape == self.shape and targets.dtype == np.float32:
                self.done, self.digest = record["done"], hashlib.sha256()
                for start in range(0, self.done, _HASHED):
                    self.digest.update(targets[self.order[start : min(start + _HASHED, self.done)]].tobytes())
                if record == self._record():
                    return targets
        except (InputError, OSError, ValueError, EOFError, KeyError, TypeError):
            pass  # numpy reads the header as Python: damage of it raises many types
        print(f"{self.path}: is not what was written; computed from the start", flush=True)
        return None

    def _record(self):
        return {"done": self.done, "shape": list(self.shape), "sha256": self.digest.hexdigest()}

    def write(self, vectors):
        """Writes the vectors of the next texts."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        self.targets[self.order[self.done : self.done + len(vectors)]] = vectors
        self.digest.update(vectors.tobytes())
        self.done += len(vectors)

    def keep(self):
        """Makes a later call go on from here."""
        self.targets.flush()
        write_json(self.marker, self._record())

    def finish(self):
        """Makes it the whole file. The record of that comes first: without it the file would not be trusted."""
        self.targets.flush()
        record = {"shape": list(self.shape), "dtype": str(self.targets.dtype), "sha256": sha256_file(self.path)}
        write_json(self.file.with_suffix(".json"), record)
        self.path.replace(self.file)
        self.marker.unlink(missing_ok=True)


def _fill(file, lengths, batch_size, embed, width, stop, together):
    """Fills `file` batch by batch, longest texts first, through a partial file that a later call continues.

    together: all processes call it, and process 0 writes. Raises preemption.Stopped when stop() says so.
    """
    order = np.argsort([-length for length in lengths], kind="stable")
    partial = None

    def begin():
        nonlocal partial
        partial = _Partial(file, order, width)
        return partial.done

    done = distributed.on_first(begin) if together else begin()
    with progress.bar(len(lengths), "text", "teacher targets", initial=done) as bar:
        for number, start in enumerate(range(done, len(lengths), batch_size)):
            rows = order[start : start + batch_size]
            vectors, stopping = embed(rows), stop()
            bar.update(len(rows))
            if partial:
                partial.write(vectors)
                if stopping or number % _FLUSH_EVERY == _FLUSH_EVERY - 1:
                    partial.keep()
            if stopping:
                raise preemption.Stopped(f"{file}: stopped as asked, {start + len(rows)} of {len(lengths)} are kept")
    if partial:
        partial.finish()
