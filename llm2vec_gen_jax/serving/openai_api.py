"""The requests and errors of OpenAI's embeddings API: bodies are parsed and checked, and refused in its shape.

Lengths are checked before arrays are made, and what an error repeats of a request is cut.
"""

import base64
import binascii

import numpy as np
import orjson
from starlette.responses import Response

from llm2vec_gen_jax.common.errors import nearest, quote

EMBEDDING_KEYS = {"input": object, "model": str, "dimensions": int, "encoding_format": str, "user": str}
EMBEDDING_KEYS |= {"instruction": str, "soft_prompts": bool}
DECODING_KEYS = {"input": object, "soft_prompts": list, "model": str, "max_tokens": int, "seed": int, "user": str}
DECODING_KEYS |= {"instruction": str}
_JSON_NAMES = {str: "a string", int: "an integer", bool: "true or false", list: "a list", dict: "an object"}
_TOKEN_IDS = (
    "token ids are not accepted, those of OpenAI's tokenizers mean nothing to this model: send text "
    "(LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))"
)


class RequestError(Exception):
    """A request that is answered with an error of OpenAI's shape."""

    def __init__(self, status, message, code=None, param=None):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param

    def response(self):
        """Returns the HTTP response, with what a client should know of when to come again."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        headers |= {"WWW-Authenticate": "Bearer"} if self.status == 401 else {}
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return to_response({"error": error}, self.status, headers)


def unknown_model(found, name):
    """Returns the error for a request of the model `found`, where there is only `name`."""
    message = f"the model {quote(found)} does not exist; this server has {name!r}"
    return RequestError(404, message, "model_not_found", "model")


def parse(body, keys, name):
    """Returns the object that a body holds, checked to have only these keys (name -> type) and the model `name`."""
    try:
        found = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(400, f"the body is not valid JSON: {error}", "invalid_json") from None
    if not isinstance(found, dict):
        raise RequestError(400, "the body must be a JSON object")
    found = {key: value for key, value in found.items() if value is not None}
    for key, value in found.items():
        if key not in keys:
            raise RequestError(400, f"unknown key {quote(key)}{nearest(key, keys)}", "unknown_parameter", key[:40])
        if keys[key] is not object and type(value) is not keys[key]:  # a bool is no int
            raise RequestError(400, f"{key!r} must be {_JSON_NAMES[keys[key]]}", "invalid_type", key)
    if found.get("model", name) != name:
        raise unknown_model(found["model"], name)
    return found


def check_count(items, most, key):
    """Raises Refused for more items than a request may have."""
    if len(items) > most:
        raise RequestError(413, f"{key!r} has {len(items)} items, at most {most} are taken", "too_many_inputs", key)


def texts_of(value, most):
    """Returns the list of texts of an `input`."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts:
        raise RequestError(400, "'input' must be a string, or a list of at least one", "invalid_type", "input")
    if isinstance(texts[0], int | list):
        raise RequestError(400, _TOKEN_IDS, "invalid_type", "input")
    check_count(texts, most, "input")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise RequestError(400, f"'input' {number} must be a string", "invalid_type", "input")
    return texts


def soft_prompts_of(items, shape):
    """Returns float32 of a shape (K, D) for each item, which is base64 or nested lists."""
    found = []
    for number, item in enumerate(items):
        array = _from_base64(item, shape) if isinstance(item, str) else _from_lists(item, shape)
        if array is None or not np.isfinite(array).all():
            wanted = f"{shape[0]} x {shape[1]} numbers, as lists or as base64 of float32"
            raise RequestError(400, f"'soft_prompts' {number} must be {wanted}", param="soft_prompts")
        found.append(array)
    return found


def _from_base64(text, shape):
    if len(text) != -(-4 * shape[0] * shape[1] // 3) * 4:
        return None
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(shape)
    except (binascii.Error, ValueError):
        return None


def _from_lists(rows, shape):
    if not isinstance(rows, list) or len(rows) != shape[0]:
        return None
    if not all(isinstance(row, list) and len(row) == shape[1] for row in rows):
        return None
    if not all(type(number) in (int, float) for row in rows for number in row):
        return None
    with np.errstate(over="ignore"):  # the infinity that 1e300 becomes is refused
        return np.array(rows, np.float32)


def to_base64(array):
    """Returns an array as OpenAI sends vectors in base64: little-endian float32."""
    return base64.b64encode(np.ascontiguousarray(array, "<f4")).decode()


def to_list(items):
    """Returns `items` to be put into an answer. Each is written by itself: a long answer holds no thread up."""
    return [orjson.Fragment(orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY)) for item in items]


def to_response(content, status=200, headers=None):
    """Returns the HTTP response with a JSON value."""
    return Response(orjson.dumps(content), status, headers, "application/json")
