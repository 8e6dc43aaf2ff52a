"""Model directories: written at the end of training, read by `LLM2VecGen.from_pretrained`."""

import dataclasses
import errno
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax import __version__
from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_json, write_json, write_text
from llm2vec_gen_jax.common.hub import DEFAULT_HUB, HubOptions, fetch_from_hub, is_hub_id, require_no_revision
from llm2vec_gen_jax.formats import peft, published
from llm2vec_gen_jax.model.architecture import to_hf_config
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone, is_local
from llm2vec_gen_jax.pretrained.model_card import is_gguf, model_card

HEADS = published.HEADS
MODELS = ("smollm2-135m", "smollm2-135m-lora")  # trained embedders shipped with the package, in assets/models/
PATTERNS = ["*.json", "*.yml", "*.safetensors", "*.jinja", "*.txt", "reconstruction_mlp", "alignment_mlp"]


def save(
    directory: str | os.PathLike[str],
    model: LLM2VecGenModel,
    trainable: Any,
    backbone: LoadedBackbone,
    extra: Mapping[str, Any],
    dtype: str | None = None,
    special_tokens: list[str] | None = None,
    name: str | os.PathLike[str] | None = None,
    shown: str | None = None,
    prompts: Mapping[str, str] | None = None,
    teacher: pathlib.Path | Callable[[pathlib.Path], None] | None = None,
    revision: str | None = None,
) -> None:
    """Writes a model directory atomically. The directory must not exist.

    Every process of a multi-host run must call it: arrays are gathered one at a time, and process 0 writes them.
    extra: metadata of this package ("config", "data", "metrics"), shown in the model card. dtype: of PyTorch, default
    that of the backbone. special_tokens: texts of the trained tokens, default <question1>, ...
    name: of the backbone in the directory, default as loaded. shown: path or hub id in the examples of the model card,
    default the directory. prompts: {name: text prepended to inputs, with a space}. teacher: folder of the encoder of
    documents, which is copied, or a function that writes it to a new folder. revision: of the backbone on the hub,
    default that of the loaded one, if it has this name.
    """
    dtype = dtype or str(backbone.frozen["embedding"].dtype)
    trainable = jax.tree.map(sharding.gather, trainable)
    if jax.process_index() != 0:
        return
    named = str(name or backbone.name)
    extra = {key: value for key, value in extra.items() if key != "backbone_revision"}
    if revision := revision or (backbone.revision if named == backbone.name else None):
        extra["backbone_revision"] = revision
    record = published.PublishedModel(
        backbone=str(pathlib.Path(named).expanduser().resolve()) if is_local(named) else named,
        dtype=dtype,
        special_tokens=special_tokens or special_token_names(model.num_appended),
        num_tokens=model.num_tokens,
        tokens_MD=trainable["tokens"],
        **{head: dict(trainable[head]) for head in HEADS},
        lora=_lora_record(model, trainable),
        extra={
            **extra,
            "version": __version__,
            "backbone_identity": backbone.identity,
            "tokenizer_identity": backbone.tokenizer.identity,
        },
        teacher=teacher if isinstance(teacher, pathlib.Path) else None,
    )
    # The published package's generate() reads the end tokens from this config.
    backbone_config = to_hf_config(model.architecture) | {"eos_token_id": backbone.tokenizer.stop_ids}
    card = model_card(record, shown or str(directory), backbone.license)
    others = {published.PROMPTS: published.prompts_file(prompts)} if prompts else {}
    if not is_gguf(record.backbone):
        others = _sentence_transformer_files(prompts or {})
    write_teacher = teacher if callable(teacher) else None
    published.write(directory, record, backbone.tokenizer.hf, backbone_config, card, others, write_teacher)


def _sentence_transformer_files(prompts):
    """Returns {name: text} of the files with which `SentenceTransformer(directory)` runs the module in PyTorch."""
    source = pathlib.Path(__file__).parent / "assets" / "llm2vec_gen_module.py"
    modules = [{"idx": 0, "name": "0", "path": "", "type": "llm2vec_gen_module.LLM2VecGenModule"}]
    return {
        source.name: source.read_text(encoding="utf-8"),
        "modules.json": json.dumps(modules, indent=2),
        published.PROMPTS: published.prompts_file(prompts),
    }


def special_token_names(count: int) -> list[str]:
    """Returns the names of `count` trained tokens in the published package."""
    return [f"<question{number}>" for number in range(1, count + 1)]


def local_folder(path: str | os.PathLike[str], hub: HubOptions = DEFAULT_HUB) -> pathlib.Path:
    """Returns the local folder of a model directory: a path, a name of MODELS, or a hub id, which is downloaded.

    Raises InputError if it does not exist, and for a revision of anything but a hub id.
    """
    folder = pathlib.Path(path).expanduser()
    if folder.exists() or str(path) in MODELS:
        require_no_revision(path, hub)
    if folder.exists():
        return folder
    if str(path) in MODELS:
        return pathlib.Path(__file__).parent / "assets" / "models" / str(path)
    if is_hub_id(path):
        return fetch_from_hub(path, PATTERNS, hub)
    raise InputError(f"{path}: no such directory, hub id (OWNER/NAME) or model of this package: {', '.join(MODELS)}")


def read_model_directory(path: str | os.PathLike[str], hub: HubOptions = DEFAULT_HUB) -> published.PublishedModel:
    """Reads a local model directory or a hub repository of that layout."""
    return published.read(local_folder(path, hub))


