"""GGUF files: architecture, dequantized weights with Hugging Face names, and tokenizer."""

import dataclasses
import functools
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

import gguf
import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.formats import gguf_file
from llm2vec_gen_jax.model import architecture as architecture_lib

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# Pre-tokenization by value of `tokenizer.ggml.pre`.
_PRE_TOKENIZERS: dict[str, list[pre_tokenizers.PreTokenizer]] = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(_WORDS + "{1,3}" + _REST), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(_WORDS + _REST), "isolated")],
}
# Default for files of unknown or old converters; all models of these families use one pre-tokenization.
_FAMILY_PRE_TOKENIZERS = {"qwen2": "qwen2", "qwen3": "qwen2"}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# Token types that are matched literally before pre-tokenization: whether they are special.
_ADDED = {gguf.TokenType.UNKNOWN: True, gguf.TokenType.CONTROL: True, gguf.TokenType.USER_DEFINED: False}
_JOINED_ROWS = 256  # rows that are dequantized together
_LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1, Llama 3.2


def _raises_input_error(function: Callable) -> Callable:
    """Decorator: turns any error of a function of a GGUFSource into an InputError that names the file."""

    @functools.wraps(function)
    def read(source, *arguments):
        try:
            return function(source, *arguments)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{source}: no such file") from None
        except Exception as error:
            raise InputError(f"{source}: not a complete GGUF file ({error})") from None

    return read


