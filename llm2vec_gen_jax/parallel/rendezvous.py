"""Rendezvous of the processes of a run before jax.distributed.initialize.

JAX aborts a process in C++ (SIGABRT, SIGSEGV) if another one is missing, joins twice, or cannot bind the port, and a
late process aborts the complete run. Therefore process 0 first listens at the run's address until every other process
has sent its index; then JAX's coordination service binds the port. Later processes get no response.
"""

import contextlib
import json
import os
import select
import socket
import time
from collections.abc import Callable

_GRACE = 10  # seconds that a process waits after a signal, so that the others stop with it instead of failing
_LONGEST = 1024  # bytes of a message
_TICK = 0.2  # seconds


class Missed(Exception):
    """The processes of a run did not all join; the message gives the reason."""


def meet(
    host: str, port: int, count: int, index: int, timeout: float, asked: Callable[[], bool] = lambda: False
) -> None:
    """Waits until processes 0 ... count - 1 have joined at host:port. Raises Missed after `timeout` seconds.

    index: this process. asked: whether it received a signal, which shortens the wait.
    """
    time_left = _Deadline(timeout, asked).time_left
    if index == 0:
        _listen(host, port, count, time_left)
    else:
        _join(host, port, count, index, time_left)


class _Deadline:
    def __init__(self, timeout, asked):
        self.end, self.asked = time.monotonic() + timeout, asked

    def time_left(self):
        """Returns seconds."""
        if self.asked is not None and self.asked():
            self.end, self.asked = min(self.end, time.monotonic() + _GRACE), None
        return self.end - time.monotonic()


def _listen(host, port, count, time_left):
    """Process 0: waits for all processes, then responds to each."""
    try:
        server = _server(host, port)
    except OSError as error:
        raise Missed(f"cannot listen on port {port}: {os.strerror(error.errno)}") from None
    joined, unknown = {}, {}  # process -> connection; other connections -> bytes received
    with server, contextlib.ExitStack() as connections:
        while len(joined) < count - 1:
            if time_left() <= 0:
                missing = ", ".join(str(index) for index in range(1, count) if index not in joined)
                raise Missed(f"no connection within join_timeout from process {missing}")
            for ready in select.select([server, *joined.values(), *unknown], [], [], _TICK)[0]:
                if ready is server:
                    connection, _ = server.accept()
                    connection.setblocking(False)
                    unknown[connections.enter_context(connection)] = b""
                elif ready in unknown:
                    _receive(ready, unknown, joined, count)
                else:  # closed: the process has exited, and may be restarted
                    joined = {index: connection for index, connection in joined.items() if connection is not ready}
                    ready.close()
        server.close()
        for connection in joined.values():
            _send(connection, {"start": True})


def _receive(connection, unknown, joined, count):
    """Reads from a new connection, and moves a process of the run from `unknown` to `joined`."""
    try:
        unknown[connection] += connection.recv(_LONGEST) or b"\n"
    except OSError:
        unknown[connection] = b"\n"
    if b"\n" not in unknown[connection] and len(unknown[connection]) < _LONGEST:
        return
    message = _parse(unknown.pop(connection))
    index, of = message.get("process"), message.get("of")
    if type(index) is not int:
        reason = "not a process of this library"
    elif of != count or not 0 < index < count:
        reason = f"process 0 was started with num_processes={count}"
    elif index in joined:
        reason = f"another process joined with process_id={index}"
    else:
        joined[index] = connection
        return
    _send(connection, {"refused": reason})
    connection.close()


def _join(host, port, count, index, time_left):
    """Other processes: connects until process 0 responds, which may start later or be restarted."""
    reason = "no response"
    while (left := time_left()) > 0:
        try:
            with socket.create_connection((host.strip("[]"), port), timeout=min(left, 5)) as connection:
                connection.settimeout(_TICK)
                _send(connection, {"process": index, "of": count})
                answer = _parse(_answer(connection, time_left))
        except OSError as error:
            reason = f"{host}:{port}: {error.strerror or error}"
        else:
            if answer.get("start") is True:
                return
            if "refused" in answer:
                raise Missed(str(answer["refused"]))
            reason = f"{host}:{port} is used by another program, or by a run that has started"
        time.sleep(_TICK)
    raise Missed(f"{reason}, within join_timeout")


def _answer(connection, time_left):
    """Returns the line that process 0 sends when all processes have joined; incomplete if the connection is closed."""
    received = b""
    while time_left() > 0 and b"\n" not in received and len(received) < _LONGEST:
        with contextlib.suppress(TimeoutError):
            piece = connection.recv(_LONGEST)
            if not piece:
                break
            received += piece
    return received


def _server(host, port):
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", port))  # not on the network
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _send(connection, message):
    with contextlib.suppress(OSError):  # the process has exited
        connection.sendall(json.dumps(message).encode() + b"\n")


def _parse(line):
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