def backbone_source(
    record: published.PublishedModel, hub: HubOptions, backbone: str | os.PathLike[str] | None = None
) -> tuple[str, HubOptions]:
    """Returns the arguments (path, hub) of `load_backbone` for a model directory.

    hub: that of the model, whose revision does not apply to the backbone. backbone: replaces the recorded one.
    """
    name, revision = str(backbone or record.backbone), record.extra.get("backbone_revision")
    is_recorded = backbone is None and isinstance(revision, str) and is_hub_id(name)
    return name, dataclasses.replace(hub, revision=revision if is_recorded else None)


def to_model(
    record: published.PublishedModel, backbone: LoadedBackbone, source: str | os.PathLike[str]
) -> tuple[LLM2VecGenModel, Any]:
    """Returns (model, trainable tree, replicated on the backbone's mesh) of a PublishedModel.

    source: for errors. Raises InputError if it was trained on another backbone or with another tokenizer.
    """
    identity = record.extra.get("backbone_identity", backbone.identity)
    D = backbone.architecture.hidden_size
    if identity not in (backbone.identity, backbone.former_identity) or record.tokens_MD.shape[1] != D:
        raise InputError(
            f"{source}: was trained on another backbone than {backbone.name} (weights {identity}, hidden size "
            f"{record.tokens_MD.shape[1]}; here {backbone.identity}, {D}). Its backbone is {record.backbone}"
        )
    if record.extra.get("tokenizer_identity", backbone.tokenizer.identity) != backbone.tokenizer.identity:
        raise InputError(f"{source}: was trained with other tokenizer files than those of {backbone.name}")
    thought = len(record.tokens_MD) - record.num_tokens
    trainable = {"tokens": record.tokens_MD, **{head: dict(getattr(record, head)) for head in HEADS}}
    rank, scale = 0, 0.0
    if record.lora:
        config_file = f"{source}/{published.ADAPTER_CONFIG}"
        config = peft.check(record.lora["config"], config_file, ignore=("trainable_token_indices",))
        for key in ("rank_pattern", "alpha_pattern"):
            if config.get(key):
                raise InputError(f"{config_file}: {key} is not supported on the encoder")
        tensors = record.lora["tensors"]
        trainable["lora"] = peft.read(tensors, config, backbone.architecture, source, folded=False)
        rank, scale = config["r"], peft.scale_of(config, config["r"], config["lora_alpha"])
    E = record.alignment["kernel"].shape[1]
    model = LLM2VecGenModel(backbone.architecture, record.num_tokens, thought, E, rank, scale, backbone.execution)
    trainable = jax.tree.map(lambda x: np.asarray(x, np.float32), trainable)
    return model, sharding.put_replicated(trainable, backbone.mesh)


def require_scores_writable(path: str | os.PathLike[str]) -> None:
    """Raises InputError if `add_scores` cannot write to a model directory."""
    folder = pathlib.Path(path).expanduser()
    if not (folder / published.METADATA).is_file():
        raise InputError(
            f"{path}: scores are saved only in a model directory on this machine that has a {published.METADATA}"
        )
    if not os.access(folder, os.W_OK):
        raise InputError(f"{path}: scores cannot be saved there ({os.strerror(errno.EACCES)})")
    _with_scores(folder, {})


def add_scores(
    path: str | os.PathLike[str], scores: Mapping[str, Mapping[str, Any]], license: str | None = None
) -> None:
    """Adds scores to the metadata of a model directory, and writes its model card anew, each file atomically.

    scores: {task: entry} as in `model_card`; scores of other tasks are kept. license: SPDX id of the backbone. The
    examples of the card keep the path or hub id that they have.
    Raises InputError for a directory without metadata of this package, and for a score that is not a number.
    """
    folder = pathlib.Path(path).expanduser()
    with locks.locked(folder):
        model, metadata = _with_scores(folder, scores)
        card = folder / "README.md"
        written = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        shown = re.search(r'LLM2VecGen\.from_pretrained\("([^"\\\n]+)"\)', written)
        text = model_card(model, shown[1] if shown else str(path), license)
        write_json(folder / published.METADATA, metadata)
        write_text(card, text)


def _with_scores(folder, scores):
    """Returns (PublishedModel, its metadata as stored) with scores added. Raises InputError if they have no card."""
    model, metadata = published.read(folder), read_json(folder / published.METADATA)
    if not isinstance(metadata.get("scores") or {}, dict):
        raise InputError(f"{folder / published.METADATA}: scores is not an object of task names")
    model.extra["scores"] = metadata["scores"] = (metadata.get("scores") or {}) | dict(scores)
    try:
        model_card(model, str(folder))
    except InputError as error:
        raise InputError(f"{folder / published.METADATA}: {error}") from None
    return model, metadata


def _lora_record(model, trainable):
    """Returns the `lora` of a PublishedModel, as the published package's apply_peft creates it."""
    if not model.lora_rank:
        return None
    tree, r = trainable["lora"], model.lora_rank
    alpha = model.lora_scale * r
    config = {
        "r": r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": 0.0,
        "target_modules": peft.modules_of(tree),
        "bias": "none",
        "task_type": None,
    }
    return {"config": config, "tensors": peft.tensors_of(tree)}


def check_finite(trainable: Any, what: str) -> None:
    """Raises InputError if a trainable tree contains NaN or infinity."""
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(trainable)):
        raise InputError(f"{what}: the trained tokens or heads contain NaN or infinity")
