"""GGUF files: architecture, dequantised weights under Hugging Face names, and the tokenizer, without torch."""

import dataclasses
import functools
import pathlib
import re

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
# How a text is split before byte-pair merges, by `tokenizer.ggml.pre`.
_SPLITS = {
    "gpt-2": [],
    "smollm": [pre_tokenizers.Digits(individual_digits=True)],
    "llama-bpe": [pre_tokenizers.Split(Regex(_WORDS + "{1,3}" + _REST), "isolated")],
    "qwen2": [pre_tokenizers.Split(Regex(_WORDS + _REST), "isolated")],
}
# What files of unknown or old converters leave out: all models of these families split their texts in one way.
_FAMILY_SPLITS = {"qwen2": "qwen2", "qwen3": "qwen2"}
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
# Token types of tokens that are found in a text as they are, before it is split: whether they are special.
_ADDED = {gguf.TokenType.UNKNOWN: True, gguf.TokenType.CONTROL: True, gguf.TokenType.USER_DEFINED: False}
_LLAMA3_FACTORS = (8.0, 32.0)  # Llama 3.1, Llama 3.2


def _damage_named(function):
    """Decorates what reads a GGUFSource: whatever damage makes of the reader becomes an InputError that names it."""

    @functools.wraps(function)
    def read(source, *arguments):
        try:
            return function(source, *arguments)
        except InputError:
            raise
        except FileNotFoundError:
            raise InputError(f"{source}: no such file") from None
        except Exception as error:
            raise InputError(f"{source}: not a whole GGUF file ({error})") from None

    return read


