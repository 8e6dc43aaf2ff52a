"""Measured time and memory of the planned programs, on attached devices."""

import ctypes
import pathlib
import re
import threading

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.parallel.chips import GIB
from llm2vec_gen_jax.planning.programs import abstract_inputs, compile_programs


def measure(config, architecture, execution):
    """Runs everything once on random weights; prints the peak of memory beside the arguments, and the estimate."""
    model, inputs = abstract_inputs(config, architecture, execution)
    programs = compile_programs(config, model, inputs)

    def fill(x):
        value = 1 if x.dtype == jnp.int32 else 0.01
        return jax.jit(lambda: jnp.full(x.shape, value, x.dtype), out_shardings=x.sharding)()

    given = jax.block_until_ready(jax.tree.map(fill, inputs))
    state, cache = given["state"], None
    for name, program in programs.items():
        with _Peak(execution.mesh) as peak:
            if name == "prefix":
                cache = jax.block_until_ready(program.compiled(given["frozen"], given["ids"]))
            elif name == "step":
                state, _ = jax.block_until_ready(program.compiled(state, given["frozen"], cache, given["batch"]))
            elif name == "encode":
                jax.block_until_ready(program.compiled(given["trainable"], given["frozen"], given["packed"]))
            else:
                lengths = given["batch"]["query_lengths"]
                jax.block_until_ready(program.compiled(given["frozen"], given["ids"], lengths, lengths, np.uint32(0)))
        print(f"    {name:<8} measured {peak.bytes / GIB:.3f} GiB, estimated {program.beside / GIB:.3f}", flush=True)


class _Peak:
    """The most memory that a device has in use inside the block, over what it had before: `bytes`.

    On a CPU it is the process's, sampled, by number of devices.
    """

    def __init__(self, mesh):
        self.devices = list(mesh.devices.flat)

    def __enter__(self):
        if self.devices[0].platform == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # what is free but not given back would count as before
        self.before, self.most, self.done = self._now("bytes_in_use"), 0, threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()
        if self.devices[0].platform != "cpu":
            self.most = self._now("peak_bytes_in_use")
        self.bytes = self.most - self.before

    def _watch(self):
        while not self.done.wait(0.002):
            self.most = max(self.most, self._now("bytes_in_use"))

    def _now(self, key):
        if self.devices[0].platform == "cpu":
            status = pathlib.Path("/proc/self/status").read_text()
            return int(re.search(r"RssAnon:\s+(\d+) kB", status)[1]) * 1024 / len(self.devices)
        return max(device.memory_stats()[key] for device in self.devices)
