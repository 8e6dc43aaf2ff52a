"""Where the processes of a run meet before JAX joins them.

JAX ends a process in C++ (SIGABRT, SIGSEGV) when another one does not come, comes twice, or finds the port taken, and a
process that comes late ends the whole run. So process 0 listens at the run's address first, until every other process
has said which one it is; then JAX's coordination service takes the port. A process that comes later gets no answer.
"""

import contextlib
import json
import os
import select
import socket
import time

_GRACE = 10  # seconds that a process that was asked to stop still waits: the others are to stop with it, not to fail
_LONGEST = 1024  # bytes of a message
_TICK = 0.2  # seconds


class Missed(Exception):
    """The processes of a run have not met; says why."""


def meet(host, port, count, index, timeout, asked=lambda: False):
    """Returns when processes 0 ... count - 1 have come to host:port. Raises Missed when they have not in `timeout` s.

    asked: whether this process was asked to stop, which shortens the wait.
    """
    time_left = _Deadline(timeout, asked).time_left
    if index == 0:
        _listen(host, port, count, time_left)
    else:
        _call(host, port, count, index, time_left)


class _Deadline:
    def __init__(self, timeout, asked):
        self.end, self.asked = time.monotonic() + timeout, asked

    def time_left(self):
        """Returns seconds."""
        if self.asked is not None and self.asked():
            self.end, self.asked = min(self.end, time.monotonic() + _GRACE), None
        return self.end - time.monotonic()


def _listen(host, port, count, time_left):
    """Process 0: answers no process before all have come."""
    try:
        server = _server(host, port)
    except OSError as error:
        raise Missed(f"port {port} cannot be listened on: {os.strerror(error.errno)}") from None
    came, unknown = {}, {}  # connections by process, and what others have sent so far
    with server, contextlib.ExitStack() as connections:
        while len(came) < count - 1:
            if time_left() <= 0:
                missing = ", ".join(str(index) for index in range(1, count) if index not in came)
                raise Missed(f"did not come within join_timeout: process {missing}")
            for ready in select.select([server, *came.values(), *unknown], [], [], _TICK)[0]:
                if ready is server:
                    connection, _ = server.accept()
                    connection.setblocking(False)
                    unknown[connections.enter_context(connection)] = b""
                elif ready in unknown:
                    _hear(ready, unknown, came, count)
                else:  # it has nothing more to say: it has ended, and may be started again
                    came = {index: connection for index, connection in came.items() if connection is not ready}
                    ready.close()
        server.close()
        for connection in came.values():
            _send(connection, {"start": True})


def _hear(connection, unknown, came, count):
    """Reads what a new connection says; a process of the run goes from `unknown` to `came`."""
    try:
        unknown[connection] += connection.recv(_LONGEST) or b"\n"
    except OSError:
        unknown[connection] = b"\n"
    if b"\n" not in unknown[connection] and len(unknown[connection]) < _LONGEST:
        return
    said = _parse(unknown.pop(connection))
    index, of = said.get("process"), said.get("of")
    if type(index) is not int:
        reason = "not a process of this library"
    elif of != count or not 0 < index < count:
        reason = f"process 0 was started with num_processes={count}"
    elif index in came:
        reason = f"another process has come with process_id={index}"
    else:
        came[index] = connection
        return
    _send(connection, {"refused": reason})
    connection.close()


def _call(host, port, count, index, time_left):
    """Any other process: calls until it is answered. Process 0 may come later, or end and be started again."""
    reason = "no answer"
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
            reason = f"what listens at {host}:{port} does not wait for processes: another program, or a run that began"
        time.sleep(_TICK)
    raise Missed(f"{reason}, within join_timeout")


def _answer(connection, time_left):
    """Returns the line that process 0 sends when all have come; what there is of it when the connection ends."""
    said = b""
    while time_left() > 0 and b"\n" not in said and len(said) < _LONGEST:
        with contextlib.suppress(TimeoutError):
            piece = connection.recv(_LONGEST)
            if not piece:
                break
            said += piece
    return said


def _server(host, port):
    if host in ("localhost", "127.0.0.1"):
        return socket.create_server(("127.0.0.1", port))  # not on the network
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _send(connection, message):
    with contextlib.suppress(OSError):  # who has ended reads nothing
        connection.sendall(json.dumps(message).encode() + b"\n")


def _parse(line):
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return message if isinstance(message, dict) else {}
