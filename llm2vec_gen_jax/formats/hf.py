"""Hugging Face folders: config.json, safetensors (one file or many), the generation config."""

import json
import math
import pathlib
import re

import jax
import numpy as np
from safetensors import SafetensorError, safe_open

from llm2vec_gen_jax.common.errors import InputError, not_finite
from llm2vec_gen_jax.common.files import atomic_directory, check_file, read_json, write_json
from llm2vec_gen_jax.common.yaml_files import parse_yaml
from llm2vec_gen_jax.formats import weights
from llm2vec_gen_jax.model import architecture as architecture_lib

# What a backbone needs from the hub; never code, never pickles.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model", "README.md"]
MAX_FILE_BYTES = 5_000_000_000  # of weights in one file
_OF_BASE_MODEL = ("embed_tokens.", "layers.", "norm.")  # names in files saved without the head: no "model." before them
_FRONT_MATTER = 1 << 20  # characters of a model card within which its metadata end
_SAFETENSORS_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_READABLE_DTYPES = (*_SAFETENSORS_DTYPES.values(), "F64")  # others are quantised: numbers without their scales


class SafetensorsSource:
    """The weights of a folder, read slice by slice."""

    def __init__(self, folder):
        self.folder = pathlib.Path(folder).resolve()
        index = self.folder / "model.safetensors.index.json"
        single = self.folder / "model.safetensors"
        if single.exists():
            self.files = [single]
            expected = None
        elif index.exists():
            expected = read_json(index).get("weight_map")
            if not isinstance(expected, dict) or not all(isinstance(name, str) for name in expected.values()):
                raise InputError(f"{index}: no weight_map of tensors to file names")
            self.files = [self._inside(name, index) for name in sorted(set(expected.values()))]
        else:
            raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
        self.handles, stored = {}, set()  # {name: (open file, the name in it)}, the names in all files
        for file in self.files:
            handle = self._open(file)
            for name in handle.keys():
                full = f"model.{name}" if name.startswith(_OF_BASE_MODEL) else name
                if self.handles.get(full, (handle, name))[1] != name:
                    raise InputError(f"{folder}: holds {full} and {full.removeprefix('model.')}")
                self.handles[full] = handle, name
                stored.add(name)
        if expected is not None and (missing := sorted(set(expected) - stored)):
            raise InputError(f"{index}: promises {missing[0]}, which none of its files holds")

    def __str__(self):
        return str(self.folder)

    def _inside(self, name, index):
        if pathlib.PurePath(name).name != name or name == "..":
            raise InputError(f"{index}: names {name}, which is outside its folder")
        return self.folder / name

    @staticmethod
    def _open(file):
        try:
            check_file(file)
            return safe_open(file, framework="np")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged or truncated ({error}); fetch the backbone again") from None

    def tie(self):
        """Takes the head as the embeddings too where the files hold only the head, as transformers does."""
        if "model.embed_tokens.weight" not in self.handles and "lm_head.weight" in self.handles:
            self.handles["model.embed_tokens.weight"] = self.handles.pop("lm_head.weight")

    def names(self):
        """Returns the names of the weights of all files, as a causal LM has them."""
        return list(self.handles)

    def shape(self, name):
        """Returns a tensor's shape without reading it."""
        return self._slice(name).get_shape()

    def _slice(self, name):
        handle, stored = self.handles[name]
        return handle.get_slice(stored)

    def read(self, name, slices):
        """Returns a slice of a tensor in its stored dtype."""
        tensor = self._slice(name)
        if tensor.get_dtype() not in _READABLE_DTYPES:
            raise InputError(f"{self}: {name} is {tensor.get_dtype()}; supported: {', '.join(_READABLE_DTYPES)}")
        return tensor[slices]


def read_config(folder):
    """Returns the config.json of a folder as a dict."""
    return read_json(pathlib.Path(folder) / "config.json")


def stop_ids(folder, config):
    """Returns the ids that end a turn: those of generation_config.json, else of config.json."""
    file = pathlib.Path(folder) / "generation_config.json"
    generation = read_json(file) if file.exists() else {}
    if "eos_token_id" not in generation:
        file, generation = file.with_name("config.json"), config
    ids = generation.get("eos_token_id")
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(isinstance(number, int) for number in ids):
        raise InputError(f"{file}: eos_token_id={ids!r} is not a token's number or a list of them")
    return ids


def read_license(folder):
    """Returns the license that the model card of a folder states, or None. Raises InputError for damaged metadata."""
    card = pathlib.Path(folder) / "README.md"
    if not card.is_file():
        return None
    with open(card, encoding="utf-8", errors="replace") as file:
        match = re.match(r"---\n(.*?)\n---", file.read(_FRONT_MATTER), re.DOTALL)
    front = parse_yaml(match[1], f"{card}: its metadata, between the lines of ---") if match else None
    license = front.get("license") if isinstance(front, dict) else None
    return license if isinstance(license, str) else None


def save(folder, params, architecture, also=None, stop=(), added=None):
    """Writes a backbone as a Hugging Face folder that transformers 4.5x and 5 read. The folder must not exist.

    Weights are gathered and written one at a time; every process of a multi-host run calls it, process 0 writes.
    also: a function that writes further files into the folder it is given (the tokenizer's). stop: ids that end a
    turn. added: (ids, rows (n, D)), input embeddings of tokens put into the table, which grows to hold them; an
    untied head grows by zeros.
    """
    layout = weights.layout(architecture)
    ids, rows = added or ([], None)
    vocab_size = max([architecture.vocab_size, *(id_ + 1 for id_ in ids)])
    tables = [name for name in ("model.embed_tokens.weight", "lm_head.weight") if name in layout]
    layout |= {name: (vocab_size, layout[name][1]) for name in tables}
    dtype = jax.tree.leaves(params)[0].dtype

    def fitted():
        for name, array in weights.tensors(params, architecture):
            if array is not None and name in tables and added is not None:
                array = np.concatenate([array, np.zeros((vocab_size - len(array), array.shape[1]), array.dtype)])
                if name == "model.embed_tokens.weight":
                    with np.errstate(over="ignore"):  # `_write_weights` looks for infinity
                        array[ids] = rows
            yield name, array

    if jax.process_index() != 0:
        for _ in fitted():
            pass
        return
    with atomic_directory(folder) as temporary:
        _write_weights(temporary, layout, dtype, fitted())
        config = architecture_lib.to_hf_config(architecture) | {"vocab_size": vocab_size, "torch_dtype": str(dtype)}
        config["eos_token_id"] = list(stop) or None
        write_json(temporary / "config.json", config)
        if also is not None:
            also(temporary)


def _write_weights(folder, layout, dtype, arrays):
    """Writes (name, array) pairs as they come, in the order of `layout` {name: shape}, in files of limited size."""
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
        # The format: the length of a JSON header, the header, the raw tensors.
        header, end = {"__metadata__": {"format": "pt"}}, 0
        for name in names:
            header[name] = {"dtype": _SAFETENSORS_DTYPES[str(dtype)], "shape": list(layout[name])}
            header[name]["data_offsets"] = [end, end := end + size[name]]
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                found, array = next(arrays)
                assert (found, array.shape) == (name, tuple(layout[name])), f"{found} {array.shape} is out of order"
                if not np.isfinite(array).all():
                    raise not_finite(f"{folder}: {name}", str(dtype))
                out.write(np.ascontiguousarray(array).tobytes())
    if len(parts) > 1:
        places = {name: file for file, names in zip(files, parts) for name in names}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": places}
        write_json(folder / "model.safetensors.index.json", index)
