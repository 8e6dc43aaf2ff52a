"""Measured memory of the planned programs on attached devices."""

import ctypes
import pathlib
import re
import threading
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.config import PlanConfig
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.parallel.chips import GIB
from llm2vec_gen_jax.planning.programs import abstract_inputs, compile_programs


def measure(config: PlanConfig, architecture: Architecture, execution: Execution) -> None:
    """Runs each program once on constant weights; prints its peak memory without the arguments, and the estimate."""
    model, inputs = abstract_inputs(config, architecture, execution)
    programs = compile_programs(config, model, inputs)

    def fill(x):
        value = 1 if x.dtype == jnp.int32 else 0.01
        return jax.jit(lambda: jnp.full(x.shape, value, x.dtype), out_shardings=x.sharding)()

    values = jax.block_until_ready(jax.tree.map(fill, inputs))
    state, query = values["state"], values["ids"]
    for name, program in programs.items():
        with _Peak(inputs["ids"].sharding.mesh) as peak:
            if name == "prefix":
                queries = values["ids"], values["batch"]["query_lengths"]
                query = jax.block_until_ready(program.compiled(values["frozen"], *queries))
            elif name == "step":
                state, _ = jax.block_until_ready(
                    program.compiled(state, values["frozen"], values["batch"] | {"query": query})
                )
            elif name == "encode":
                jax.block_until_ready(program.compiled(values["trainable"], values["frozen"], values["packed"]))
            else:
                lengths = values["batch"]["query_lengths"]
                jax.block_until_ready(program.compiled(values["frozen"], values["ids"], lengths, lengths, np.uint32(0)))
        print(f"    {name:<8} measured {peak.bytes / GIB:.3f} GiB, estimated {program.allocated / GIB:.3f}", flush=True)


class _Peak:
    """Measures the increase of the peak memory of a device inside the block, as `bytes`.

    On a CPU, that of the process divided by the number of devices. Sampled on a CPU, and on other devices after a
    program with a larger peak.
    """

    def __init__(self, mesh: jax.sharding.Mesh) -> None:
        self.devices = list(mesh.devices.flat)

    def __enter__(self) -> Self:
        if self.devices[0].platform == "cpu":
            ctypes.CDLL(None).malloc_trim(0)  # free memory not yet returned to the system
        self.before, self.peak, self.done = self._bytes("bytes_in_use"), 0.0, threading.Event()
        self.earlier_peak = self._bytes("peak_bytes_in_use")
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self.done.set()
        self.thread.join()
        peak = self._bytes("peak_bytes_in_use")
        # The device keeps the largest peak of the process: if an earlier program set it, the sampled one counts.
        if self.devices[0].platform != "cpu" and peak > self.earlier_peak:
            self.peak = peak
        self.bytes = self.peak - self.before

    def _watch(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self._bytes("bytes_in_use"))

    def _bytes(self, key: str) -> float:
        if self.devices[0].platform == "cpu":
            status = pathlib.Path("/proc/self/status").read_text()
            return int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0]) * 1024 / len(self.devices)
        return max(device.memory_stats()[key] for device in self.devices)
