"""Cooperative handling of SIGTERM and SIGINT (Ctrl-C): the first asks a run to stop, a second one ends the process.

A cluster sends SIGTERM some seconds before it takes a machine away. Without JAX, so that the handlers are set first.
"""

import contextlib
import os
import signal

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked = False
_at_once = False  # whether a signal raises Stopped, or is left to who asks


class Stopped(BaseException):
    """A run was asked to stop and has saved where it is. No Exception: nothing on the way may take it for a fault."""


@contextlib.contextmanager
def caught():
    """Handles both signals in the block. They are noted for `asked`; after `stop_at_once` they raise Stopped."""
    global _asked, _at_once
    _asked = _at_once = False
    before = {number: signal.signal(number, _note) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked = _at_once = False


def asked():
    """Whether this process was asked to stop."""
    return _asked


def stop_at_once():
    """From now on a signal raises Stopped: for a process that is alone and has nothing to save. See `deferred`."""
    global _at_once
    _at_once = True
    _stop_if_asked()


@contextlib.contextmanager
def deferred():
    """Signals are only noted in the block, which asks for them and saves what it has."""
    global _at_once
    before, _at_once = _at_once, False
    try:
        yield
    finally:
        _at_once = before


def _stop_if_asked():
    if _asked:
        raise Stopped("stopped as asked")


def _note(number, frame):
    global _asked
    _asked = True
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_DFL)  # whoever asks twice does not want to wait
    if _at_once:
        _stop_if_asked()
    if number == signal.SIGINT:  # not by print, which this may have interrupted
        os.write(2, b"\nstopping after this step, and saving; Ctrl-C again ends at once\n")
