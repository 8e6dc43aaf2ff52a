"""Reading and writing the folders of embedding shards that the encode command writes."""

import itertools
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import diff, read_array, read_json, sha256_file

_SHARED = ("model", "input", "config")  # keys with equal values in the manifests of all shares


def load_embeddings(
    directory: str | os.PathLike[str], rows: tuple[int, int] | None = None, verify: bool = False
) -> np.ndarray:
    """Returns the vectors (n, E) of a folder written by `python -m launch.encode`, in input order.

    rows: (first, end) of the rows to read, default all. verify: compare the checksum of each file with its manifest.
    A single .npy file is memory-mapped; several are concatenated in memory. int8 values are not rescaled: x stands for
    low + (x + 128) / 255 * (high - low), where low and high are the rows of ranges.npy.
    Raises InputError for missing, incomplete or modified files.
    """
    return _load(pathlib.Path(directory).expanduser(), "file", rows, verify)


def load_soft_prompts(directory: str | os.PathLike[str]) -> NDArray[np.float32]:
    """Returns the soft prompts (n, K, D) of a folder written by `python -m launch.encode ... save_soft_prompts=true`.

    A single .npy file is memory-mapped. Raises InputError for missing or incomplete files.
    """
    directory = pathlib.Path(directory).expanduser()
    if any("soft_prompts" not in shard for shard in _manifests(directory)[1]):
        raise InputError(f"{directory}: contains no soft prompts. Encode again with save_soft_prompts=true")
    return _load(directory, "soft_prompts", None, False)


def _load(directory: pathlib.Path, name: str, rows: tuple[int, int] | None, verify: bool) -> np.ndarray:
    """Reads rows of all shards of a folder. name: key of the file name in the manifest's shards."""
    total, shards = _manifests(directory)
    first, end = (0, total) if rows is None else rows
    if not 0 <= first <= end <= total:
        raise InputError(f"{directory}: has rows 0 to {total}, not {first} to {end}")
    parts: list[np.ndarray] = []
    for shard in shards:
        low, high = shard["rows"]
        if high <= first or low >= end:
            continue
        path = directory / shard[name]
        if not path.is_file():
            raise InputError(f"{path}: no such file, but the manifest lists it")
        if verify and sha256_file(path) != shard.get("sha256"):
            raise InputError(f"{path}: modified after it was written (its checksum differs from the manifest's)")
        array = _read_shard(path)
        if len(array) != high - low or any(array.shape[1:] != part.shape[1:] for part in parts):
            raise InputError(f"{path}: has shape {array.shape}, which does not match rows {low} to {high}")
        parts.append(array[max(first - low, 0) : end - low])
    if not parts:
        raise InputError(f"{directory}: no vectors in rows {first} to {end}")
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _manifests(directory: pathlib.Path) -> tuple[int, list[dict[str, Any]]]:
    """Returns (number of rows, shards in row order) of all manifests of a folder."""
    paths = sorted(directory.glob("manifest*.json"))
    if not paths:
        raise InputError(f"{directory}: no manifest.json: not written by encode, or encode has not finished")
    manifests = [read_manifest(path) for path in paths]
    count = manifests[0]["shard"]["count"]
    finished = {manifest["shard"]["index"] for manifest in manifests}
    missing = list(itertools.islice((index for index in range(count) if index not in finished), 10))
    if missing:
        raise InputError(f"{directory}: shares {missing} of {count} have not finished")
    for manifest in manifests[1:]:
        differing = diff({key: manifests[0][key] for key in _SHARED}, {key: manifest[key] for key in _SHARED})
        if differing:
            raise InputError(f"{directory}: its shares are of different runs ({differing})")
    shards = sorted((shard for manifest in manifests for shard in manifest["shards"]), key=lambda shard: shard["rows"])
    ends = [0, *(shard["rows"][1] for shard in shards)]
    if [shard["rows"][0] for shard in shards] != ends[:-1] or ends[-1] != manifests[0]["rows"]:
        raise InputError(f"{directory}: its manifests do not cover rows 0 to {manifests[0]['rows']} exactly once")
    return ends[-1], shards


def read_manifest(path: pathlib.Path) -> dict[str, Any]:
    """Returns a manifest written by encode. Raises InputError if it is not valid."""
    manifest: dict[str, Any] = read_json(path)
    share, shards = manifest.get("shard"), manifest.get("shards")
    if not (
        isinstance(share, dict)
        and _are_counts(share.get("index"), share.get("count"), manifest.get("rows"), manifest.get("dimension"))
        and share["index"] < share["count"]
        and all(isinstance(manifest.get(key), dict) for key in _SHARED)
        and isinstance(shards, list)
        and all(map(is_shard, shards))
    ):
        raise InputError(f"{path}: not a valid manifest of encode. Encode again, or copy it again")
    return manifest


def is_shard(entry: object) -> TypeGuard[dict[str, Any]]:
    """Returns whether a value is a valid shard entry of a manifest: counts, and names of files in the same folder."""
    if not isinstance(entry, dict) or not isinstance(entry.get("rows"), list) or len(entry["rows"]) != 2:
        return False
    names = [entry.get("file"), *(entry[key] for key in ("soft_prompts", "ranges") if key in entry)]
    plain = all(isinstance(name, str) and re.fullmatch(r"[\w-]+\.(npy|parquet)", name) for name in names)
    counts = _are_counts(*entry["rows"], entry.get("shard"), entry.get("cut", 0), entry.get("empty", 0))
    return plain and counts and entry["rows"][0] < entry["rows"][1]


def _read_shard(path: pathlib.Path) -> np.ndarray:
    """Returns the array (n, ...) of a file of vectors. Raises InputError for anything else."""
    array: np.ndarray = read_array(path, "vectors") if path.suffix == ".npy" else _read_parquet(path)
    if array.ndim < 2 or array.dtype.kind not in "fiu":
        raise InputError(f"{path}: expected vectors, found {array.dtype} {array.shape}")
    return array


def write_shard(path: pathlib.Path, ids: Sequence[str] | Sequence[int], vectors: np.ndarray) -> None:
    """Writes vectors (n, E) to a .npy, or to a .parquet with their ids (strings or integers)."""
    if path.suffix == ".npy":
        np.save(path, vectors)
        return
    import pyarrow
    import pyarrow.parquet

    flat = pyarrow.array(np.ascontiguousarray(vectors).reshape(-1))
    column = pyarrow.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    pyarrow.parquet.write_table(pyarrow.table({"id": ids, "vector": column}), path)


def _are_counts(*values: object) -> bool:
    return all(type(value) is int and value >= 0 for value in values)


def _read_parquet(path: pathlib.Path) -> np.ndarray:
    import pyarrow
    import pyarrow.parquet

    try:
        column = pyarrow.parquet.read_table(path, columns=["vector"])["vector"].combine_chunks()
        vectors: np.ndarray = column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)
        return vectors
    except (pyarrow.ArrowException, OSError, KeyError, AttributeError, ValueError) as error:
        raise InputError(f"{path}: not a readable file of vectors ({first_line(error)})") from None
