"""Hugging Face checkpoint folders: config.json, safetensors (one file or sharded), generation config."""

import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from llm2vec_gen_jax.common.errors import InputError, not_finite
from llm2vec_gen_jax.common.files import atomic_directory, check_file, read_json, write_json
from llm2vec_gen_jax.common.yaml_files import parse_yaml
from llm2vec_gen_jax.formats import weights
from llm2vec_gen_jax.model import architecture as architecture_lib

# Files of a backbone that are downloaded from the hub: no code, no pickles.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md"]
MAX_FILE_BYTES = 5_000_000_000  # weights per file
_BASE_MODEL_PREFIXES = ("embed_tokens.", "layers.", "norm.")  # without "model.": files saved without the head
_MAX_FRONT_MATTER = 1 << 20  # characters
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_READABLE_DTYPES = (*_SAFETENSORS_DTYPES.values(), "F64")  # others are quantized, with scales elsewhere


class SafetensorsSource:
    """The weights of a folder as a `weights.WeightSource`, read slice by slice."""

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = pathlib.Path(folder).resolve()
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if single.exists():
            self.files = [single]
            expected = None
        elif index.exists():
            expected = read_json(index).get("weight_map")
            if not isinstance(expected, dict) or not all(isinstance(name, str) for name in expected.values()):
                raise InputError(f"{index}: weight_map must map tensor names to file names")
            self.files = [self._inside(name, index) for name in sorted(set(expected.values()))]
        else:
            raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
        self.handles: dict[str, tuple[Any, str]] = {}  # {name in a causal LM: (open file, name in the file)}
        stored_names = set()
        for file in self.files:
            handle = self._open(file)
            for name in handle.keys():
                full = f"model.{name}" if name.startswith(_BASE_MODEL_PREFIXES) else name
                if self.handles.get(full, (handle, name))[1] != name:
                    raise InputError(f"{folder}: contains both {full} and {full.removeprefix('model.')}")
                self.handles[full] = handle, name
                stored_names.add(name)
        if expected is not None and (missing := sorted(set(expected) - stored_names)):
            raise InputError(f"{index}: lists {missing[0]}, which is not in its files")

    def __str__(self) -> str:
        return str(self.folder)

    def _inside(self, name, index):
        if pathlib.PurePath(name).name != name or name == "..":
            raise InputError(f"{index}: lists {name}, which is outside its folder")
        return self.folder / name

    @staticmethod
    def _open(file):
        try:
            check_file(file)
            return safe_open(file, framework="np")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged or truncated ({error}). Download the backbone again") from None

    def tie(self) -> None:
        """Uses the head as embeddings if the files contain only the head, as transformers does."""
        if "model.embed_tokens.weight" not in self.handles and "lm_head.weight" in self.handles:
            self.handles["model.embed_tokens.weight"] = self.handles.pop("lm_head.weight")

    def names(self) -> list[str]:
        """Returns the names of the weights of all files, with the prefix "model." as in a causal LM."""
        return list(self.handles)

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape without reading it."""
        return tuple(self._slice(name).get_shape())

    def _slice(self, name):
        handle, stored_name = self.handles[name]
        return handle.get_slice(stored_name)

    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Returns a slice of a tensor in its stored dtype."""
        tensor = self._slice(name)
        if tensor.get_dtype() not in _READABLE_DTYPES:
            raise InputError(f"{self}: {name} is {tensor.get_dtype()}; supported: {', '.join(_READABLE_DTYPES)}")
        return tensor[slices]


