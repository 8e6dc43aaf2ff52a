"""Reads and writes the model directory of the published PyTorch package (llm2vec-gen 0.1.3), with numpy arrays.

    run_config.yml                         backbone, dtype, special tokens (in a training run: one level up)
    encoder_decoder_config.json            encoding mode: number of last tokens that the heads read
    encoder/adapter_config.json            ids of the trained rows of the embedding matrix
    encoder/adapter_model.safetensors      trained rows and LoRA matrices, if any
    encoder/config.json                    the backbone's config
    reconstruction_mlp, alignment_mlp      the heads as torch files, and *.safetensors: float32 copies
    tokenizer.json, tokenizer_config.json  the backbone's tokenizer with the special tokens added
    llm2vec_gen_jax.json                   metadata of this package, ignored by the published package
    config_sentence_transformers.json      prompts by name, ignored by the published package

Dimensions: M special tokens, of which the heads read K, D hidden size, E embedding size.
"""

import dataclasses
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
import tokenizers
import yaml
from transformers import PreTrainedTokenizerFast

from llm2vec_gen_jax.common import files, yaml_files
from llm2vec_gen_jax.common.errors import InputError, quote
from llm2vec_gen_jax.formats import torchzip
from llm2vec_gen_jax.model.compressor import HEADS

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "encoder/adapter_config.json", "encoder/adapter_model.safetensors"
PROMPTS, METADATA = "config_sentence_transformers.json", "llm2vec_gen_jax.json"
TEACHER = "teacher"
TOKENS_KEY = re.compile(r"base_model\.model\.(.+\.)?embed_tokens\.(token_adapter\.)?trainable_tokens_delta")
# peft also saves the backbone's embedding matrix if it detects that the vocabulary grew.
IGNORED_KEY = re.compile(r"base_model\.model\.(.+\.)?embed_tokens\.(token_adapter\.)?base_layer\.weight")
LORA_KEY = re.compile(r"base_model\.model\..+\.lora_[AB]\.weight")
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclasses.dataclass
class PublishedModel:
    """Contents of a model directory. Arrays are float32."""

    backbone: str  # a folder or a hub id
    dtype: str  # of backbone and heads in PyTorch: float32 | bfloat16 | float16
    special_tokens: list[str]  # M thought tokens, then compression tokens
    num_tokens: int  # K
    tokens_MD: np.ndarray  # embeddings of special_tokens, in that order
    reconstruction: dict[str, np.ndarray]  # kernel (D, D) [in, out], bias (D,)
    alignment: dict[str, np.ndarray]  # kernel (D, E) [in, out], bias (E,)
    lora: dict | None = None  # {"config": adapter_config.json, "tensors": {key on disk: array}}
    extra: dict = dataclasses.field(default_factory=dict)  # metadata of this package, if any
    teacher: pathlib.Path | None = None  # folder of the encoder of documents (teachers/documents.py), if any


def read(directory: str | os.PathLike[str]) -> PublishedModel:
    """Reads a local model directory.

    Accepts directories of the published package and of `write`, and snapshots in the Hugging Face cache.
    Raises InputError naming file and key of missing, unknown, inconsistent or non-finite values.
    """
    directory = pathlib.Path(directory)
    _require(directory.is_dir(), directory, "no such directory. Pass the folder that contains encoder/")
    parent = pathlib.Path(os.path.realpath(directory)).parent
    run_path = _find(directory, "run_config.yml") or _find(parent, "run_config.yml")
    _require(run_path, directory, f"no run_config.yml here or in {parent}. Copy it here")
    run = _read_run_config(run_path)
    special_tokens = run["special_tokens"]
    indices, rows_MD, lora = _read_adapter(directory)
    tokenizer_path = _find(directory, "tokenizer.json")
    ids = _token_ids(tokenizer_path, special_tokens) if tokenizer_path else indices
    mismatch = f"trained token ids are {indices}, but the special_tokens of run_config.yml have {ids} in tokenizer.json"
    _require(sorted(ids) == sorted(indices), directory / ADAPTER_CONFIG, mismatch)
    extra_path = _find(directory, METADATA)
    extra = files.read_json(extra_path) if extra_path else {"format_version": FORMAT_VERSION}
    version = extra.pop("format_version", None)
    _require(version == FORMAT_VERSION, extra_path, f"format_version is {version}, expected {FORMAT_VERSION}")
    model = PublishedModel(
        backbone=run["model_name_or_path"],
        dtype=run["torch_dtype"].removeprefix("torch."),
        special_tokens=special_tokens,
        num_tokens=_read_num_tokens(directory, run),
        tokens_MD=rows_MD[[indices.index(token_id) for token_id in ids]],
        **{name: _read_head(directory, f"{name}_mlp") for name in HEADS},
        lora=lora,
        extra=extra,
        teacher=directory / TEACHER if _find(directory, f"{TEACHER}/teacher.json") else None,
    )
    _check(directory, model)
    return model


