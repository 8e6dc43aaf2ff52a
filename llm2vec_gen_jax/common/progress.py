"""Progress bars and messages on standard error, shown by process 0 only."""

import contextlib
import sys
import threading
from collections.abc import Iterator

import jax
from tqdm.auto import tqdm


def _is_interactive() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules


def bar(total: int | None, unit: str, label: str, initial: int = 0, enabled: bool = True, scale: bool = False) -> tqdm:
    """Returns a tqdm bar, disabled on other processes and updated every 10 seconds without a terminal or notebook.

    scale: whether counts are shown with the prefixes k and M.
    """
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=scale,
        desc=label,
        disable=not enabled or jax.process_index() != 0,
        mininterval=0.2 if _is_interactive() else 10.0,
        dynamic_ncols=sys.stderr.isatty(),
        smoothing=0.1,
    )


@contextlib.contextmanager
def announce(text: str) -> Iterator[None]:
    """Shows "TEXT ..." from the moment the block has taken a second, 10 seconds without a terminal or notebook.

    On a terminal the message is erased at the end of the block.
    """
    terminal, shown = sys.stderr.isatty(), threading.Event()

    def show() -> None:
        shown.set()
        print(f"{text} ...", end="" if terminal else "\n", file=sys.stderr, flush=True)

    timer = threading.Timer(1.0 if _is_interactive() else 10.0, show)
    timer.daemon = True
    if jax.process_index() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
        if timer.is_alive():
            timer.join()
        if terminal and shown.is_set():
            print("\r\033[K", end="", file=sys.stderr, flush=True)
