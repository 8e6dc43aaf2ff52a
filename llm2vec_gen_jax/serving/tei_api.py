"""Requests and errors of Hugging Face's text-embeddings-inference (TEI): POST /embed and GET /info.

As in version 1.9: https://huggingface.github.io/text-embeddings-inference and router/src/http of its repository.
"""

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from llm2vec_gen_jax.common.errors import nearest, quote
from llm2vec_gen_jax.serving import openai_api
from llm2vec_gen_jax.serving.openai_api import RequestError, to_response

EMBED_KEYS: dict[str, type] = {
    "inputs": object,
    "normalize": bool,
    "truncate": bool,
    "truncation_direction": str,
    "prompt_name": str,
    "dimensions": int,
}
_ERRORS = {  # status of a RequestError: TEI's status and error_type
    400: (422, "Validation"),
    429: (429, "Overloaded"),
    500: (424, "Backend"),
    503: (503, "Unhealthy"),
}


def error_response(error: RequestError) -> Response:
    """Returns TEI's response for an error."""
    status, kind = _ERRORS.get(error.status, (error.status, "Validation"))
    if error.code == "empty":
        status, kind = 400, "Empty"
    return to_response({"error": error.message, "error_type": kind}, status, error.headers)


def texts_of(request: Mapping[str, Any], limit: int) -> list[str]:
    """Returns the texts of a request. Raises RequestError for other values and too many texts."""
    if request.get("inputs") == []:
        raise RequestError(400, "'inputs' is empty", "empty")
    return openai_api.texts_of(request.get("inputs"), limit, "inputs")


def check_truncation_direction(request: Mapping[str, Any]) -> None:
    """Raises RequestError unless a request truncates at the end of texts."""
    direction = request.get("truncation_direction", "right")
    if direction.lower() != "right":
        raise RequestError(
            400, f"'truncation_direction' must be right, not {quote(direction)}: only right truncation is supported"
        )


def prompt_of(request: Mapping[str, Any], prompts: Mapping[str, str], default: str) -> str:
    """Returns the prompt that a request names. default: that of requests without `prompt_name`."""
    name = request.get("prompt_name")
    if name is None:
        return default
    if name not in prompts:
        known = nearest(name, prompts) if prompts else "; this model has no prompts"
        raise RequestError(400, f"'prompt_name' {quote(name)} is unknown{known}")
    return prompts[name]
