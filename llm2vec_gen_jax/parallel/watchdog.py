"""Watchdog: terminates a process that makes no progress."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

import jax

from llm2vec_gen_jax.parallel.processes import IO_FAILED, STALLED, exit_process


class Watchdog:
    """Terminates this process after `seconds` without `beat`: a hanging process would block all others forever.

    check: called every second in multi-process runs; its OSError terminates the process. One that cannot write its part
    of a checkpoint would otherwise deadlock with the others.
    """

    def __init__(self, seconds: float, check: Callable[[], object] = lambda: None) -> None:
        self.check = check
        self.seconds, self.last, self.what = seconds, time.monotonic(), "the start"
        self.done = threading.Event()

    def beat(self, what: str) -> None:
        """Reports progress. what: the next operation, for the error message."""
        self.last, self.what = time.monotonic(), what

    def __enter__(self) -> "Watchdog":
        threading.Thread(target=self._watch, daemon=True).start()
        self.beat("the first step")
        return self

    def __exit__(self, *_):
        self.done.set()

    def _watch(self):
        while not self.done.wait(min(1.0, self.seconds / 4)):
            if jax.process_count() > 1:
                try:
                    self.check()
                except OSError as error:
                    print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
                    exit_process(IO_FAILED)
            if time.monotonic() - self.last > self.seconds:
                print(
                    f"error: no progress for {self.seconds} seconds since {self.what}; the stacks follow",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(STALLED)