class GGUFSource:
    """A GGUF file, possibly split, as a `weights.WeightSource`."""

    @_raises_input_error
    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = pathlib.Path(path)
        self.reader = gguf_file.GGUFFile(path)
        self.family = self.field("general.architecture")
        self.tensors: dict[str, gguf_file.Tensor] = {}
        for part in [self.reader, *self._other_parts()]:
            for tensor in part.tensors:
                name = _hf_name(tensor.name)
                if name is None and tensor.name != "rope_freqs.weight":
                    raise InputError(f"{self}: tensor {tensor.name} is not supported")
                if (name or tensor.name) in self.tensors:
                    raise InputError(f"{self}: duplicate tensor {tensor.name}")
                self.tensors[name or tensor.name] = tensor
        expected = self.field("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise InputError(f"{self}: split.tensors.count is {expected}, the parts have {len(self.tensors)} tensors")

    def _other_parts(self):
        """Returns the readers of parts 2 to N of a split file; this file is part 1."""
        count, number = self.field("split.count", 1), self.field("split.no", 0)
        if count <= 1:
            return []
        match = _PART.fullmatch(self.path.name)
        merge = "or merge the parts: llama-gguf-split --merge FIRST-PART MERGED.gguf"
        if match is None or int(match[3]) != count or int(match[2]) != number + 1:
            raise InputError(
                f"{self}: is part {number + 1} of {count}, but its name does not end in "
                f"-{number + 1:05}-of-{count:05}.gguf. Rename it {merge}"
            )
        files = [self.path.with_name(f"{match[1]}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
        if number != 0:
            raise InputError(f"{self}: is part {number + 1} of {count}. Pass the first part, {files[0]}, {merge}")
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{self}: part {missing[0]} of {count} parts is missing. Put all parts in one folder")
        return [self._part(file, part, count) for part, file in enumerate(files)][1:]

    @staticmethod
    def _part(file, number, count):
        try:
            reader = gguf_file.GGUFFile(file)
            split = {key: reader.fields[f"split.{key}"].contents() for key in ("no", "count")}
        except Exception as error:
            raise InputError(f"{file}: not a complete part of a GGUF file ({error})") from None
        if split != {"no": number, "count": count}:
            raise InputError(f"{file}: is part {split['no'] + 1} of {split['count']}, expected {number + 1} of {count}")
        return reader

    def __str__(self) -> str:
        return str(self.path)

    @_raises_input_error
    def field(self, key: str, default: Any = None) -> Any:
        """Returns a metadata value; "{}" in the key is replaced by the architecture."""
        key = key.format(getattr(self, "family", ""))
        return self.reader.fields[key].contents() if key in self.reader.fields else default

    def names(self) -> list[str]:
        """Returns the Hugging Face names of the weights."""
        return [name for name in self.tensors if name != "rope_freqs.weight"]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns a tensor's shape in Hugging Face order."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    @_raises_input_error
    def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
        """Returns a dequantized float32 slice in Hugging Face layout."""
        tensor = self.tensors[name]
        heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}
        projection = next((part for part in heads if f"{part}.weight" in name), None)
        if projection and self.family == "llama":
            # llama.cpp interleaves the halves of each head's rotary dimensions; heads stay contiguous.
            rows = self._dequantize(tensor, slices[0])
            count = self.field("{}." + heads[projection]) or self.field("{}.attention.head_count")
            head_dim = self.shape(name)[0] // count
            rows = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
            return rows[(slice(None), *slices[1:])]
        return self._dequantize(tensor, slices[0])[(slice(None), *slices[1:])]

    @staticmethod
    def _dequantize(tensor, rows):
        data = np.asarray(tensor.data[rows])  # operations on a np.memmap are slow
        if tensor.data.dtype != np.uint8:  # not quantized
            return np.asarray(gguf.dequantize(data, tensor.tensor_type), np.float32)
        # gguf converts 16 rows at a time: longer ones, of whole blocks, take a fraction of the time.
        joined = math.gcd(len(data), _JOINED_ROWS)
        values = gguf.dequantize(data.reshape(len(data) // joined, -1), tensor.tensor_type)
        return np.asarray(values, np.float32).reshape(len(data), -1)


@_raises_input_error
def read_architecture(source: GGUFSource) -> architecture_lib.Architecture:
    """Returns the architecture that the metadata describes."""
    field = source.field

    def required(key):
        value = field(key)
        if value is None:
            raise InputError(f"{source}: metadata {key.format(source.family)} is missing")
        return value

    hidden, heads = required("{}.embedding_length"), required("{}.attention.head_count")
    head_dim, scaling = field("{}.attention.key_length", hidden // heads), field("{}.rope.scaling.type")
    config = {
        "model_type": source.family,
        "vocab_size": source.shape("model.embed_tokens.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": required("{}.feed_forward_length"),
        "num_hidden_layers": required("{}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": field("{}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        # GGUF stores float32: 1e-5 is read as 9.999999747378752e-06. The shortest decimal restores 1e-5.
        "rms_norm_eps": float(str(np.float32(required("{}.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(field("{}.rope.freq_base", 10000.0)),
        "rope_scaling": None if scaling in (None, "none") else {"rope_type": scaling},
        "partial_rotary_factor": field("{}.rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": "lm_head.weight" not in source.tensors,
        "max_position_embeddings": field("{}.context_length"),
    }
    architecture = architecture_lib.from_hf_config(config, source)
    if "rope_freqs.weight" in source.tensors:
        scaling = _llama3_scaling(source, architecture)
        architecture = dataclasses.replace(architecture, rope_scaling=scaling)
    return architecture


def _llama3_scaling(source, architecture):
    """Returns the Llama 3 scaling that matches the frequency factors; GGUF stores only the factors."""
    stored = np.asarray(source.tensors["rope_freqs.weight"].data, np.float32).ravel()
    half = np.arange(0, architecture.head_dim, 2) / architecture.head_dim
    ratio = 8192 / (2 * np.pi * architecture.rope_theta**half)
    blend = np.clip((ratio - 1.0) / (4.0 - 1.0), 0, 1)
    for factor in _LLAMA3_FACTORS:
        if np.allclose(stored, 1 / (blend + (1 - blend) / factor), rtol=1e-3):
            return architecture_lib.RopeScaling(factor, 1.0, 4.0, 8192)
    raise InputError(f"{source}: rope_freqs.weight is not a known Llama 3 scaling")


@_raises_input_error
def read_tokenizer(source: GGUFSource) -> PreTrainedTokenizerFast:
    """Returns a transformers tokenizer built from the metadata (byte-level BPE)."""
    field = source.field
    if (model := field("tokenizer.ggml.model")) != "gpt2":
        raise InputError(f"{source}: tokenizer.ggml.model={model!r}; only gpt2 (BPE) is supported")
    if field("tokenizer.ggml.add_space_prefix"):
        raise InputError(f"{source}: tokenizer.ggml.add_space_prefix=True is not supported")
    kind = _pre_tokenization(source)
    backend = _backend(source, kind)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*_PRE_TOKENIZERS[kind], byte_level])
    backend.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    names = {}
    for hf_name, gguf_name in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        id_ = field(f"tokenizer.ggml.{gguf_name}_token_id")
        names[f"{hf_name}_token"] = None if id_ is None else backend.id_to_token(id_)
        if id_ is not None and names[f"{hf_name}_token"] is None:
            raise InputError(f"{source}: tokenizer.ggml.{gguf_name}_token_id={id_} is not the id of a token")
    if kind == "qwen2" and field("tokenizer.ggml.add_bos_token") is False:
        names["bos_token"] = None  # converters copy the id from config.json, but these tokenizers have no BOS
    added = {end: names[f"{end}_token"] for end in ("bos", "eos") if field(f"tokenizer.ggml.add_{end}_token", False)}
    if kind == "llama-bpe" and names["bos_token"] and field("tokenizer.ggml.add_bos_token") is None:
        added["bos"] = names["bos_token"]
    for end, token in added.items():
        if token is None:
            raise InputError(f"{source}: tokenizer.ggml.add_{end}_token is set, but {end}_token_id is missing")
    if added:
        single = " ".join(filter(None, [added.get("bos"), "$A", added.get("eos")]))
        special = [(token, backend.token_to_id(token)) for token in {*added.values()}]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_chat_template(source),
        model_max_length=field("{}.context_length"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _pre_tokenization(source):
    """Returns a key of _PRE_TOKENIZERS. Raises InputError if it is unknown, because ids would be wrong."""
    kind = source.field("tokenizer.ggml.pre")
    if kind in (None, "default"):  # "default": unknown to the converter
        kind = _FAMILY_PRE_TOKENIZERS.get(source.family, kind)
    if kind in _PRE_TOKENIZERS:
        return kind
    problem = "is missing" if kind is None else f"is {kind!r}"
    raise InputError(
        f"{source}: tokenizer.ggml.pre (the pre-tokenization) {problem}; supported: {', '.join(_PRE_TOKENIZERS)}. "
        "Convert the model again, set it with gguf-new-metadata --pre-tokenizer, or pass the Hugging Face folder"
    )


def _backend(source, kind):
    """Returns a tokenizers.Tokenizer with the tokens, their types and merges, without pre-tokenization."""
    tokens, types = (source.field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if tokens is None or types is None or len(tokens) != len(types):
        raise InputError(f"{source}: tokenizer.ggml.tokens or tokenizer.ggml.token_type is missing or too short")
    known = {type_.value for type_ in gguf.TokenType}
    if unknown := [type_ for type_ in types if type_ not in known]:
        raise InputError(f"{source}: tokenizer.ggml.token_type {unknown[0]} is not supported")
    # GGUF cannot store an empty list: the merges of a byte-only tokenizer are missing.
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges", [])]
    normal = {token: i for i, token in enumerate(tokens) if types[i] not in (*_ADDED, gguf.TokenType.UNUSED)}
    # id -> (token, whether it is special)
    added = {i: (token, _ADDED[types[i]]) for i, token in enumerate(tokens) if types[i] in _ADDED}
    # Added tokens after all others get consecutive ids; in any other position they must be in the vocabulary.
    at_end = sorted(added) == list(range(len(normal), len(normal) + len(added)))
    vocabulary = normal if at_end else normal | {token: i for i, (token, _) in added.items()}
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise InputError(f"{source}: tokenizer.ggml.merges has {' '.join(merge)!r}, not made of its tokens")
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe"))
    for i, (token, special) in sorted(added.items()):
        added_token = AddedToken(token, normalized=False, special=special)
        backend.add_special_tokens([added_token]) if special else backend.add_tokens([added_token])
        if backend.token_to_id(token) != i:
            raise InputError(f"{source}: tokenizer.ggml.tokens: {token!r} is empty or a duplicate")
    return backend


def _chat_template(source):
    """Returns the chat template, {name: template} if there are named ones, or None."""
    names = source.field("tokenizer.chat_templates", [])
    named = {name: source.field(f"tokenizer.chat_template.{name}") for name in names}
    default = source.field("tokenizer.chat_template")
    if not any(named.values()):
        return default
    return {name: text for name, text in {**named, "default": default}.items() if text}


@_raises_input_error
def stop_ids(source: GGUFSource) -> list[int]:
    """Returns the ids that end a turn."""
    ids = [source.field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return [id_ for id_ in ids if id_ is not None]


def _hf_name(name):
    stem, _, suffix = name.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"model.layers.{layer}."
    return f"{prefix}{_NAMES[stem]}.{suffix}" if stem in _NAMES else None