def write(
    directory: str | os.PathLike[str],
    model: PublishedModel,
    tokenizer: PreTrainedTokenizerFast,
    backbone_config: dict[str, Any],
    card: str,
    others: Mapping[str, str] | None = None,
    write_teacher: Callable[[pathlib.Path], None] | None = None,
) -> None:
    """Writes `model` atomically as a new directory that the published package loads.

    tokenizer: of the backbone, with or without the special tokens; not modified.
    backbone_config: config.json of the backbone, with the keys of transformers 4 or 5.
    card: the text of README.md. others: {name: text} of further files, which the published package ignores.
    write_teacher: writes the encoder of documents to a new folder; default: model.teacher is copied, if there is one.
    Raises InputError if the directory exists or the parts of the model are inconsistent.
    """
    directory = pathlib.Path(directory)
    _require(not os.path.lexists(directory), directory, "already exists. Remove it or choose another name")
    _check(directory, model)
    size, width = backbone_config.get("hidden_size"), model.tokens_MD.shape[1]
    _require(size == width, model.backbone, f"hidden_size is {size}, but the special tokens have size {width}")
    ids, vocab_size = special_token_ids(tokenizer, model.special_tokens)
    run = {
        "model_name_or_path": model.backbone,
        "torch_dtype": model.dtype,
        "special_tokens": list(model.special_tokens),
        "encoding_mode": f"last_{model.num_tokens}_tokens",
        "tokenizer_padding_side": "left",
    }
    with files.atomic_directory(directory) as folder:
        (folder / "encoder").mkdir()
        _write_encoder(folder, model, backbone_config, ids, vocab_size)
        for name in HEADS:
            _write_head(folder / f"{name}_mlp", getattr(model, name), model.dtype)
        mode = {"encoding_mode": run["encoding_mode"], "save_decoder": False}
        files.write_json(folder / "encoder_decoder_config.json", mode)
        files.write_text(folder / "run_config.yml", yaml_files.to_yaml(run))
        write_tokenizer(folder, tokenizer, model.special_tokens)
        files.write_json(folder / METADATA, {**model.extra, "format_version": FORMAT_VERSION})
        for name, text in {"README.md": card, **(others or {})}.items():
            files.write_text(folder / name, text)
        if write_teacher:
            write_teacher(folder / TEACHER)
        elif model.teacher:
            shutil.copytree(model.teacher, folder / TEACHER)


def _require(condition, place, message):
    if not condition:
        raise InputError(f"{place}: {message}")


def _require_shape(path, key, value, shape):
    _require(value.shape == shape, path, f"{key} has shape {value.shape}, expected {shape}")


def _find(directory, name, required=False):
    """Returns the path of a file of the directory, or None. Raises InputError for a link out of the directory."""
    root, target = (pathlib.Path(os.path.realpath(path)) for path in (directory, directory / name))
    # In the Hugging Face cache, files in snapshots/REVISION/ are links to blobs/, two levels up.
    blobs = root.parent.parent / "blobs" if root.parent.name == "snapshots" else root
    inside = target.is_relative_to(root) or target.is_relative_to(blobs)
    _require(inside, directory / name, f"points outside the directory, to {target}. Copy the file here")
    exists = target.is_file()
    _require(exists or not required, directory / name, "no such file. Download or export the directory again")
    return directory / name if exists else None


def read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns {key: array} of a safetensors file. Raises InputError naming a file that is none."""
    files.check_file(path)
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            return {key: file.get_tensor(key) for key in file.keys() if not IGNORED_KEY.fullmatch(key)}
    except (safetensors.SafetensorError, OSError, AttributeError) as error:  # AttributeError: no such numpy dtype
        raise InputError(f"{path}: not a readable safetensors file ({error}). Download it again") from None


def write_safetensors(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes {key: array} with the metadata of PyTorch's libraries."""
    # save_file would create a file that only its owner can read.
    path.write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))


