"""Dynamic batching: results belong to their requests, all requests finish, cancelled ones are not computed."""

import threading

import hypothesis
import pytest
from hypothesis import strategies as st

from llm2vec_gen_jax.serving.batcher import Batcher, QueueFull


class Recorder:
    """Doubles numbers and records the batches; blocks before each batch while `open` is not set."""

    def __init__(self):
        self.batches, self.open, self.entered = [], threading.Event(), threading.Event()
        self.open.set()

    def __call__(self, kind, items):
        self.batches.append((kind, items))
        self.entered.set()
        self.open.wait()
        if "bad" in items:
            raise ZeroDivisionError
        return [(kind, 2 * item) for item in items]


@pytest.fixture
def make():
    """make(max_wait, limit, budget) returns (Recorder, Batcher), closed at the end of the test."""
    pairs = []

    def start(max_wait=0.0, limit=1000, budget=5):
        recorder = Recorder()
        batcher = Batcher(recorder, lambda kind, item: 1, lambda kind: budget, max_wait, limit, lambda *_: None)
        pairs.append((recorder, batcher))
        return pairs[-1]

    yield start
    for recorder, batcher in pairs:
        recorder.open.set()
        batcher.close()


def hold(recorder, batcher):
    """Blocks the thread with a first request, so that later ones are queued. Returns its Future."""
    recorder.open.clear()
    future = batcher.submit("a", [0])
    assert recorder.entered.wait(30)
    return future


@hypothesis.given(st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.integers(), max_size=12)), max_size=12))
@hypothesis.settings(max_examples=30, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_every_request_gets_its_own_results_in_order(make, requests):
    recorder, batcher = make()
    hold(recorder, batcher)
    futures = [batcher.submit(kind, items) for kind, items in requests]
    recorder.open.set()
    for (kind, items), future in zip(requests, futures):
        assert future.result(30) == [(kind, 2 * item) for item in items]
    assert all(len(items) <= 5 for _, items in recorder.batches)
    for kind in "ab":  # the smallest possible number of batches
        count = sum(len(items) for its_kind, items in requests if its_kind == kind)
        assert sum(its_kind == kind for its_kind, _ in recorder.batches[1:]) == -(-count // 5)
    assert batcher.waiting == 0


def test_requests_and_kinds_take_turns(make):
    recorder, batcher = make()
    hold(recorder, batcher)
    long, short, other = batcher.submit("a", list(range(20))), batcher.submit("a", [100]), batcher.submit("b", [7])
    recorder.open.set()
    for future in (long, short, other):
        future.result(30)
    assert recorder.batches[1:3] == [("a", [0, 100, 1, 2, 3]), ("b", [7])]


def test_an_idle_batcher_waits_until_the_batch_is_full(make):
    recorder, batcher = make(max_wait=600)
    futures = [batcher.submit("a", [number]) for number in range(5)]
    for future in futures:
        future.result(30)
    assert recorder.batches == [("a", [0, 1, 2, 3, 4])]


def test_the_queue_is_limited(make):
    recorder, batcher = make(limit=3)
    hold(recorder, batcher)
    waiting = [batcher.submit("a", [1, 2]), batcher.submit("b", [3])]
    with pytest.raises(QueueFull, match="3 inputs are waiting, the limit is 3"):
        batcher.submit("a", [4])
    assert batcher.waiting == 3
    waiting[0].cancel()
    assert batcher.waiting == 1
    batcher.submit("a", [5])
    recorder.open.set()
    assert waiting[1].result(30) == [("b", 6)]
    large = batcher.submit("a", list(range(10)))  # accepted, because the queue is empty
    assert len(large.result(30)) == 10


def test_cancelled_requests_are_not_computed(make):
    recorder, batcher = make()
    first = hold(recorder, batcher)
    futures = [batcher.submit("a", [number]) for number in range(1, 5)]
    assert futures[1].cancel() and first.cancel()
    recorder.open.set()
    assert futures[3].result(30) == [("a", 8)]
    assert recorder.batches[1:] == [("a", [1, 3, 4])]


def test_an_error_only_affects_its_batch(make):
    recorder, batcher = make()
    hold(recorder, batcher)
    bad, good = batcher.submit("a", [1, "bad", 2, 3, 4, 5, 6, 7]), batcher.submit("b", [1])
    recorder.open.set()
    with pytest.raises(ZeroDivisionError):
        bad.result(30)
    assert good.result(30) == [("b", 2)]
    assert batcher.submit("a", [1]).result(30) == [("a", 2)]
    assert (
        batcher.waiting == 0 and len(recorder.batches) == 4
    )  # the other items of the failed request were not computed


def test_close_computes_queued_items(make):
    recorder, batcher = make(max_wait=600)
    future = batcher.submit("a", [1])
    batcher.close()
    assert future.result(0) == [("a", 2)]
    with pytest.raises(QueueFull, match="stopping"):
        batcher.submit("a", [1])
