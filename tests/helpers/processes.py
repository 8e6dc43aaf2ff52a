"""Processes that tests start, and their environments."""

import ctypes
import functools
import inspect
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import jax

from tests.conftest import COMPILE_FAST

ROOT = pathlib.Path(__file__).parents[2]
WITHOUT_TORCH = ROOT / "tests" / "helpers" / "without_torch"
# Variables that are read after the imports, or not at all.
_READ_LATE = {"LLM2VEC_GEN_API_KEY", "PYTEST_CURRENT_TEST", "XLA_FLAGS"}


def environment(devices=1, torch=False, **variables):
    """Returns the environment of `python -m launch.NAME` in any folder, on a number of fake devices.

    torch: whether PyTorch can be imported. transformers imports it where it can, which takes longer than most of what
    these processes do.
    """
    paths = [ROOT] if torch else [WITHOUT_TORCH, ROOT]
    return (
        os.environ
        | {
            "PYTHONPATH": os.pathsep.join(map(str, paths)),
            "XLA_FLAGS": f"{COMPILE_FAST} --xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        | variables
    )


def free_port():
    """Returns a port of this machine that nothing listens to."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Process(subprocess.Popen):
    """A Popen of [sys.executable, "-m" or "-c", ...] whose imports are done: a fork of a process that has them.

    A process is started as usual where that is not the same: with an environment that imports may read, with other
    options of Popen than streams and directories, and where processes have no subreapers (macOS).
    """

    def __init__(self, command, **options):
        # A shell starts background jobs, such as these tests, with SIGINT ignored, which children inherit.
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.default_int_handler) if is_main else None
        try:
            super().__init__(command, **options)
        finally:
            if is_main:
                signal.signal(signal.SIGINT, before)

    def _execute_child(self, *values):
        given = inspect.signature(super()._execute_child).bind(*values).arguments
        command, variables = [os.fspath(word) for word in given["args"]], given["env"] or os.environ
        server = _fork_server()
        unusual = given["preexec_fn"] or given["pass_fds"] or given["start_new_session"] or given["shell"]
        if not server or unusual or command[0] != sys.executable or command[1] not in ("-m", "-c"):
            return super()._execute_child(*values)
        if _read_by_imports(variables) != server.environment:
            return super()._execute_child(*values)
        streams = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [number if stream == -1 else stream for number, stream in enumerate(streams)]
        self.pid = server.fork(command[1:], os.path.abspath(given["cwd"] or "."), variables, streams)
        self._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in ends))


def _read_by_imports(variables):
    return {name: value for name, value in variables.items() if name not in _READ_LATE}


class _ForkServer:
    """A process of tests.helpers.fork_server, which ends with this one."""

    def __init__(self):
        self.environment = _read_by_imports(environment())
        self.requests, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "tests.helpers.fork_server", str(other.fileno())]
        streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), pass_fds=[other.fileno()], start_new_session=True, **streams
        )
        other.close()
        self.lock = threading.Lock()

    def fork(self, command, cwd, variables, streams):
        """Returns the id of a new process, a child of this one."""
        message = {"command": command, "cwd": cwd, "environment": dict(variables)}
        with self.lock:
            _set_subreaper(True)
            try:
                socket.send_fds(self.requests, [json.dumps(message).encode()], streams)
                return int(self.requests.recv(20))
            finally:
                _set_subreaper(False)


@functools.cache
def _fork_server():
    return _ForkServer() if sys.platform == "linux" else None


def _set_subreaper(value):
    """Whether orphaned descendants become children of this process (PR_SET_CHILD_SUBREAPER of prctl(2))."""
    if ctypes.CDLL(None, use_errno=True).prctl(36, int(value), 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")
