"""Ends a process that makes no progress."""

import faulthandler
import os
import sys
import threading
import time

import jax

from llm2vec_gen_jax.parallel.processes import IO_FAILED, STALLED, exit_process


class Watchdog:
    """Ends this process when nothing has happened for `seconds`: a peer that hangs would hang all for ever.

    check: called every second; an OSError of it ends a process of several too. One that cannot write its part of a
    checkpoint waits for the others, who wait for its part.
    """

    def __init__(self, seconds, check=lambda: None):
        self.check = check
        self.seconds, self.last, self.what = seconds, time.monotonic(), "the start"
        self.done = threading.Event()

    def beat(self, what):
        """Says what is about to be done."""
        self.last, self.what = time.monotonic(), what

    def __enter__(self):
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
