"""Chat templates: programs of whoever published the backbone, run in a process of their own with limits."""

import functools
import json
import subprocess
import sys

SECONDS = 5  # of computing, for a template that takes milliseconds
MEGABYTES = 500  # beyond what the process has at its start

# Standard input: a template, what to render, the limits, as JSON. Standard output: the results as JSON.
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


def render(template, requests):
    """Returns [(text, None) or (None, reason)]: what a Jinja chat template makes of messages, as in transformers.

    requests: [(messages, keyword arguments of the template)]. Equal calls run once.
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
            timeout=120,  # a busy machine may take long to start it
        )
    except subprocess.TimeoutExpired:
        return [(None, "it does not end")] * count
    if process.returncode < 0:
        return [(None, "it does not end, or needs too much memory")] * count
    if process.returncode:
        return [(None, (process.stderr.strip().splitlines() or ["no output"])[-1])] * count
    return [tuple(result) for result in json.loads(process.stdout.splitlines()[-1])]
