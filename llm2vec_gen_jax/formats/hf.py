"""Hugging Face folders: config.json, safetensors (one file or many), the generation config."""

import os
import pathlib

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from llm2vec_gen_jax import architecture as architecture_lib
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.files import atomic_directory, read_json, write_json
from llm2vec_gen_jax.formats import weights

# What a backbone needs from the hub; never code, never pickles.
PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


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
            if not isinstance(expected, dict):
                raise InputError(f"{index}: no weight_map")
            self.files = [self._inside(name, index) for name in sorted(set(expected.values()))]
        else:
            raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
        self.handles = {}
        for file in self.files:
            handle = self._open(file)
            for name in handle.keys():
                self.handles[name] = handle
        if expected is not None and (missing := sorted(set(expected) - set(self.handles))):
            raise InputError(f"{index}: promises {missing[0]}, which none of its files holds")

    def __str__(self):
        return str(self.folder)

    def _inside(self, name, index):
        if pathlib.PurePath(name).name != name:
            raise InputError(f"{index}: names {name}, which is outside its folder")
        return self.folder / name

    @staticmethod
    def _open(file):
        try:
            return safe_open(file, framework="np")
        except FileNotFoundError:
            raise InputError(f"{file}: no such file; fetch the backbone again") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{file}: damaged or truncated ({error}); fetch the backbone again") from None

    def names(self):
        """Returns the tensor names of all files."""
        return list(self.handles)

    def shape(self, name):
        """Returns a tensor's shape without reading it."""
        return self.handles[name].get_slice(name).get_shape()

    def read(self, name, slices):
        """Returns a slice of a tensor in its stored dtype."""
        return self.handles[name].get_slice(name)[slices]


def read_config(folder):
    """Returns the config.json of a folder as a dict."""
    return read_json(pathlib.Path(folder) / "config.json")


def stop_ids(folder, config):
    """Returns the ids that end a turn: those of generation_config.json, else of config.json."""
    generation = pathlib.Path(folder) / "generation_config.json"
    ids = (read_json(generation) if generation.exists() else {}).get("eos_token_id", config.get("eos_token_id"))
    return [] if ids is None else ids if isinstance(ids, list) else [ids]


def save(folder, params, architecture, tokenizer=None, stop=()):
    """Writes a backbone as a Hugging Face folder that transformers 4.5x and 5 read. The folder must not exist."""
    with atomic_directory(folder) as temporary:
        arrays = {name: np.ascontiguousarray(array) for name, array in weights.tensors(params, architecture)}
        save_file(arrays, temporary / "model.safetensors", metadata={"format": "pt"})
        os.chmod(temporary / "model.safetensors", 0o644)  # safetensors makes it its owner's alone
        config = architecture_lib.to_hf_config(architecture)
        config["torch_dtype"] = str(arrays["model.norm.weight"].dtype)
        config["eos_token_id"] = list(stop) or None
        write_json(temporary / "config.json", config)
        if tokenizer is not None:
            tokenizer.save(temporary)
