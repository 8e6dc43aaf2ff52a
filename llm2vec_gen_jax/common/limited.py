"""Runs untrusted code, such as a template or a regular expression of a model, in a subprocess with limits."""

import json
import subprocess
import sys
from typing import Any

# JSON on standard input: [request, seconds, megabytes]. JSON on standard output: the result.
_MAIN = """
import contextlib, json, os, resource, sys
request, seconds, megabytes = json.load(sys.stdin)
used = int(sum(os.times()[:2]))
resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 1))
with contextlib.suppress(ValueError, OSError):  # not on macOS
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
print(json.dumps(run(request)))
"""


def run_limited(program: str, request: Any, seconds: int = 5, megabytes: int = 500) -> tuple[Any, str | None]:
    """Returns (result, None) of run(request), a function that `program` defines, or (None, reason) if it failed.

    request and result: JSON values. seconds: of CPU time. megabytes: of address space; both in addition to what the
    interpreter and the imports of `program` need.
    """
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-c", program + _MAIN],
            input=json.dumps([request, seconds, megabytes]),
            capture_output=True,
            text=True,
            timeout=120,  # the start may be slow on a busy machine
        )
    except subprocess.TimeoutExpired:
        return None, "it does not terminate"
    if process.returncode < 0:
        return None, "it does not terminate, or exceeds the memory limit"
    if process.returncode:
        return None, (process.stderr.strip().splitlines() or ["no output"])[-1]
    return json.loads(process.stdout.splitlines()[-1]), None
