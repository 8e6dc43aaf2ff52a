"""Runs a command in which SIGUSR1 stalls the main thread and SIGUSR2 breaks the data reader.

python -m tests.chaos.child NAME [ARGUMENTS]    runs python -m launch.NAME [ARGUMENTS]
"""

import runpy
import signal
import sys
import time
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """Hides an installed torch: transformers would import it, which takes half of the startup time."""

    @classmethod
    def find_spec(cls, name, *more):
        return None if name == "torch" else super().find_spec(name, *more)


def stall(*_):
    time.sleep(3600)


def break_reader(*_):
    from llm2vec_gen_jax.data import batches

    def broken(batches, step):
        raise RuntimeError(f"the reader of batch {step} is gone")

    batches.Batches.__getitem__ = broken


if __name__ == "__main__":
    sys.meta_path = [WithoutTorch if finder is PathFinder else finder for finder in sys.meta_path]
    signal.signal(signal.SIGUSR1, stall)
    signal.signal(signal.SIGUSR2, break_reader)
    del sys.argv[0]
    runpy.run_module(f"launch.{sys.argv[0]}", run_name="__main__")
