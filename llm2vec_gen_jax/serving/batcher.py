"""Dynamic batching: concurrent requests are computed together in one thread."""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable, Hashable
from concurrent.futures import Future, InvalidStateError
from typing import Any


class QueueFull(Exception):
    """The queue has no room for the request."""


@dataclasses.dataclass
class _Request:
    """The items of one request. queued: indices of the items not yet in a batch. missing: number without a result."""

    items: list[Any]
    future: Future
    arrived: float
    queued: collections.deque[int]
    results: list[Any]
    missing: int


class Batcher:
    """Calls `compute(kind, items)`, which returns one result per item, with the queued items of all requests.

    kind: items of the same kind (any hashable value) can be computed together; kinds take turns. A batch ends with the
    item at which the sum of cost(kind, item) reaches budget(kind). Items are taken round-robin from the requests of a
    kind, so that a short request does not wait for all of a long one.

    max_wait: seconds that a request waits for others while nothing is computed. limit: items in the queue.
    observe: called after each batch with kind, seconds in the queue of the oldest request, number of requests, number
    of items, seconds of computation.
    """

    def __init__(
        self,
        compute: Callable[[Any, list[Any]], list[Any]],
        cost: Callable[[Any, Any], int],
        budget: Callable[[Any], int],
        max_wait: float,
        limit: int,
        observe: Callable[[Any, float, int, int, float], None],
    ) -> None:
        self._compute, self._cost, self._budget, self._observe = compute, cost, budget, observe
        self._max_wait, self._limit = max_wait, limit
        self._requests: dict[Hashable, collections.deque[_Request]] = {}  # by kind; the first kind is next
        self._waiting = 0
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of items in the queue."""
        return self._waiting

    def submit(self, kind: Hashable, items: list[Any]) -> Future:
        """Returns a Future of the list of results. Cancelling it removes the items from the queue.

        Raises QueueFull if the queue would exceed its limit; a request of any length is accepted by an empty queue.
        """
        future: Future = Future()
        count = len(items)
        request = _Request(items, future, time.monotonic(), collections.deque(range(count)), [None] * count, count)
        if not items:
            future.set_result([])
            return future
        with self._changed:
            if self._closing:
                raise QueueFull("the server is stopping")
            if self._waiting and self._waiting + count > self._limit:
                raise QueueFull(f"{self._waiting} inputs are waiting, the limit is {self._limit}")
            self._requests.setdefault(kind, collections.deque()).append(request)
            self._waiting += count
            self._changed.notify()
        future.add_done_callback(lambda done: self._drop(request) if done.cancelled() else None)
        return future

    @property
    def busy(self) -> bool:
        """Whether the thread is still running."""
        return self._thread.is_alive()

    def close(self, timeout: float | None = None) -> None:
        """Computes the queued items and ends the thread. timeout: the longest time to wait for it, in seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout)

    def _drop(self, request: _Request) -> None:
        with self._changed:
            self._waiting -= len(request.queued)
            request.queued.clear()

    def _run(self) -> None:
        while next_batch := self._next_batch():
            kind, batch, arrived = next_batch
            started = time.monotonic()
            try:
                results = self._compute(kind, [request.items[index] for request, index in batch])
            except Exception as error:
                for request in {id(request): request for request, _ in batch}.values():
                    _settle(request.future.set_exception, error)
                    self._drop(request)
                continue
            for (request, index), result in zip(batch, results):
                request.results[index] = result
                request.missing -= 1
                if not request.missing:
                    _settle(request.future.set_result, request.results)
            count = len({id(request) for request, _ in batch})
            self._observe(kind, started - arrived, count, len(batch), time.monotonic() - started)

    def _next_batch(self) -> tuple[Hashable, list[tuple[_Request, int]], float] | None:
        """Waits for a batch. Returns (kind, [(request, index of the item)], oldest arrival); None when closed."""
        with self._changed:
            while True:
                while not self._waiting and not self._closing:
                    self._changed.wait()
                if not self._waiting:
                    return None
                kind, requests = next(iter(self._requests.items()))
                remaining = min(request.arrived for request in requests) + self._max_wait - time.monotonic()
                if remaining <= 0 or self._closing or self._fills_batch(kind, requests):
                    batch = self._take(kind)
                    if batch:  # empty if all requests of this kind were cancelled
                        return kind, batch, min(request.arrived for request, _ in batch)
                else:
                    self._changed.wait(remaining)

    def _fills_batch(self, kind: Hashable, requests: collections.deque[_Request]) -> bool:
        budget = self._budget(kind)
        for request in requests:
            for index in request.queued:
                budget -= self._cost(kind, request.items[index])
                if budget <= 0:
                    return True
        return False

    def _take(self, kind: Hashable) -> list[tuple[_Request, int]]:
        requests, budget = self._requests.pop(kind), self._budget(kind)
        batch = []
        while requests and budget > 0:
            request = requests.popleft()
            if not request.queued:
                continue
            index = request.queued.popleft()
            batch.append((request, index))
            budget -= self._cost(kind, request.items[index])
            if request.queued:
                requests.append(request)
        self._waiting -= len(batch)
        if requests:
            self._requests[kind] = requests  # after the other kinds
        return batch


def _settle(settle: Callable[[Any], None], value: Any) -> None:
    try:
        settle(value)
    except InvalidStateError:
        pass  # the request was cancelled
