"""Target files: computed once, resumable, verified by digest."""

import hashlib
import pathlib
import time

import jax
import numpy as np

from llm2vec_gen_jax.common import locks, progress
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import (
    fingerprint,
    new_array,
    read_json,
    sha256_file,
    write_json,
)
from llm2vec_gen_jax.parallel import preemption, processes
from llm2vec_gen_jax.pretrained.default_backbone import cache_folder

_FLUSH_EVERY = 20  # batches between records of how far a target file is
_HASHED = 8192  # vectors that are read at a time to see whether they are what was written


def compute_once(responses, key, lengths, batch_size, make, together=False):
    """Returns the targets (n, E) of the file next to the responses that `key` names, computed if they are not there.

    make() loads the teacher and returns (embed, E), where embed(rows) gives the vectors (len(rows), E) of texts.
    together: it takes all processes to embed; otherwise process 0 does it alone. It alone reads and writes files.
    """
    file = _folder(responses) / f"{fingerprint(key)}.npy"
    computed = not processes.run_on_process_0(lambda: _is_kept(file))
    if computed:
        first = jax.process_index() == 0
        lock = locks.Lock(file.with_suffix(".lock"))
        try:
            waiting = False
            while not processes.run_on_process_0(lambda: _acquire(lock)):
                if first and not waiting:
                    print(f"waiting for another process, which holds {lock.path}", flush=True)
                waiting = True
                if processes.stop_requested():
                    raise preemption.Stopped(f"{file}: stopped as asked, while another process computes it")
            computed = not processes.run_on_process_0(lambda: _is_kept(file))  # else the other process has
            if computed and (together or first):
                stop = processes.stop_requested if together or jax.process_count() == 1 else lambda: False
                embed, width = make()
                with preemption.deferred():
                    _fill(file, lengths, batch_size, embed, width, stop, together)
        finally:
            lock.release()
        processes.barrier("teacher targets")
    if not file.exists():
        raise InputError(f"{file}: was written by process 0, but cannot be seen here: data must be on a shared disk")
    if jax.process_index() != 0 and not _is_kept(file):
        raise InputError(f"{file}: cannot be read here as process 0 wrote it: data must be on a shared disk")
    return np.load(file)


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

    done = processes.run_on_process_0(begin) if together else begin()
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
