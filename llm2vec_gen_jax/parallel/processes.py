"""Many processes as one run: how they find one another, agree, stop together, and never hang.

Only `start` decides that a run has several processes; without it everything here is for one process and costs nothing.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import diff
from llm2vec_gen_jax.parallel import preemption, rendezvous
from llm2vec_gen_jax.parallel.preemption import Stopped

BAD_INPUT, PREEMPTED, IO_FAILED, PEER_FAILED, STALLED = 2, 3, 74, 75, 76  # exit codes of a command, beside 0 and 1
_WEEK = 7 * 24 * 3600  # seconds


class PeerMissing(Exception):
    """Not all processes of a run have come."""


def initialize(config, together=True):
    """Joins the processes of a cluster, as a DistributedConfig says. Call it before anything uses a device.

    together: they end at the same time; otherwise one that is done waits for the others as long as it takes.
    Raises PeerMissing when they do not meet within config.join_timeout.
    """
    address, count, index = config.distributed, config.num_processes, config.process_id
    timeouts = {
        "initialization_timeout": config.join_timeout,
        "heartbeat_timeout_seconds": config.heartbeat_timeout,
        "shutdown_timeout_seconds": config.heartbeat_timeout if together else _WEEK,
    }
    # JAX's own agreement on where to stop loses a SIGTERM that comes at the wrong moment: a checkpoint that orbax
    # finishes in the background sets its counter back. Ours travels with the batches (trainer.Run.loop).
    jax.config.update("jax_enable_preemption_service", False)
    if address in ("auto", "off"):
        if count is not None or index is not None:
            raise InputError(f"num_processes and process_id need distributed=HOST:PORT, not distributed={address}")
        if address == "auto":
            found = _detected(config.join_timeout)
            try:
                if found is not None:
                    rendezvous.meet(*found, config.join_timeout, preemption.asked)
                jax.distributed.initialize(**timeouts)
            except rendezvous.Missed as error:
                if preemption.asked():
                    raise Stopped("stopped as asked, before all processes had come") from None
                reason = f"process {found[3]} of {found[2]} could not join ({error})"
                raise PeerMissing(f"distributed=auto: {reason}") from None
            except ValueError as error:  # no cluster that JAX knows how to detect
                if "coordinator_address" not in str(error):
                    raise InputError(f"distributed=auto: {error}. Pass distributed=HOST:PORT, or off") from None
            except RuntimeError as error:  # called from a program that has used a device: it is alone
                if "must be called before" not in str(error):
                    raise PeerMissing(f"distributed=auto: {first_line(error)}") from None
    else:
        found = re.fullmatch(r"(\S+):([0-9]{1,5})", address)
        if not found or not 0 < int(found[2]) < 2**16:
            raise InputError(f"distributed={address}: expected auto, off or HOST:PORT (of process 0)")
        if count is None or index is None or not 0 <= index < count:
            raise InputError(
                f"distributed={address} needs num_processes=N and process_id=0 ... N-1 (found {count}, {index})"
            )
        host, port = found[1], int(found[2])
        if host in ("localhost", "127.0.0.1"):
            timeouts["coordinator_bind_address"] = f"127.0.0.1:{port}"  # nobody else's network
        try:
            rendezvous.meet(host, port, count, index, config.join_timeout, preemption.asked)
            jax.distributed.initialize(address, count, index, **timeouts)
        except (rendezvous.Missed, RuntimeError) as error:
            if preemption.asked():
                raise Stopped("stopped as asked, before all processes had come") from None
            reason = f"process {index} of {count} could not join ({first_line(error)})"
            raise PeerMissing(f"distributed={address}: {reason}") from None


def _detected(timeout):
    """Returns (host, port, number of processes, this one) as JAX will detect them; None for one process, or where this
    version of JAX does not say: then it joins without `rendezvous`, and may end in C++ when a process does not come."""
    try:
        from jax._src.clusters import ClusterEnv

        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, timeout
        )
        host, _, port = address.rpartition(":")
        return (host, int(port), count, index) if count > 1 else None
    except Exception:  # of a cluster that cannot be detected, JAX itself says what is wrong
        return None


def stop_requested():
    """Whether any process of the run was asked to stop: the same answer on all. All of them call it equally often."""
    asked = preemption.asked()
    return asked if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array([asked])).any())


def run_on_process_0(function):
    """Calls function() on process 0 alone and returns its JSON-like result on all. An InputError is raised on all."""
    if jax.process_count() == 1:
        return function()
    outcome = {}
    if jax.process_index() == 0:
        try:
            outcome = {"result": function()}
        except InputError as error:
            outcome = {"error": str(error)}
    outcome = _shared(outcome)[0]
    if "error" in outcome:
        raise InputError(outcome["error"])
    return outcome["result"]


@contextlib.contextmanager
def locked(path, key):
    """`locks.locked`, by process 0 for all processes of a run. An InputError is raised on all of them."""
    with contextlib.ExitStack() as stack:
        run_on_process_0(lambda: stack.enter_context(locks.locked(path, key)))
        yield


def assert_equal_across_processes(values):
    """Raises InputError on every process when `values`, a JSON-like dict, is not the same on all of them."""
    if jax.process_count() == 1:
        return
    first, *others = _shared(values)
    for index, other in enumerate(others, 1):
        if first != other:
            raise InputError(
                f"the processes of this run do not agree: {diff(first, other)} (process 0 -> process {index}). "
                "Start all of them with the same code, configuration and data"
            )


def is_loss_of_peer(error):
    """Whether an exception is what a process meets when another one of its run has ended."""
    return names_a_peer(error) or (jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError))


def names_a_peer(error):
    """Whether an exception says itself that another process of this run has ended."""
    signs = ("Gloo ", "coordination service", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection ")
    return jax.process_count() > 1 and any(sign in str(error) for sign in signs)


def barrier(name):
    """Returns when every process has come to the place that `name` stands for."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def code_version():
    """Returns 16 hex digits of this package's source and the versions of what it computes with."""
    digest = hashlib.sha256(f"{jax.__version__} {np.__version__}".encode())
    root = pathlib.Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _shared(value):
    """Returns the JSON-like values of all processes."""
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array([len(text)])))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(text)] = text
    rows = np.reshape(multihost_utils.process_allgather(padded), (jax.process_count(), -1))
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def exit_process(code):
    """Ends the process with `code`; in a run of several without waiting for the others, which then end too."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
