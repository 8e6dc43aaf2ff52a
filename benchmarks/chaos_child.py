"""A command of the project in which SIGUSR1 stalls the main thread and SIGUSR2 breaks the reading of data.

python -m benchmarks.chaos_child NAME [WORDS]        is python -m launch.NAME [WORDS]
"""

import runpy
import signal
import sys
import time
from importlib.machinery import PathFinder


class WithoutTorch(PathFinder):
    """Where torch is installed transformers imports it, and that is half of a start."""

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
