"""Renders chat templates. A template is untrusted code of the backbone: it runs in a subprocess with limits."""

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS = 5  # CPU time; a template takes milliseconds
MEGABYTES = 500  # address space in addition to that of the interpreter

# JSON on standard input: [template, requests, seconds, megabytes]. JSON on standard output: the results.
_PROGRAM = """
import contextlib, json, os, resource, sys
from transformers.utils.chat_template_utils import render_jinja_template
template, requests, seconds, megabytes = json.load(sys.stdin)
used = int(sum(os.times()[:2]))
resource.setrlimit(resource.RLIMIT_CPU, (used + seconds, used + seconds + 1))
with contextlib.suppress(ValueError, OSError):  # not on macOS
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
results = []
for messages, settings in requests:
    try:
        results.append([render_jinja_template([messages], chat_template=template, **settings)[0][0], None])
    except BaseException as error:
        results.append([None, f"{type(error).__name__}: {str(error)[:500]}"])
print(json.dumps(results))
"""


def render(
    template: str, requests: Sequence[tuple[list[dict[str, Any]], dict[str, Any]]]
) -> list[tuple[str | None, str | None]]:
    """Renders messages with a Jinja chat template, as transformers does; results are cached.

    requests: (messages, keyword arguments of the template) pairs. Returns (text, None) or (None, reason) for each.
    """
    return _run(json.dumps([template, requests, SECONDS, MEGABYTES]), len(requests))


@functools.lru_cache(maxsize=64)
def _run(request, count):
    try:
        process = subprocess.run(
            [sys.executable, "-P", "-c", _PROGRAM],
            input=request,
            capture_output=True,
            text=True,
            timeout=120,  # the start may be slow on a busy machine
        )
    except subprocess.TimeoutExpired:
        return [(None, "it does not terminate")] * count
    if process.returncode < 0:
        return [(None, "it does not terminate, or exceeds the memory limit")] * count
    if process.returncode:
        return [(None, (process.stderr.strip().splitlines() or ["no output"])[-1])] * count
    return [tuple(result) for result in json.loads(process.stdout.splitlines()[-1])]
