"""Exports: model directory, backbone as a Hugging Face folder, merged encoder, upload to the hub."""

import os
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import UNFINISHED, require_new, write_json, write_text
from llm2vec_gen_jax.common.hub import is_hub_id
from llm2vec_gen_jax.formats import hf, published
from llm2vec_gen_jax.model import lora
from llm2vec_gen_jax.pretrained import default_backbone, model_directory
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone, is_local

_MERGED_CARD = """\
# {name}: the encoder of an LLM2Vec-Gen model, merged

A plain transformers model: the backbone{lora}, with the {count} trained tokens in its embedding table. Append them to a
text and apply the two heads, which are safetensors files in this folder:

```python
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

tokenizer, model = AutoTokenizer.from_pretrained(FOLDER), AutoModel.from_pretrained(FOLDER)
heads = [load_file(f"{{FOLDER}}/{{name}}_mlp.safetensors") for name in ("reconstruction", "alignment")]
batch = tokenizer([text + "{tokens}" for text in texts], padding=True, return_tensors="pt")
hidden = model(**batch).last_hidden_state[:, -{read}:].float()
for head in heads:  # the first result is the soft prompts
    hidden = torch.nn.functional.linear(hidden, head["projection.weight"], head["projection.bias"])
embeddings = hidden.mean(dim=1)
```
"""

_SENTENCE_TRANSFORMER_CARD = """\
# {name}: an LLM2Vec-Gen model, merged

The backbone{lora}, with the {count} trained tokens in its embedding table, which the tokenizer appends to every text.
The last of them is pooled, and two affine heads follow. sentence-transformers loads it without code of this folder:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer(FOLDER)
embeddings = model.encode(texts)
```
"""
_MODULES = (  # (type, folder) of sentence-transformers, in any version
    ("Transformer", ""),
    ("Pooling", "1_Pooling"),
    ("Dense", "2_Dense"),
    ("Dense", "3_Dense"),
)


def save_pretrained(
    embedder: Any,
    path: str | os.PathLike[str],
    dtype: str | None = None,
    backbone: str | os.PathLike[str] | None = None,
    shown: str | None = None,
    revision: str | None = None,
) -> None:
    """Writes an LLM2VecGen as a model directory, which JAX and PyTorch load. `path` must not exist.

    dtype: of PyTorch (float32 | bfloat16 | float16), default as loaded. backbone: folder or hub id that the directory
    names as its backbone, default as loaded. shown: the path or hub id in the examples of the model card. revision: of
    the backbone on the hub, default that of the loaded one, if it has this name.
    """
    record = embedder.record
    model_directory.save(
        path,
        embedder.model,
        embedder.trainable,
        embedder.backbone,
        record.extra if record else {},
        dtype or (record.dtype if record else None),
        record.special_tokens if record else None,
        backbone,
        shown,
        embedder.prompts,
        record.teacher if record else None,
        revision,
    )


def save_backbone(backbone: LoadedBackbone, folder: str | os.PathLike[str], unfinished: bool = False) -> None:
    """Writes a loaded backbone as a Hugging Face folder for transformers 4 and 5. `folder` must not exist.

    unfinished: adds the marker files.UNFINISHED, which the caller removes after it has written the other outputs.
    """
    require_new(folder)
    tokenizer = backbone.tokenizer

    def write_other_files(temporary):
        published.write_tokenizer(temporary, tokenizer.hf)
        if unfinished:
            (temporary / UNFINISHED).touch()

    hf.save(folder, backbone.frozen, backbone.architecture, write_other_files, tokenizer.stop_ids)


