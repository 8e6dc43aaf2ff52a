"""Renders chat templates. A template is untrusted code of the backbone: it runs in a subprocess with limits."""

import functools
import json
from collections.abc import Sequence
from typing import Any

from llm2vec_gen_jax.common.limited import run_limited

SECONDS = 5  # CPU time; a template takes milliseconds

_PROGRAM = """
from transformers.utils.chat_template_utils import render_jinja_template

def run(request):
    template, requests = request
    results = []
    for messages, settings in requests:
        try:
            results.append([render_jinja_template([messages], chat_template=template, **settings)[0][0], None])
        except BaseException as error:
            results.append([None, f"{type(error).__name__}: {str(error)[:500]}"])
    return results
"""


def render(
    template: str, requests: Sequence[tuple[list[dict[str, Any]], dict[str, Any]]]
) -> list[tuple[str | None, str | None]]:
    """Renders messages with a Jinja chat template, as transformers does; results are cached.

    requests: (messages, keyword arguments of the template) pairs. Returns (text, None) or (None, reason) for each.
    """
    return _run(json.dumps([template, requests]), len(requests), SECONDS)


@functools.lru_cache(maxsize=64)
def _run(request, count, seconds):
    results, reason = run_limited(_PROGRAM, json.loads(request), seconds)
    return [(None, reason)] * count if reason else [tuple(result) for result in results]