def read_config(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Returns the config.json of a folder as a dict."""
    return read_json(pathlib.Path(folder) / "config.json")


def stop_ids(folder: str | os.PathLike[str], config: dict[str, Any]) -> list[int]:
    """Returns the ids that end a turn: from generation_config.json, otherwise from config.json."""
    file = pathlib.Path(folder) / "generation_config.json"
    generation = read_json(file) if file.exists() else {}
    if "eos_token_id" not in generation:
        file, generation = file.with_name("config.json"), config
    ids = generation.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(number, int) for number in ids):
        raise InputError(f"{file}: eos_token_id={ids!r} is not a token id or a list of token ids")
    return ids


def read_license(folder: str | os.PathLike[str]) -> str | None:
    """Returns the license in the model card of a folder, or None. Raises InputError for invalid metadata."""
    card = pathlib.Path(folder) / "README.md"
    if not card.is_file():
        return None
    with open(card, encoding="utf-8", errors="replace") as file:
        match = re.match(r"---\n(.*?)\n---", file.read(_MAX_FRONT_MATTER), re.DOTALL)
    front = parse_yaml(match[1], f"{card}: metadata between the --- lines") if match else None
    license = front.get("license") if isinstance(front, dict) else None
    return license if isinstance(license, str) else None


def save(
    folder: str | os.PathLike[str],
    params: Any,
    architecture: architecture_lib.Architecture,
    write_other_files: Callable[[pathlib.Path], None] | None = None,
    stop: Sequence[int] = (),
    added: tuple[list[int], np.ndarray] | None = None,
) -> None:
    """Writes a backbone as a Hugging Face folder for transformers 4.5x and 5. The folder must not exist.

    Weights are gathered and written one at a time. Every process of a multi-host run must call it; process 0 writes.
    write_other_files: called with the folder, for example to write the tokenizer. stop: ids that end a turn.
    added: (ids, rows (n, D)), input embeddings of tokens to add. The table grows if necessary, an untied head by zeros.
    """
    layout = weights.layout(architecture)
    ids, rows = added or ([], None)
    vocab_size = max([architecture.vocab_size, *(id_ + 1 for id_ in ids)])
    tables = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in layout]
    layout |= {name: (vocab_size, layout[name][1]) for name in tables}
    dtype = jax.tree.leaves(params)[0].dtype

    def resized() -> Iterator[tuple[str, np.ndarray | None]]:
        for name, array in weights.tensors(params, architecture):
            if array is not None and name in tables and added is not None:
                array = np.concatenate([array, np.zeros((vocab_size - len(array), array.shape[1]), array.dtype)])
                if name == "model.embed_tokens.weight":
                    with np.errstate(over="ignore"):  # `_write_weights` checks for infinity
                        array[ids] = rows
            yield name, array

    if jax.process_index() != 0:
        for _ in resized():
            pass
        return
    with atomic_directory(folder) as temporary:
        _write_weights(temporary, layout, dtype, resized())
        config = architecture_lib.to_hf_config(architecture) | {"vocab_size": vocab_size, "torch_dtype": str(dtype)}
        config["eos_token_id"] = list(stop) or None
        write_json(temporary / "config.json", config)
        if write_other_files is not None:
            write_other_files(temporary)


def _write_weights(folder, layout, dtype, arrays):
    """Writes (name, array) pairs, in the order of `layout` {name: shape}, to files of limited size."""
    size = {name: math.prod(shape) * dtype.itemsize for name, shape in layout.items()}
    parts, room = [[]], MAX_FILE_BYTES
    for name in layout:
        if size[name] > room and parts[-1]:
            parts, room = [*parts, []], MAX_FILE_BYTES
        parts[-1].append(name)
        room -= size[name]
    files = [f"model-{number:05}-of-{len(parts):05}.safetensors" for number in range(1, len(parts) + 1)]
    files = ["model.safetensors"] if len(parts) == 1 else files
    arrays = iter(arrays)
    for file, names in zip(files, parts):
        # Format: length of the JSON header, header, raw tensors.
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            header[name] = {"dtype": _SAFETENSORS_DTYPES[str(dtype)], "shape": list(layout[name])}
            header[name]["data_offsets"] = [end, end := end + size[name]]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                actual, array = next(arrays)
                assert (actual, array.shape) == (name, tuple(layout[name])), f"{actual} {array.shape} is out of order"
                if not np.isfinite(array).all():
                    raise not_finite(f"{folder}: {name}", str(dtype))
                out.write(np.ascontiguousarray(array).tobytes())
    if len(parts) > 1:
        weight_map = {name: file for file, names in zip(files, parts) for name in names}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": weight_map}
        write_json(folder / "model.safetensors.index.json", index)
