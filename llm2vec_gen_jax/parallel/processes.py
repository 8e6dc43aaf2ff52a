"""Multi-process runs: initialization, consistency checks, coordinated shutdown.

Without `initialize`, all functions apply to a single process and need no communication.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import diff
from llm2vec_gen_jax.parallel import preemption, rendezvous
from llm2vec_gen_jax.parallel.preemption import Stopped

BAD_INPUT, PREEMPTED, IO_FAILED, PEER_FAILED, STALLED = 2, 3, 74, 75, 76  # exit codes, in addition to 0 and 1
_WEEK = 7 * 24 * 3600  # seconds


class PeerMissing(Exception):
    """Not all processes of a run joined."""


def initialize(config: Any, together: bool = True) -> None:
    """Joins the processes of a DistributedConfig. Call it before the first use of a device.

    together: whether all processes finish at the same time; if not, the first ones wait for the others indefinitely.
    Raises PeerMissing if not all processes join within config.join_timeout.
    """
    address, count, index = config.distributed, config.num_processes, config.process_id
    timeouts = {
        "initialization_timeout": config.join_timeout,
        "heartbeat_timeout_seconds": config.heartbeat_timeout,
        "shutdown_timeout_seconds": config.heartbeat_timeout if together else _WEEK,
    }
    # JAX's preemption service can lose a SIGTERM: orbax resets its counter when it finishes a checkpoint in the
    # background. The training loop exchanges the flag itself, with the batches.
    jax.config.update("jax_enable_preemption_service", False)
    if address in ("auto", "off"):
        if count is not None or index is not None:
            raise InputError(f"num_processes and process_id need distributed=HOST:PORT, not distributed={address}")
        if address == "auto":
            cluster = _detect(config.join_timeout)
            try:
                if cluster is not None:
                    host, port, count, index = cluster
                    rendezvous.meet(host, port, count, index, config.join_timeout, preemption.asked)
                jax.distributed.initialize(**timeouts)
            except rendezvous.Missed as error:
                if preemption.asked():
                    raise Stopped("stopped on request, before all processes joined") from None
                reason = f"process {index} of {count} could not join ({error})"
                raise PeerMissing(f"distributed=auto: {reason}") from None
            except ValueError as error:  # JAX detected no cluster
                if "coordinator_address" not in str(error):
                    raise InputError(f"distributed=auto: {error}. Pass distributed=HOST:PORT, or off") from None
            except RuntimeError as error:  # called from a program that has used a device: a single process
                if "must be called before" not in str(error):
                    raise PeerMissing(f"distributed=auto: {first_line(error)}") from None
    else:
        match = re.fullmatch(r"(\S+):([0-9]{1,5})", address)
        if not match or not 0 < int(match[2]) < 2**16:
            raise InputError(f"distributed={address}: expected auto, off or HOST:PORT (of process 0)")
        if count is None or index is None or not 0 <= index < count:
            raise InputError(
                f"distributed={address} needs num_processes=N and process_id=0 ... N-1 (found {count}, {index})"
            )
        host, port = match[1], int(match[2])
        if host in ("localhost", "127.0.0.1"):
            timeouts["coordinator_bind_address"] = f"127.0.0.1:{port}"  # not on the network
        try:
            rendezvous.meet(host, port, count, index, config.join_timeout, preemption.asked)
            jax.distributed.initialize(address, count, index, **timeouts)
        except (rendezvous.Missed, RuntimeError) as error:
            if preemption.asked():
                raise Stopped("stopped on request, before all processes joined") from None
            reason = f"process {index} of {count} could not join ({first_line(error)})"
            raise PeerMissing(f"distributed={address}: {reason}") from None


def _detect(timeout):
    """Returns (host, port, number of processes, process index) as detected by JAX.

    None for a single process, and if this version of JAX cannot tell: the processes then join without `rendezvous`, and
    may be aborted in C++ if one is missing.
    """
    try:
        from jax._src.clusters import ClusterEnv

        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, timeout
        )
        host, _, port = address.rpartition(":")
        return (host, int(port), count, index) if count > 1 else None
    except Exception:  # jax.distributed.initialize then reports the problem
        return None


def stop_requested() -> bool:
    """Whether any process of the run received a signal; the same on all processes. All of them must call it."""
    asked = preemption.asked()
    return asked if jax.process_count() == 1 else bool(multihost_utils.process_allgather(np.array([asked])).any())


def run_on_process_0(function: Callable[[], Any]) -> Any:
    """Calls function() on process 0 and returns its JSON-like result, or raises its InputError, on all processes."""
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
def locked(path: str | os.PathLike, key: str) -> Iterator[None]:
    """Holds `locks.locked` on process 0. Raises its InputError on all processes."""
    with contextlib.ExitStack() as stack:
        run_on_process_0(lambda: stack.enter_context(locks.locked(path, key)))
        yield


def assert_equal_across_processes(values: Mapping[str, Any]) -> None:
    """Raises InputError on all processes if `values`, a JSON-like dict, differs between them."""
    if jax.process_count() == 1:
        return
    first, *others = _shared(values)
    for index, other in enumerate(others, 1):
        if first != other:
            raise InputError(
                f"the processes of this run do not agree: {diff(first, other)} (process 0 -> process {index}). "
                "Start all of them with the same code, configuration and data"
            )


def is_loss_of_peer(error: BaseException) -> bool:
    """Whether an exception can be caused by the failure of another process of the run."""
    return names_a_peer(error) or (jax.process_count() > 1 and isinstance(error, jax.errors.JaxRuntimeError))


def names_a_peer(error: BaseException) -> bool:
    """Whether the message of an exception reports the failure of another process of the run."""
    signs = ("Gloo ", "coordination service", "UNAVAILABLE", "DEADLINE_EXCEEDED", "Connection ")
    return jax.process_count() > 1 and any(sign in str(error) for sign in signs)


def barrier(name: str) -> None:
    """Waits until all processes have reached the barrier `name`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def code_version() -> str:
    """Returns 16 hex digits that identify this package's source and the versions of JAX and NumPy."""
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


def exit_process(code: int) -> NoReturn:
    """Exits with `code`; in a multi-process run without waiting for the other processes, which then fail."""
    if not jax.distributed.is_initialized():
        sys.exit(code)
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