def _read_run_config(path):
    """Returns the strings of run_config.yml and its list of special_tokens. The last of duplicate keys is used.

    BaseLoader constructs only strings, lists and dicts, and ignores tags such as !!python/object.
    """
    files.check_file(path, largest=yaml_files.LARGEST_YAML)
    try:
        run = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid YAML ({' '.join(str(error).split())})") from None
    _require(isinstance(run, dict), path, f"expected lines of `key: value`, found {type(run).__name__}")
    # Nested values are unused, and aliases could make them too large to print.
    strings = {key: value for key, value in run.items() if isinstance(value, str)}
    for key in ("model_name_or_path", "torch_dtype"):
        # The published package writes null as "None".
        is_set = strings.get(key) not in (None, "", "None", "null", "~")
        _require(is_set, path, f"{key} is missing or null. Add a line `{key}: ...`")
    tokens = run.get("special_tokens")
    are_tokens = isinstance(tokens, list) and all(isinstance(token, str) for token in tokens)
    _require(are_tokens, path, "special_tokens is missing or not a list of tokens")
    return strings | {"special_tokens": tokens}


def _read_num_tokens(directory, run):
    """Returns K from the encoding mode in encoder_decoder_config.json, otherwise in run_config.yml, as in PyTorch."""
    path = _find(directory, "encoder_decoder_config.json")
    config = files.read_json(path) if path else {}
    _require(not config.get("save_decoder"), path, "save_decoder is true: a second decoder is not supported")
    mode = config.get("encoding_mode", run.get("encoding_mode", "last_10_tokens"))
    match = re.fullmatch(r"last_([0-9]{1,9})_tokens", str(mode))
    _require(match, path or directory, f"encoding_mode is {mode!r}, expected last_N_tokens with a number N")
    return int(match[1])


def prompts_file(prompts: Mapping[str, str]) -> str:
    """Returns the text of config_sentence_transformers.json, where prompts end with the space before a text."""
    config = {
        "model_type": "SentenceTransformer",
        "prompts": {name: f"{text} " if text else "" for name, text in prompts.items()},
        "similarity_fn_name": "cosine",
    }
    return json.dumps(config, indent=2)


def read_prompts(directory: str | os.PathLike[str]) -> dict[str, str]:
    """Returns the prompts in config_sentence_transformers.json without their last space, {} if there is no such file.

    A prompt that does not end with a space is ignored with a warning: LLM2VecGen puts one between prompt and text.
    Raises InputError naming file and key of a prompt that is not a text.
    """
    path = _find(pathlib.Path(directory), PROMPTS)
    saved = (files.read_json(path).get("prompts") if path else None) or {}
    _require(isinstance(saved, dict), path, f"prompts is {saved!r:.100}, expected names and texts")
    prompts = {}
    for name, text in saved.items():
        key = f"prompts[{quote(name)}]"
        is_text = isinstance(text, str | None) and not files.has_lone_surrogate(name + (text or ""))
        _require(is_text, path, f"{key} is {text!r:.100}, expected a text. Correct it, or pass prompts=")
        if text and not text.endswith(" "):
            logger.warning(f"{path}: {key} is ignored, because it does not end with a space. Pass prompts=")
        elif text is not None:
            prompts[name] = text.removesuffix(" ")
    return prompts


def _token_ids(path, special_tokens):
    """Returns the id of each special token in tokenizer.json."""
    fields = files.read_json(path)
    try:
        ids = {token["content"]: int(token["id"]) for token in fields["added_tokens"]}
    except (KeyError, TypeError, ValueError, OverflowError):  # OverflowError: an id of 1e999
        raise InputError(f"{path}: added_tokens must be a list of tokens with content and id") from None
    for token in special_tokens:
        _require(token in ids, path, f"the special token {token!r} of run_config.yml is missing in added_tokens")
    return [ids[token] for token in special_tokens]


def _read_adapter(directory):
    """Returns (token ids, embeddings (M, D), LoRA or None) in the order of the adapter."""
    path = _find(directory, ADAPTER_CONFIG, required=True)
    config = files.read_json(path)
    kind = config.get("peft_type")
    _require(kind in ("TRAINABLE_TOKENS", "LORA"), path, f"peft_type is {kind!r}, expected TRAINABLE_TOKENS or LORA")
    field = "trainable_token_indices" if kind == "LORA" else "token_indices"
    indices = config.get(field)
    if isinstance(indices, dict):
        indices = indices.get("embed_tokens")
    are_ids = isinstance(indices, list) and all(isinstance(index, int) for index in indices)
    _require(are_ids, path, f"{field} is {indices!r}, expected the ids of the special tokens")

    path = _find(directory, ADAPTER_WEIGHTS, required=True)
    tensors = {key: value.astype(np.float32) for key, value in read_safetensors(path).items()}
    keys = [key for key in tensors if TOKENS_KEY.fullmatch(key)]
    _require(len(keys) == 1, path, f"found {len(keys)} tensors ...embed_tokens.trainable_tokens_delta, expected 1")
    rows_MD = tensors.pop(keys[0])
    _require(kind == "LORA" or not tensors, path, f"unexpected tensor {next(iter(tensors), None)}")
    _require_shape(path, keys[0], rows_MD, (len(indices), *rows_MD.shape[1:]))
    return indices, rows_MD, {"config": config, "tensors": tensors} if kind == "LORA" else None


