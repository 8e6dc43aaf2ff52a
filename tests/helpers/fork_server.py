"""Forks, for each request, a process that has imported JAX and other libraries: a command without its long start.

`python -m tests.helpers.fork_server FD` reads requests from a socket: {"command": ["-m" or "-c", ...], "cwd": ...,
"environment": ...} and three file descriptors. The answer is the process id. A child is given up by its parent, so that
the process that asks, if it is a subreaper (prctl(2)), can wait for it as for a process that it started itself.
"""

import gc
import json
import os
import random
import runpy
import signal
import socket
import sys
import types

# What the package imports. Not the package itself, of which some tests replace a part before it is imported, and
# nothing that starts threads (pyarrow): they do not survive a fork.
MODULES = """
einops faulthandler flax.linen gguf grain.python jax.ad_checkpoint jax.experimental.multihost_utils
jax.experimental.pallas jinja2 omegaconf optax orbax.checkpoint safetensors.numpy tensorboardX tokenizers tqdm.auto
transformers.convert_slow_tokenizer transformers.dynamic_module_utils transformers.generation
transformers.modeling_rope_utils transformers.models.auto yaml
""".split()


def serve(requests):
    """Answers requests until the socket is closed. Returns (command, cwd, environment) in each child."""
    while True:
        message, streams, *_ = socket.recv_fds(requests, 1 << 20, 3)
        if not message:
            sys.exit()
        read, write = os.pipe()
        between = os.fork()
        if between:
            os.close(write)
            os.waitpid(between, 0)
            requests.send(os.read(read, 20))
            for descriptor in (read, *streams):
                os.close(descriptor)
            continue
        if child := os.fork():
            os.write(write, str(child).encode())
            os._exit(0)
        requests.close()
        for number, descriptor in enumerate(streams):
            os.dup2(descriptor, number)
        for descriptor in (read, write, *streams):
            os.close(descriptor)
        return json.loads(message).values()


def run(command, cwd, environment):
    """Does what `python COMMAND` does in a directory."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    random.seed()
    kind, code, *words = command
    sys.argv, sys.path[0] = [kind, *words], os.getcwd() if kind == "-m" else ""
    if kind == "-m":
        runpy.run_module(code, run_name="__main__", alter_sys=True)
        return
    sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(code, "<string>", "exec"), vars(sys.modules["__main__"]))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in MODULES:
        __import__(module)
    gc.collect()
    gc.freeze()
    run(*serve(socket.socket(fileno=int(sys.argv[1]))))
