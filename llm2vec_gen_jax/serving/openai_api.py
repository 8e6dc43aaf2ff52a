"""Requests and errors of OpenAI's embeddings API: parsing, validation and responses.

Lengths are checked before arrays are created, and values of a request are truncated in error messages.
"""

import base64
import binascii
from collections.abc import Iterable, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import orjson
from starlette.responses import Response

from llm2vec_gen_jax.common.errors import nearest, quote

EMBEDDING_KEYS: dict[str, type] = {
    "input": object,
    "model": str,
    "dimensions": int,
    "encoding_format": str,
    "user": str,
}
EMBEDDING_KEYS |= {"instruction": str, "soft_prompts": bool}
DECODING_KEYS: dict[str, type] = {"input": object, "soft_prompts": list, "model": str, "max_tokens": int}
DECODING_KEYS |= {"seed": int, "user": str, "instruction": str}
_JSON_NAMES = {str: "a string", int: "an integer", bool: "true or false", list: "a list", dict: "an object"}
_TOKEN_IDS = (
    "token ids are not accepted: send text (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False) does)"
)


class RequestError(Exception):
    """A request that is refused: the HTTP status of the response, and the parts of an error object of OpenAI's API."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    @property
    def headers(self) -> dict[str, str]:
        """The headers that the status requires."""
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        return headers | ({"WWW-Authenticate": "Bearer"} if self.status == 401 else {})


def error_response(error: RequestError) -> Response:
    """Returns the response of OpenAI's API for an error."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    content = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return to_response({"error": content}, error.status, error.headers)


def unknown_model(requested: str, name: str) -> RequestError:
    """Returns the error for a request of another model than `name`."""
    message = f"the model {quote(requested)} does not exist; this server has {name!r}"
    return RequestError(404, message, "model_not_found", "model")


def parse(body: bytes | bytearray, keys: Mapping[str, type], name: str) -> dict[str, Any]:
    """Returns the JSON object in a body without its null values.

    Raises RequestError for keys other than `keys` (name -> type), wrong types, and a model other than `name`.
    """
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(request, dict):
        raise RequestError(400, "the body must be a JSON object")
    request = {key: value for key, value in request.items() if value is not None}
    for key, value in request.items():
        if key not in keys:
            raise RequestError(400, f"unknown key {quote(key)}{nearest(key, keys)}", "unknown_parameter", key[:40])
        if keys[key] is not object and type(value) is not keys[key]:  # isinstance(True, int)
            raise RequestError(400, f"{key!r} must be {_JSON_NAMES[keys[key]]}", "invalid_type", key)
    if request.get("model", name) != name:
        raise unknown_model(request["model"], name)
    return request


def check_count(items: Sized, limit: int, key: str) -> None:
    """Raises RequestError for more than `limit` items."""
    if len(items) > limit:
        raise RequestError(413, f"{key!r} has {len(items)} items, at most {limit} are allowed", "too_many_inputs", key)


def texts_of(value: Any, limit: int, key: str = "input") -> list[str]:
    """Returns the texts in `key` of a request. Raises RequestError for other values and too many texts."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise RequestError(400, f"{key!r} must be a string, or a list of at least one", "invalid_type", key)
    if isinstance(texts[0], int | list):
        raise RequestError(400, _TOKEN_IDS, "invalid_type", key)
    check_count(texts, limit, key)
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError(400, f"{key!r} {number} must be a string", "invalid_type", key)
    return texts


def dimensions_of(request: Mapping[str, Any], largest: int) -> int | None:
    """Returns the `dimensions` of a request, None for all. Raises RequestError if they are not within 1 and largest."""
    size: int | None = request.get("dimensions")
    if size is not None and not 1 <= size <= largest:
        raise RequestError(400, f"'dimensions' must be between 1 and {largest}, found {size}", param="dimensions")
    return size


def soft_prompts_of(items: Sequence[Any], shape: tuple[int, int]) -> list[np.ndarray]:
    """Returns a float32 array of `shape` (K, D) for each item, which is base64 or nested lists."""
    arrays = []
    for number, item in enumerate(items):
        array = _from_base64(item, shape) if isinstance(item, str) else _from_lists(item, shape)
        if array is None or not np.isfinite(array).all():
            expected = f"{shape[0]} x {shape[1]} numbers, as lists or as base64 of float32"
            raise RequestError(400, f"'soft_prompts' {number} must be {expected}", param="soft_prompts")
        arrays.append(array)
    return arrays


def _from_base64(text: str, shape: tuple[int, int]) -> np.ndarray | None:
    if len(text) != -(-4 * shape[0] * shape[1] // 3) * 4:
        return None
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(shape)
    except (binascii.Error, ValueError):
        return None


def _from_lists(rows: Any, shape: tuple[int, int]) -> np.ndarray | None:
    if not isinstance(rows, list) or len(rows) != shape[0]:
        return None
    if not all(isinstance(row, list) and len(row) == shape[1] for row in rows):
        return None
    if not all(type(number) in (int, float) for row in rows for number in row):
        return None
    with np.errstate(over="ignore"):  # an overflow gives infinity, which is rejected
        return np.array(rows, np.float32)


def to_base64(array: np.ndarray) -> str:
    """Returns an array as OpenAI's base64 format: little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4").data).decode()


def to_fragments(items: Iterable[Any]) -> list[orjson.Fragment]:
    """Returns the items as JSON fragments; serializing them one at a time lets other threads run."""
    return [orjson.Fragment(orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY)) for item in items]


def to_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Returns an HTTP response with a JSON value."""
    return Response(orjson.dumps(content), status, headers, "application/json")