def _write_encoder(folder, model, backbone_config, ids, vocab_size):
    """Writes encoder/: the trained rows, and the backbone's config as the published training writes it."""
    original = vocab_size - len(ids)
    config = dict(backbone_config)
    config["num_tokens"] = max(config.get("vocab_size", original), original) + len(ids)
    config |= {"num_special_tokens": len(ids), "special_tokens_ids": ids, "torch_dtype": model.dtype}
    # The published package resizes the embedding matrix to the tokenizer: vocab_size is its number of rows.
    config |= {"tokenizer_original_num_tokens": original, "vocab_size": vocab_size}
    files.write_json(folder / "encoder/config.json", config)

    rows_MD = np.ascontiguousarray(model.tokens_MD, np.float32)
    adapter = {"base_model_name_or_path": model.backbone, "inference_mode": True, "auto_mapping": None}
    if config.get("architectures"):
        adapter["auto_mapping"] = {
            "base_model_class": config["architectures"][0].replace("ForCausalLM", "Model"),
            "parent_library": "transformers.models.{0}.modeling_{0}".format(config["model_type"]),
        }
    if model.lora is None:
        adapter |= {"peft_type": "TRAINABLE_TOKENS", "target_modules": "embed_tokens", "token_indices": ids}
        tensors = {"base_model.model.embed_tokens.trainable_tokens_delta": rows_MD}
    else:
        adapter = model.lora["config"] | adapter
        adapter |= {"peft_type": "LORA", "trainable_token_indices": {"embed_tokens": ids}}
        matrices = model.lora["tensors"].items()
        tensors = {key: np.ascontiguousarray(value, np.float32) for key, value in matrices}
        tensors["base_model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = rows_MD
    files.write_json(folder / ADAPTER_CONFIG, adapter)
    write_safetensors(folder / ADAPTER_WEIGHTS, tensors)


def _read_head(directory, name):
    """Returns {"kernel": (in, out), "bias": (out,)} of a head, from its safetensors copy if there is one."""
    archive, copy = _find(directory, name), _find(directory, f"{name}.safetensors")
    _require(archive or copy, directory / name, "no such file. Download or export the directory again")
    tensors, config = torchzip.read(archive) if archive else ({}, {})
    for field, supported in (("size", 1), ("pooling_mode", "linear")):
        value = config.get(field, supported)
        _require(value == supported, archive, f"{field} is {value!r}, expected {supported!r}")
    if copy:
        rounded, tensors = tensors, read_safetensors(copy)
        # PyTorch saves only the torch file, so a copy that differs is out of date.
        for key, value in rounded.items():
            is_equal = key in tensors and tensors[key].astype(value.dtype).tobytes() == value.tobytes()
            _require(is_equal, copy, f"{key} differs from {name}. Remove the file that is out of date")
    names, expected = sorted(tensors), ["projection.bias", "projection.weight"]
    _require(names == expected, copy or archive, f"found tensors {names}, expected {expected}")
    bias, weight = (tensors[key].astype(np.float32) for key in expected)
    return {"kernel": np.ascontiguousarray(weight.T), "bias": bias}


def _write_head(path, head, dtype):
    bias, weight = (np.ascontiguousarray(array, np.float32) for array in (head["bias"], head["kernel"].T))
    exact = {"projection.weight": weight, "projection.bias": bias}
    # The torch file has the backbone's dtype, so bfloat16 and float16 are rounded; the safetensors copy is float32.
    rounded = {key: value.astype(DTYPES[dtype]) for key, value in exact.items()}
    for key, value in rounded.items():
        _require(np.isfinite(value).all(), path.name, f"{key} has values too large for {dtype}. Use float32")
    config = {"input_dim": weight.shape[1], "output_dim": weight.shape[0], "dtype": f"torch.{dtype}"}
    torchzip.write(path, rounded, config | {"size": 1, "pooling_mode": "linear"})
    write_safetensors(path.with_suffix(".safetensors"), exact)


def _check(directory, model):
    """Raises InputError naming file and key unless the parts of the model are finite and consistent."""
    tokens, (count, width) = model.special_tokens, (len(model.special_tokens), model.tokens_MD.shape[-1])
    path = directory / "run_config.yml"
    _require(model.dtype in DTYPES, path, f"torch_dtype is {model.dtype!r}, supported: {', '.join(DTYPES)}")
    _require(all(tokens) and len(set(tokens)) == count, path, f"special_tokens {tokens} repeat or are empty")
    mode = f"encoding_mode reads the last {model.num_tokens} of {count} special tokens"
    _require(1 <= model.num_tokens <= count, directory / "encoder_decoder_config.json", mode)
    parts = [(ADAPTER_WEIGHTS, "trainable_tokens_delta", model.tokens_MD, (count, width))]
    for name, size in (("reconstruction", width), ("alignment", model.alignment["bias"].size)):
        head = getattr(model, name)  # the file stores the weight as (out, in)
        parts.append((f"{name}_mlp", "projection.weight", head["kernel"].T, (size, width)))
        parts.append((f"{name}_mlp", "projection.bias", head["bias"], (size,)))
    for key, value in model.lora["tensors"].items() if model.lora else ():
        _require(LORA_KEY.fullmatch(key), directory / ADAPTER_WEIGHTS, f"unexpected tensor {key}")
        parts.append((ADAPTER_WEIGHTS, key, value, value.shape))
    for file, key, value, shape in parts:
        _require_shape(directory / file, key, value, shape)
        _require(np.isfinite(value).all(), directory / file, f"{key} contains NaN or infinity")


def special_token_ids(tokenizer: PreTrainedTokenizerFast, special_tokens: Sequence[str]) -> tuple[list[int], int]:
    """Returns (ids of the special tokens, size of the vocabulary) after the tokens are added."""
    backend = _with_tokens(tokenizer, special_tokens)
    return [backend.token_to_id(token) for token in special_tokens], backend.get_vocab_size()


def _with_tokens(tokenizer, special_tokens):
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.no_padding()
    backend.no_truncation()
    added = [tokenizers.AddedToken(token, special=True, normalized=False) for token in special_tokens]
    backend.add_special_tokens(added)
    return backend


def write_tokenizer(
    folder: pathlib.Path, tokenizer: PreTrainedTokenizerFast, special_tokens: Sequence[str] = (), append: bool = False
) -> None:
    """Writes tokenizer.json and tokenizer_config.json, with the special tokens added, for transformers 4 and 5.

    append: the tokenizer appends the special tokens to every text, which it truncates to leave room for them, and
    tokenizes a control token that occurs in a text as plain text.
    Not `save_pretrained`: transformers 4.56 does not support the class name and the list of extra tokens that 5 saves,
    and neither saves the padding side, on which every vector of the published package depends.
    """
    backend = _with_tokens(tokenizer, special_tokens)
    fields = json.loads(backend.to_str())
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "padding_side": "left",
        # Without it the published generate() passes token_type_ids, which its models do not accept.
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False,
        # No others: the published encode() appends every token of this list to each text.
        "additional_special_tokens": list(special_tokens),
        "added_tokens_decoder": {str(token.pop("id")): token for token in map(dict, fields["added_tokens"])},
    }
    config |= {name: str(token) for name in NAMED_TOKENS if (token := getattr(tokenizer, name, None))}
    # The published training pads with the end-of-text token if there is no pad token.
    config.setdefault("pad_token", config.get("eos_token"))
    _require(config["pad_token"], "tokenizer", "no pad_token and no eos_token. Set one of them")
    if isinstance(template := tokenizer.chat_template, dict):
        template = [{"name": name, "template": text} for name, text in template.items()]
    config |= {"chat_template": template} if template else {}
    if append:
        ids = [backend.token_to_id(token) for token in special_tokens]
        fields["post_processor"] = _appending(fields["post_processor"], special_tokens, ids)
        config["split_special_tokens"] = True
    files.write_json(folder / "tokenizer.json", fields)
    files.write_json(folder / "tokenizer_config.json", config)


def _appending(processor, tokens, ids):
    """Returns the post-processor of a tokenizer.json, or None, with the tokens appended to every text."""
    processors = processor["processors"] if processor and processor["type"] == "Sequence" else [processor]
    processors = [part for part in processors if part]
    templates = [part for part in processors if part["type"] == "TemplateProcessing"]
    if not templates:
        first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        plain = {"single": [first], "pair": [first, second], "special_tokens": {}}
        processors += (templates := [{"type": "TemplateProcessing", **plain}])
    template = templates[-1]
    for key in ("single", "pair"):
        template[key] = template[key] + [{"SpecialToken": {"id": token, "type_id": 0}} for token in tokens]
    template["special_tokens"] |= {
        token: {"id": token, "ids": [number], "tokens": [token]} for token, number in zip(tokens, ids)
    }
    return {"type": "Sequence", "processors": processors}
