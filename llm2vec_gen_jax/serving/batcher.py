"""Dynamic batching: what many threads ask for at the same time is computed together, by one thread."""

import collections
import dataclasses
import threading
import time
from concurrent.futures import Future, InvalidStateError
from typing import Any


class QueueFull(Exception):
    """As much waits as may wait."""


@dataclasses.dataclass
class _Job:
    """The items of one request. left: numbers of those that no batch has taken. missing: how many have no result."""

    kind: Any
    items: list
    future: Future
    arrived: float
    left: collections.deque
    results: list
    missing: int


class Batcher:
    """Calls `compute(kind, items)`, which returns a result for each item, with the items of whoever waits.

    kind: items of one kind (any hashable value) can be computed together; kinds take turns. budget(kind): the cost of
    a batch, which ends with the first item that reaches it. cost(kind, item): of an item. Requests of a kind give an
    item each in turn, so that a short one does not wait for the whole of a long one.

    max_wait: seconds that a request waits for others while nothing is computed. limit: items that may wait.
    observe(kind, seconds that the oldest request waited, number of requests, items, seconds of compute): after a batch.
    """

    def __init__(self, compute, cost, budget, max_wait, limit, observe):
        self._compute, self._cost, self._budget, self._observe = compute, cost, budget, observe
        self._max_wait, self._limit = max_wait, limit
        self._jobs = {}  # kind -> deque of jobs; the first kind is next
        self._waiting = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self):
        """The number of items that wait."""
        return self._waiting

    def submit(self, kind, items):
        """Returns a Future of the results of a list of items, in their order; cancel it, and what waits is dropped.

        Raises Full where they would exceed the limit. A request is taken when nothing waits, however long it is.
        """
        future = Future()
        job = _Job(kind, items, future, time.monotonic(), collections.deque(range(len(items))), [None] * len(items), 0)
        job.missing = len(items)
        if not items:
            future.set_result([])
            return future
        with self._changed:
            if self._closing:
                raise QueueFull("the server is stopping")
            if self._waiting and self._waiting + len(items) > self._limit:
                raise QueueFull(f"{self._waiting} inputs wait already, at most {self._limit} may")
            self._jobs.setdefault(kind, collections.deque()).append(job)
            self._waiting += len(items)
            self._changed.notify()
        future.add_done_callback(lambda done: done.cancelled() and self._drop(job))
        return future

    @property
    def busy(self):
        """Whether the thread still runs."""
        return self._thread.is_alive()

    def close(self, timeout=None):
        """Computes what still waits, then ends the thread. timeout: seconds after which it is left alone."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _drop(self, job):
        with self._changed:
            self._waiting -= len(job.left)
            job.left.clear()

    def _run(self):
        while batch := self._next():
            kind, taken, arrived = batch
            started = time.monotonic()
            try:
                results = self._compute(kind, [job.items[number] for job, number in taken])
            except Exception as error:
                for job in {id(job): job for job, _ in taken}.values():
                    _settle(job.future.set_exception, error)
                    self._drop(job)
                continue
            for (job, number), result in zip(taken, results):
                job.results[number] = result
                job.missing -= 1
                if not job.missing:
                    _settle(job.future.set_result, job.results)
            requests = len({id(job) for job, _ in taken})
            self._observe(kind, started - arrived, requests, len(taken), time.monotonic() - started)

    def _next(self):
        """Waits for a batch. Returns (kind, [(job, number of the item)], when the oldest came); None at the end."""
        with self._changed:
            while True:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return None
                kind, jobs = next(iter(self._jobs.items()))
                patience = min(job.arrived for job in jobs) + self._max_wait - time.monotonic()
                if patience <= 0 or self._closing or self._enough(kind, jobs):
                    taken = self._take(kind)
                    if taken:  # all that waited of this kind may have been dropped
                        return kind, taken, min(job.arrived for job, _ in taken)
                else:
                    self._changed.wait(patience)

    def _enough(self, kind, jobs):
        budget = self._budget(kind)
        for job in jobs:
            for number in job.left:
                budget -= self._cost(kind, job.items[number])
                if budget <= 0:
                    return True
        return False

    def _take(self, kind):
        jobs, budget, taken = self._jobs.pop(kind), self._budget(kind), []
        while jobs and budget > 0:
            job = jobs.popleft()
            if not job.left:
                continue
            number = job.left.popleft()
            taken.append((job, number))
            budget -= self._cost(kind, job.items[number])
            if job.left:
                jobs.append(job)
        self._waiting -= len(taken)
        if jobs:
            self._jobs[kind] = jobs  # after the other kinds
        return taken


def _settle(settle, value):
    try:
        settle(value)
    except InvalidStateError:
        pass  # whoever asked has gone
