"""SIGTERM as a wish: a cluster sends it some seconds before it takes a machine away. Without JAX, to be there first."""

import signal

_asked = False


def catch():
    """From now on SIGTERM only notes the wish; a second one ends the process as ever."""
    signal.signal(signal.SIGTERM, _note)


def asked():
    """Whether this process was asked to stop."""
    return _asked


def _note(number, frame):
    global _asked
    _asked = True
    signal.signal(number, signal.SIG_DFL)  # whoever asks twice does not want to wait
