"""The access log: a line for each request, without its texts, headers and query."""

import logging
import sys

from starlette.requests import Request

from llm2vec_gen_jax.common.errors import one_line

logger = logging.getLogger(__name__)
_LONGEST_PATH = 200  # characters


def log(request: Request, status: int, seconds: float = 0) -> None:
    """Logs a request that was answered. `inputs` and `tokens` of request.state are their numbers, if known."""
    client = f"{request.client.host}:{request.client.port}" if request.client else "-"
    path = one_line(request.scope["path"], _LONGEST_PATH)
    state = request.state
    counts = f", inputs: {state.inputs}, tokens: {state.tokens}" if hasattr(state, "inputs") else ""
    logger.info(f"{client} {request.method} {path} {status} in {1000 * seconds:.1f} ms{counts}")


def print_lines() -> None:
    """Prints the lines to standard output with their time, and leaves them out of the other logs."""
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
