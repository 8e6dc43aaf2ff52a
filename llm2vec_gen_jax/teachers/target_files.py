"""Files of alignment targets: computed once, resumable, verified by digest."""

import hashlib
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.common import locks, progress
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import fingerprint, new_array, read_json, sha256_file, write_json
from llm2vec_gen_jax.data.buckets import length_sorted_batches, longest_first
from llm2vec_gen_jax.parallel import preemption, processes
from llm2vec_gen_jax.pretrained.default_backbone import cache_folder

logger = logging.getLogger(__name__)

_FLUSH_EVERY = 20  # batches between progress records
_HASHED = 8192  # vectors read at a time to verify the digest

Embed = Callable[[np.ndarray], np.ndarray]


def compute_once(
    responses: str,
    key: dict[str, Any],
    lengths: Sequence[int],
    batch_size: int,
    make: Callable[[], tuple[Embed, int]],
    together: bool = False,
) -> NDArray[np.float32]:
    """Returns the targets (n, E) stored next to the responses under a hash of `key`, computing them if needed.

    make() loads the teacher and returns (embed, E), where embed(rows) returns the vectors (len(rows), E) of texts.
    together: all processes embed; otherwise process 0 only. Only process 0 reads and writes files.
    """
    file = _folder(responses) / f"{fingerprint(key)}.npy"
    computed = not processes.run_on_process_0(lambda: _is_valid(file))
    if computed:
        first = jax.process_index() == 0
        lock = locks.Lock(file.with_suffix(".lock"))
        try:
            waiting = False
            while not processes.run_on_process_0(lambda: _acquire(lock)):
                if first and not waiting:
                    logger.warning(f"waiting for another process, which holds {lock.path}")
                waiting = True
                if processes.stop_requested():
                    raise preemption.Stopped(f"{file}: stopped on request, while another process computes the targets")
            computed = not processes.run_on_process_0(lambda: _is_valid(file))  # unless the other process wrote it
            if computed and (together or first):
                stop = processes.stop_requested if together or jax.process_count() == 1 else lambda: False
                embed, width = make()
                with preemption.deferred():
                    _fill(file, lengths, batch_size, embed, width, stop, together)
        finally:
            lock.release()
        processes.barrier("teacher targets")
    if not file.exists():
        raise InputError(f"{file}: written by process 0, but not visible here: data must be on a shared disk")
    if jax.process_index() != 0 and not _is_valid(file):
        raise InputError(f"{file}: differs here from what process 0 wrote: data must be on a shared disk")
    return np.load(file)


def _folder(responses):
    path = pathlib.Path(responses)
    return path.with_name(path.name + ".targets") if path.exists() else cache_folder() / "targets"


def _acquire(lock, seconds=1.0):
    """Returns whether the lock was acquired before a timeout."""
    end = time.monotonic() + seconds
    while not lock.acquire():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _is_valid(file):
    """Returns whether a file of targets exists and matches its record."""
    if not file.exists():
        return False
    try:
        record = read_json(file.with_suffix(".json"))
        array = np.load(file, mmap_mode="r", allow_pickle=False)
        actual = {"shape": list(array.shape), "dtype": str(array.dtype), "sha256": sha256_file(file)}
    except (InputError, OSError, ValueError, EOFError):  # numpy raises these for a damaged header or length
        record, actual = {}, None
    if record != actual:
        logger.warning(f"{file}: modified after it was written, or without a record; computed again")
    return record == actual


class _Partial:
    """A partial file of targets (n, width), filled in the order of texts `order`, and its progress record.

    The record has a digest of the vectors in that order; a file that does not match it is started again.
    """

    def __init__(self, file, order, width):
        self.file, self.order, self.shape = file, order, (len(order), width)
        self.path, self.marker = file.with_name(f"{file.stem}.partial.npy"), file.with_name(f"{file.stem}.partial.json")
        self.targets = self._resume()
        if self.targets is None:
            self.done, self.digest = 0, hashlib.sha256()
            self.marker.unlink(missing_ok=True)
            self.targets = new_array(self.path, self.shape)

    def _resume(self):
        """Returns the array of an interrupted computation; None if there is none or it does not match its record."""
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
            pass  # numpy evaluates the header as Python, so damage raises many types
        logger.warning(f"{self.path}: modified after it was written; computed from the start")
        return None

    def _record(self):
        return {"done": self.done, "shape": list(self.shape), "sha256": self.digest.hexdigest()}

    def write(self, vectors):
        """Writes the vectors of the next texts."""
        vectors = np.ascontiguousarray(vectors, np.float32)
        self.targets[self.order[self.done : self.done + len(vectors)]] = vectors
        self.digest.update(vectors.tobytes())
        self.done += len(vectors)

    def flush(self):
        """Writes everything to disk, with the record from which a later call resumes."""
        self.targets.flush()
        write_json(self.marker, self._record())

    def finish(self):
        """Renames it to the final file, after writing the record without which that would not be valid."""
        self.targets.flush()
        record = {"shape": list(self.shape), "dtype": str(self.targets.dtype), "sha256": sha256_file(self.path)}
        write_json(self.file.with_suffix(".json"), record)
        self.path.replace(self.file)
        self.marker.unlink(missing_ok=True)


def _fill(file, lengths, batch_size, embed, width, stop, together):
    """Computes `file` batch by batch, longest texts first, resuming from a partial file.

    together: all processes call it, and process 0 writes. Raises preemption.Stopped if stop() returns True.
    """
    partial = None

    def begin():
        nonlocal partial
        partial = _Partial(file, longest_first(lengths), width)
        return partial.done

    done = processes.run_on_process_0(begin) if together else begin()
    with progress.bar(len(lengths), "text", "teacher targets", initial=done) as bar:
        for number, rows in enumerate(length_sorted_batches(lengths, batch_size, done)):
            vectors, stopping = embed(rows), stop()
            bar.update(len(rows))
            done += len(rows)
            if partial:
                partial.write(vectors)
                if stopping or number % _FLUSH_EVERY == _FLUSH_EVERY - 1:
                    partial.flush()
            if stopping:
                raise preemption.Stopped(f"{file}: stopped on request, {done} of {len(lengths)} are kept")
    if partial:
        partial.finish()
