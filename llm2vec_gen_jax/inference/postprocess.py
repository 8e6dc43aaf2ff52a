"""Finished vectors: truncated, normalised, quantised; the folder of shards that `encode` writes, and its reader."""

import numpy as np

from llm2vec_gen_jax.common.errors import InputError, nearest

PRECISIONS = ("float32", "int8", "uint8", "binary", "ubinary")


def finish(embeddings: np.ndarray, truncate_dim: int | None, normalize: bool) -> np.ndarray:
    """Returns embeddings (n, E) cut to their first truncate_dim dimensions, then brought to unit length."""
    if truncate_dim is not None:
        if not 1 <= truncate_dim <= embeddings.shape[1]:
            raise InputError(f"truncate_dim must be within 1 and {embeddings.shape[1]}, found {truncate_dim}")
        embeddings = embeddings[:, :truncate_dim]
    return l2_normalize(embeddings) if normalize else embeddings


def l2_normalize(x: np.ndarray) -> np.ndarray:
    """Returns float32 vectors (..., E) of unit length; zero stays zero."""
    squares = np.einsum("...e,...e->...", x, x, dtype=np.float64)  # in float32 they would overflow, or vanish
    norms = np.sqrt(np.where(squares > 0, squares, 1)).astype(np.float32)
    return (x / norms[..., None]).astype(np.float32, copy=False)


def ranges_of(embeddings: np.ndarray) -> np.ndarray:
    """Returns (2, E): the least and the largest number of each dimension."""
    return np.stack([embeddings.min(axis=0), embeddings.max(axis=0)])


def quantize(embeddings: np.ndarray, precision: str, ranges: np.ndarray | None = None, first: int = 0) -> np.ndarray:
    """Returns embeddings (n, E) in a precision, by the formulas of sentence-transformers 6.

    float32, float16: as they are. int8, uint8: 255 steps between each dimension's `ranges` (2, E), default those of
    the embeddings themselves; what is outside is clipped. binary (int8), ubinary (uint8): the signs, packed in bytes.
    first: the number of embeddings[0] in errors. Raises InputError for int8 ranges of a single vector, for NaN and
    infinity, and for numbers that float16 cannot hold.
    """
    require_finite(embeddings, "NaN or infinity", first)
    if precision in ("float32", "float16"):
        with np.errstate(over="ignore"):
            found = embeddings.astype(precision)
        require_finite(found, f"numbers beyond 65504, the largest of {precision}: use precision=float32", first)
        return found
    if precision in ("binary", "ubinary"):
        packed = np.packbits(embeddings > 0, axis=-1)
        return packed if precision == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is unknown{nearest(precision, PRECISIONS)}")
    if len(embeddings) == 0:
        return embeddings.astype(precision)
    if ranges is None:
        if len(embeddings) == 1:
            raise InputError(f"precision {precision!r} needs more than one text, whose vectors give the ranges")
        ranges = ranges_of(embeddings)
    step = (ranges[1] - ranges[0]) / 255
    levels = np.clip(np.floor((embeddings - ranges[0]) / np.where(step == 0, 1, step)), 0, 255)
    return (levels - (128 if precision == "int8" else 0)).astype(precision)


def require_finite(embeddings: np.ndarray, found: str, first: int = 0, what: str = "vector") -> None:
    """Raises InputError that names the first of embeddings (n, E) that is not finite, and what it holds."""
    if not (sound := np.isfinite(embeddings).all(axis=-1)).all():
        raise InputError(f"{what} {first + int(np.argmin(sound))} (from 0) holds {found}")