def save_merged(embedder: Any, folder: str | os.PathLike[str], unfinished: bool = False) -> None:
    """Writes the encoder as a plain Hugging Face folder, with the trained tokens in the embedding table.

    A LoRA is merged in float32; the stored dtype is that of the backbone. The heads are separate safetensors files.
    With one compression token the folder is also a SentenceTransformer without code of its own, whose tokenizer appends
    the trained tokens. `folder` must not exist. unfinished: as for `save_backbone`.
    """
    require_new(folder)
    model, trainable, backbone = embedder.model, embedder.trainable, embedder.backbone
    tokens = embedder.special_tokens
    frozen = backbone.frozen
    if model.lora_rank:
        updated = {name: jax.tree.map(lambda x: x.copy(), frozen["layers"][name]) for name in trainable["lora"]}
        copy = {**frozen, "layers": {**frozen["layers"], **updated}}  # `merge` donates the arrays that it updates
        frozen = lora.merge(copy, lora.scaled(trainable["lora"], model.lora_scale))
    ids, _ = published.special_token_ids(backbone.tokenizer.hf, tokens)

    def write_other_files(temporary):
        published.write_tokenizer(temporary, backbone.tokenizer.hf, tokens, append=model.num_tokens == 1)
        for name in model_directory.HEADS:
            head = {f"projection.{key}": array for key, array in _linear(trainable[name]).items()}
            published.write_safetensors(temporary / f"{name}_mlp.safetensors", head)
        if model.num_tokens == 1:
            _write_sentence_transformer(temporary, embedder)
        card = (_SENTENCE_TRANSFORMER_CARD if model.num_tokens == 1 else _MERGED_CARD).format(
            name=pathlib.Path(folder).name,
            lora=" with its LoRA merged" if model.lora_rank else "",
            count=len(tokens),
            tokens="".join(tokens),
            read=model.num_tokens,
        )
        write_text(temporary / "README.md", card)
        if unfinished:
            (temporary / UNFINISHED).touch()

    added = (ids, np.asarray(trainable["tokens"], np.float32))
    hf.save(folder, frozen, backbone.architecture, write_other_files, backbone.tokenizer.stop_ids, added)


def _linear(head):
    """Returns the arrays of a head as those of a torch Linear: weight (out, in), bias (out,)."""
    bias, weight = (np.asarray(head[key], np.float32) for key in ("bias", "kernel"))
    return {"weight": np.ascontiguousarray(weight.T), "bias": bias}


def _write_sentence_transformer(folder, embedder):
    """Writes the files with which sentence-transformers pools the last token of a folder and applies the heads."""
    modules = [
        {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for number, (kind, path) in enumerate(_MODULES)
    ]
    write_json(folder / "modules.json", modules)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": embedder.max_seq_length})
    write_text(folder / published.PROMPTS, published.prompts_file(embedder.prompts))
    pooling = {"word_embedding_dimension": embedder.model.architecture.hidden_size, "pooling_mode_mean_tokens": False}
    _write_module(folder / "1_Pooling", pooling | {"pooling_mode_lasttoken": True})
    for (_, path), name in zip(_MODULES[2:], model_directory.HEADS):
        arrays = _linear(embedder.trainable[name])
        size = {"in_features": arrays["weight"].shape[1], "out_features": arrays["weight"].shape[0]}
        identity = {"bias": True, "activation_function": "torch.nn.modules.linear.Identity"}
        _write_module(folder / path, size | identity)
        tensors = {f"linear.{key}": array for key, array in arrays.items()}
        published.write_safetensors(folder / path / "model.safetensors", tensors)


def _write_module(folder, config):
    folder.mkdir()
    write_json(folder / "config.json", config)


def push_to_hub(
    embedder: Any,
    repo_id: str,
    private: bool = False,
    token: str | None = None,
    message: str = "Upload an LLM2Vec-Gen model",
) -> str:
    """Uploads the model directory to a repository of the Hugging Face hub, created if necessary. Returns its URL.

    Raises InputError if the backbone is a local path, which other users cannot load, or if the upload fails.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    record, loaded = embedder.record, embedder.backbone
    known = {loaded.name: loaded.revision}
    if record:  # the loaded one may be a local copy of the recorded one
        known.setdefault(record.backbone, record.extra.get("backbone_revision"))
    name = next(
        (name for name in known if name == default_backbone.NAME or (is_hub_id(name) and not is_local(name))), None
    )
    if name is None:
        raise InputError(
            f"the backbone is the local {loaded.name}, which other users cannot load. Load the model with "
            "backbone=HUB_ID"
        )
    api = huggingface_hub.HfApi(token=token)
    with locks.temporary(pathlib.Path(tempfile.gettempdir(), "llm2vec-gen-upload"), folder=True) as temporary:
        folder = temporary / repo_id.rpartition("/")[2]
        save_pretrained(embedder, folder, backbone=name, shown=repo_id, revision=known[name])
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
            reason = first_line(error)
            raise InputError(f"{repo_id}: the upload to the hub failed ({reason})") from None
    return str(url)
