"""Post-processing of embeddings: truncation, normalization, quantization, finiteness checks."""

import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.common.errors import InputError, nearest

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def finish(embeddings: np.ndarray, truncate_dim: int | None, normalize: bool) -> np.ndarray:
    """Returns embeddings (n, E) truncated to their first truncate_dim dimensions, then L2-normalized on request."""
    if truncate_dim is not None:
        if not 1 <= truncate_dim <= embeddings.shape[1]:
            raise InputError(f"truncate_dim must be between 1 and {embeddings.shape[1]}, found {truncate_dim}")
        embeddings = embeddings[:, :truncate_dim]
    return l2_normalize(embeddings) if normalize else embeddings


def l2_normalize(x: np.ndarray) -> NDArray[np.float32]:
    """Returns vectors (..., E) of unit length; zero vectors stay zero."""
    squares = np.einsum("...e,...e->...", x, x, dtype=np.float64)  # float32 would overflow or underflow
    norms = np.sqrt(np.where(squares > 0, squares, 1))
    unit = np.empty(np.shape(x), np.float32)
    np.divide(x, norms[..., None], out=unit, casting="same_kind")  # in float64, piece by piece
    return unit


def ranges_of(embeddings: np.ndarray) -> np.ndarray:
    """Returns (2, E): minimum and maximum of each dimension."""
    return np.stack([embeddings.min(axis=0), embeddings.max(axis=0)])


def quantize(embeddings: np.ndarray, precision: str, ranges: np.ndarray | None = None, first: int = 0) -> np.ndarray:
    """Returns embeddings (n, E) in a precision, by the formulas of sentence-transformers 6.

    float32, float16: cast. int8, uint8: 255 steps over the `ranges` (2, E) of each dimension, default those of the
    embeddings; values outside are clipped. binary (int8), ubinary (uint8): signs, packed into bytes.
    first: index of embeddings[0] in error messages. Raises InputError for NaN and infinity, for values beyond the
    range of float16, and for int8 or uint8 of a single vector without ranges.
    """
    require_finite(embeddings, "NaN or infinity", first)
    if precision in ("float32", "float16"):
        with np.errstate(over="ignore"):
            cast = embeddings.astype(precision)
        require_finite(cast, f"numbers beyond 65504, the largest of {precision}: use precision=float32", first)
        return cast
    if precision in ("binary", "ubinary"):
        packed = np.packbits(embeddings > 0, axis=-1)
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown{nearest(precision, PRECISIONS)}")
    if len(embeddings) == 0:
        return embeddings.astype(precision)
    if ranges is None:
        if len(embeddings) == 1:
            raise InputError(f"precision {precision!r} needs more than one text, to compute the ranges")
        ranges = ranges_of(embeddings)
    with np.errstate(over="ignore"):
        step = (ranges[1] - ranges[0]) / 255
    if not np.isfinite(step).all():
        raise InputError(
            f"the range of dimension {np.argmin(np.isfinite(step))} exceeds float32: use precision=float32"
        )
    levels: np.ndarray = np.clip(np.floor((embeddings - ranges[0]) / np.where(step == 0, 1, step)), 0, 255)
    quantized: np.ndarray = (levels - (128 if precision == "int8" else 0)).astype(precision)
    return quantized


def require_finite(embeddings: np.ndarray, reason: str, first: int = 0, what: str = "vector") -> None:
    """Raises InputError naming the first of embeddings (n, E) that is not finite. reason: what it holds."""
    if not (is_finite := np.isfinite(embeddings).all(axis=-1)).all():
        raise InputError(f"{what} {first + int(np.argmin(is_finite))} (from 0) holds {reason}")