class GGUFSource:
    """A GGUF file as a source of weights (see weights.py)."""

    @_damage_named
    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.reader = gguf_file.GGUFFile(path)
        self.family = self.field("general.architecture")
        self.tensors = {}
        for part in [self.reader, *self._further_parts()]:
            for tensor in part.tensors:
                name = _hf_name(tensor.name)
                if name is None and tensor.name != "rope_freqs.weight":
                    raise InputError(f"{self}: tensor {tensor.name} is not supported")
                if (name or tensor.name) in self.tensors:
                    raise InputError(f"{self}: tensor {tensor.name} is there twice")
                self.tensors[name or tensor.name] = tensor
        expected = self.field("split.tensors.count", len(self.tensors))
        if expected != len(self.tensors):
            raise InputError(f"{self}: its parts hold {len(self.tensors)} tensors, split.tensors.count is {expected}")

    def _further_parts(self):
        """Returns the readers of parts 2 to N of a model in N files, of which this is the first."""
        count, number = self.field("split.count", 1), self.field("split.no", 0)
        if count <= 1:
            return []
        match = _PART.fullmatch(self.path.name)
        merged = "or merge the parts: llama-gguf-split --merge FIRST-PART MERGED.gguf"
        if match is None or int(match[3]) != count or int(match[2]) != number + 1:
            raise InputError(
                f"{self}: is part {number + 1} of {count}, which its name must end in: "
                f"NAME-{number + 1:05}-of-{count:05}.gguf; rename it {merged}"
            )
        files = [self.path.with_name(f"{match[1]}-{part:05}-of-{count:05}.gguf") for part in range(1, count + 1)]
        if number != 0:
            raise InputError(f"{self}: is part {number + 1} of {count}; give the first one, {files[0]}, {merged}")
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{self}: of its {count} parts {missing[0]} is missing; put it beside the first one")
        return [self._part(file, part, count) for part, file in enumerate(files)][1:]

    @staticmethod
    def _part(file, number, count):
        try:
            reader = gguf_file.GGUFFile(file)
            found = {key: reader.fields[f"split.{key}"].contents() for key in ("no", "count")}
        except Exception as error:
            raise InputError(f"{file}: not a whole part of a GGUF file ({error})") from None
        if found != {"no": number, "count": count}:
            raise InputError(f"{file}: is part {found['no'] + 1} of {found['count']}, expected {number + 1} of {count}")
        return reader

    def __str__(self):
        return str(self.path)

    @_damage_named
    def field(self, key, default=None):
        """Returns a metadata value; "{}" in the key stands for the architecture."""
        key = key.format(getattr(self, "family", ""))
        return self.reader.fields[key].contents() if key in self.reader.fields else default

    def names(self):
        """Returns the Hugging Face names of the weights."""
        return [name for name in self.tensors if name != "rope_freqs.weight"]

    def shape(self, name):
        """Returns a tensor's shape in Hugging Face order."""
        return tuple(int(size) for size in reversed(self.tensors[name].shape))

    @_damage_named
    def read(self, name, slices):
        """Returns a dequantised float32 slice in Hugging Face layout."""
        tensor = self.tensors[name]
        heads = {"q_proj": "attention.head_count", "k_proj": "attention.head_count_kv"}
        projection = next((part for part in heads if f"{part}.weight" in name), None)
        if projection and self.family == "llama":
            # llama.cpp interleaves the halves of each head's rotary dimensions; whole heads stay contiguous.
            rows = self._dequantise(tensor, slices[0])
            head_dim = self.shape(name)[0] // self.field("{}." + heads[projection])
            rows = rows.reshape(-1, head_dim // 2, 2, rows.shape[-1]).swapaxes(1, 2).reshape(rows.shape)
            return rows[(slice(None), *slices[1:])]
        return self._dequantise(tensor, slices[0])[(slice(None), *slices[1:])]

    @staticmethod
    def _dequantise(tensor, rows):
        return np.asarray(gguf.dequantize(tensor.data[rows], tensor.tensor_type), np.float32)


@_damage_named
def read_architecture(source):
    """Returns (Architecture, Hugging Face config dict) of a GGUFSource."""
    f = functools.partial(source.field)

    def need(key):
        value = f(key)
        if value is None:
            raise InputError(f"{source}: metadata {key.format(source.family)} is missing")
        return value

    hidden, heads = need("{}.embedding_length"), need("{}.attention.head_count")
    head_dim, scaling = f("{}.attention.key_length", hidden // heads), f("{}.rope.scaling.type")
    config = {
        "model_type": source.family,
        "vocab_size": source.shape("model.embed_tokens.weight")[0],
        "hidden_size": hidden,
        "intermediate_size": need("{}.feed_forward_length"),
        "num_hidden_layers": need("{}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": f("{}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        # GGUF stores float32: 1e-5 reads as 9.999999747378752e-06. The shortest decimal is what was meant.
        "rms_norm_eps": float(str(np.float32(need("{}.attention.layer_norm_rms_epsilon")))),
        "rope_theta": float(f("{}.rope.freq_base", 10000.0)),
        "rope_scaling": None if scaling in (None, "none") else {"rope_type": scaling},
        "partial_rotary_factor": f("{}.rope.dimension_count", head_dim) / head_dim,
        "tie_word_embeddings": "lm_head.weight" not in source.tensors,
    }
    architecture = architecture_lib.from_hf_config(config, source)
    if "rope_freqs.weight" in source.tensors:
        scaling = _llama3_scaling(source, architecture)
        architecture = dataclasses.replace(architecture, rope_scaling=scaling)
    return architecture, architecture_lib.to_hf_config(architecture)


def _llama3_scaling(source, architecture):
    """Finds the Llama 3 scaling whose frequency factors the file holds (GGUF keeps the factors only)."""
    stored = np.asarray(source.tensors["rope_freqs.weight"].data, np.float32).ravel()
    half = np.arange(0, architecture.head_dim, 2) / architecture.head_dim
    ratio = 8192 / (2 * np.pi * architecture.rope_theta**half)
    blend = np.clip((ratio - 1.0) / (4.0 - 1.0), 0, 1)
    for factor in _LLAMA3_FACTORS:
        if np.allclose(stored, 1 / (blend + (1 - blend) / factor), rtol=1e-3):
            return architecture_lib.RopeScaling(factor, 1.0, 4.0, 8192)
    raise InputError(f"{source}: rope_freqs.weight is not a known Llama 3 scaling")


@_damage_named
def read_tokenizer(source):
    """Returns the transformers tokenizer that the metadata describes (byte-level BPE)."""
    f = source.field
    if f("tokenizer.ggml.model") != "gpt2":
        raise InputError(f"{source}: tokenizer.ggml.model={f('tokenizer.ggml.model')!r}; only gpt2 (BPE) is supported")
    if f("tokenizer.ggml.add_space_prefix"):
        raise InputError(f"{source}: tokenizer.ggml.add_space_prefix=True is not supported")
    kind = _split_of(source)
    backend = _backend(source, kind)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind in ("gpt-2", "smollm"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([*_SPLITS[kind], byte_level])
    backend.decoder = decoders.ByteLevel()
    if kind == "qwen2":
        backend.normalizer = normalizers.NFC()
    names = {}
    for ours, theirs in {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}.items():
        number = f(f"tokenizer.ggml.{theirs}_token_id")
        names[f"{ours}_token"] = None if number is None else backend.id_to_token(number)
        if number is not None and names[f"{ours}_token"] is None:
            raise InputError(f"{source}: tokenizer.ggml.{theirs}_token_id={number} is not the id of a token")
    if kind == "qwen2" and f("tokenizer.ggml.add_bos_token") is False:
        names["bos_token"] = None  # converters write the number of config.json; these tokenizers have no such token
    added = {end: names[f"{end}_token"] for end in ("bos", "eos") if f(f"tokenizer.ggml.add_{end}_token", False)}
    if kind == "llama-bpe" and names["bos_token"] and f("tokenizer.ggml.add_bos_token") is None:
        added["bos"] = names["bos_token"]
    for end, token in added.items():
        if token is None:
            raise InputError(f"{source}: tokenizer.ggml.add_{end}_token is set, {end}_token_id is missing")
    if added:
        single = " ".join(filter(None, [added.get("bos"), "$A", added.get("eos")]))
        special = [(token, backend.token_to_id(token)) for token in {*added.values()}]
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=_chat_template(source),
        model_max_length=f("{}.context_length"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _split_of(source):
    """Returns the key of _SPLITS of a file. Raises InputError where the file leaves it open: ids would be wrong."""
    kind = source.field("tokenizer.ggml.pre")
    if kind in (None, "default"):  # "default": llama.cpp's guess where the converter did not know
        kind = _FAMILY_SPLITS.get(source.family, kind)
    if kind in _SPLITS:
        return kind
    found = "is missing" if kind is None else f"is {kind!r}"
    raise InputError(
        f"{source}: tokenizer.ggml.pre, the way in which texts are split, {found}; supported: {', '.join(_SPLITS)}. "
        "Convert the model again, set it with gguf-new-metadata --pre-tokenizer, or give the Hugging Face folder"
    )


def _backend(source, kind):
    """Returns the tokenizers.Tokenizer of the tokens, their types and merges; no text is split yet."""
    tokens, types = (source.field(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if tokens is None or types is None or len(tokens) != len(types):
        raise InputError(f"{source}: tokenizer.ggml.tokens or tokenizer.ggml.token_type is missing or too short")
    known = {type_.value for type_ in gguf.TokenType}
    if unknown := [type_ for type_ in types if type_ not in known]:
        raise InputError(f"{source}: tokenizer.ggml.token_type {unknown[0]} is not supported")
    # GGUF cannot hold an empty list: a tokenizer of bytes alone has no merges.
    merges = [tuple(merge.split(" ")) for merge in source.field("tokenizer.ggml.merges", [])]
    normal = {token: i for i, token in enumerate(tokens) if types[i] not in (*_ADDED, gguf.TokenType.UNUSED)}
    # A token of its own text, and whether that is special: not for texts.
    added = {i: (token, _ADDED[types[i]]) for i, token in enumerate(tokens) if types[i] in _ADDED}
    # Added tokens that follow the others get their ids by that; elsewhere they must be in the vocabulary.
    follow = sorted(added) == list(range(len(normal), len(normal) + len(added)))
    vocabulary = normal if follow else normal | {token: i for i, (token, _) in added.items()}
    for merge in merges:
        if len(merge) != 2 or not {*merge, "".join(merge)} <= vocabulary.keys():
            raise InputError(f"{source}: tokenizer.ggml.merges holds {' '.join(merge)!r}, which is not of its tokens")
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=kind == "llama-bpe"))
    for i, (token, special) in sorted(added.items()):
        one = AddedToken(token, normalized=False, special=special)
        backend.add_special_tokens([one]) if special else backend.add_tokens([one])
        if backend.token_to_id(token) != i:
            raise InputError(f"{source}: tokenizer.ggml.tokens holds {token!r} twice, or it is empty")
    return backend


def _chat_template(source):
    """Returns the chat template, {name: template} where there are named ones, or None."""
    names = source.field("tokenizer.chat_templates", [])
    named = {name: source.field(f"tokenizer.chat_template.{name}") for name in names}
    default = source.field("tokenizer.chat_template")
    if not any(named.values()):
        return default
    return {name: text for name, text in {**named, "default": default}.items() if text}


@_damage_named
def stop_ids(source):
    """Returns the ids that end a turn."""
    ids = [source.field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return [number for number in ids if number is not None]


def _hf_name(name):
    stem, _, suffix = name.rpartition(".")
    prefix = ""
    if stem.startswith("blk."):
        _, layer, stem = stem.split(".", 2)
        prefix = f"model.layers.{layer}."
    return f"{prefix}{_NAMES[stem]}.{suffix}" if stem in _NAMES else None
