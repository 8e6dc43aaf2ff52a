"""Cooperative SIGTERM and SIGINT (Ctrl-C) handling: the first sets a flag, a second terminates.

Clusters send SIGTERM shortly before they preempt a machine. Does not import JAX: handlers are installed before that.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked = False
_at_once = False  # whether a signal raises Stopped, or only sets the flag


class Stopped(BaseException):
    """A run was stopped by a signal, after saving. Not an Exception, so that no handler treats it as a failure."""


@contextlib.contextmanager
def caught() -> Iterator[None]:
    """Installs the signal handlers within the block. They set the flag `asked`, or raise Stopped (`stop_at_once`)."""
    global _asked, _at_once
    _asked = _at_once = False
    before = {number: signal.signal(number, _note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = _at_once = False


def asked() -> bool:
    """Whether this process received a signal."""
    return _asked


def stop_at_once() -> None:
    """Makes signals raise Stopped: for a single process outside of blocks that save (`deferred`)."""
    global _at_once
    _at_once = True
    _stop_if_asked()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Makes signals only set the flag within the block, which checks `asked` and saves."""
    global _at_once
    before, _at_once = _at_once, False
    try:
        yield
    finally:
        _at_once = before


def _stop_if_asked():
    if _asked:
        raise Stopped("stopped on request")


def _note(number, frame):
    global _asked
    _asked = True
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # a second signal terminates
    if _at_once:
        _stop_if_asked()
    if number == signal.SIGINT:  # print is not reentrant
        os.write(2, b"\nstopping after this step, and saving; press Ctrl-C again to exit immediately\n")
