"""The model directory, as trees: what a run writes at its end and `LLM2VecGen.from_pretrained` reads."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from llm2vec_gen_jax import __version__, sharding
from llm2vec_gen_jax.architecture import to_hf_config
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.formats import peft, published
from llm2vec_gen_jax.loading import fetch_from_hub
from llm2vec_gen_jax.model import Model

HEADS = ("reconstruction", "alignment")


def save(directory, model, trainable, backbone, config, summary):
    """Writes a model directory, complete or not at all. The directory must not exist.

    config: the resolved config dict of the run. summary: lines of Markdown for the card.
    """
    trainable = jax.tree.map(np.asarray, trainable)
    dtype = str(jax.tree.leaves(backbone.frozen)[0].dtype)
    path = pathlib.Path(backbone.name).expanduser()
    record = published.PublishedModel(
        backbone=str(path.resolve()) if path.exists() else backbone.name,
        dtype=dtype,
        special_tokens=[f"<question{number}>" for number in range(1, model.num_appended + 1)],
        num_tokens=model.num_tokens,
        tokens_MD=trainable["tokens"],
        **{head: dict(trainable[head]) for head in HEADS},
        lora=_lora_record(model, trainable),
        extra={"version": __version__, "backbone_identity": backbone.identity, "config": config},
    )
    # The published generate() reads the end tokens from this config.
    backbone_config = to_hf_config(model.architecture) | {"eos_token_id": backbone.tokenizer.stop_ids}
    published.write(directory, record, backbone.tokenizer.hf, backbone_config, _card(record, model, config, summary))


def read(path):
    """Returns the PublishedModel of a local directory or a hub repository of that layout."""
    folder = pathlib.Path(path).expanduser()
    if not folder.exists() and path.count("/") == 1 and not path.startswith((".", "/", "~")):
        folder = fetch_from_hub(
            path, ["*.json", "*.yml", "*.safetensors", "*.jinja", "*.txt", "reconstruction_mlp", "alignment_mlp"]
        )
    return published.read(folder)


def to_model(record, backbone, source):
    """Returns (Model, trainable tree on the backbone's mesh) of a PublishedModel.

    Raises InputError when it was trained on another backbone than the one given.
    """
    identity = record.extra.get("backbone_identity", backbone.identity)
    D = backbone.architecture.hidden_size
    if identity != backbone.identity or record.tokens_MD.shape[1] != D:
        raise InputError(
            f"{source}: was trained on another backbone than {backbone.name} (weights {identity}, hidden size "
            f"{record.tokens_MD.shape[1]}; here {backbone.identity}, {D}). It names {record.backbone}"
        )
    thought = len(record.tokens_MD) - record.num_tokens
    trainable = {"tokens": record.tokens_MD, **{head: dict(getattr(record, head)) for head in HEADS}}
    rank, scale = 0, 0.0
    if record.lora:
        config_file = f"{source}/{published.ADAPTER_CONFIG}"
        config = peft.check(record.lora["config"], config_file, but=("trainable_token_indices",))
        for key in ("rank_pattern", "alpha_pattern"):
            if config.get(key):
                raise InputError(f"{config_file}: {key} is not supported on the encoder")
        tensors = record.lora["tensors"]
        trainable["lora"] = peft.read(tensors, config, backbone.architecture, source, folded=False)
        rank, scale = config["r"], peft.scale_of(config, config["r"], config["lora_alpha"])
    E = record.alignment["kernel"].shape[1]
    model = Model(backbone.architecture, record.num_tokens, thought, E, rank, scale)
    trainable = jax.tree.map(lambda x: np.asarray(x, np.float32), trainable)
    return model, sharding.put_replicated(trainable, backbone.mesh)


def _lora_record(model, trainable):
    """Returns the `lora` of a PublishedModel, as the published package's apply_peft would make it."""
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


def check_finite(trainable, what):
    """Raises InputError when a trainable tree holds NaN or infinity."""
    if not all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(trainable)):
        raise InputError(f"{what}: the trained tokens or heads hold NaN or infinity")


def _card(record, model, config, summary):
    base = record.backbone if "/" in record.backbone and not record.backbone.startswith("/") else None
    lines = ["---", "library_name: llm2vec_gen_jax", "pipeline_tag: feature-extraction"]
    lines += [f"base_model: {base}"] if base else []
    lines += ["tags: [llm2vec-gen, text-embeddings, jax, flax]", "---", "", "# LLM2Vec-Gen embedder", ""]
    lines += [
        f"Embeddings of size {model.embedding_size} that encode the answer that `{record.backbone}` would give, from "
        f"{model.num_tokens} compression tokens (arXiv 2603.10913).",
        "",
        *summary,
        "",
        "```python",
        "from llm2vec_gen_jax import LLM2VecGen",
        'model = LLM2VecGen.from_pretrained("THIS_DIRECTORY")',
        'vectors = model.encode(["What is the capital of France?"])',
        "```",
        "",
        'In PyTorch: `LLM2VecGenModel.from_pretrained("THIS_DIRECTORY")` of the package `llm2vec-gen`; there',
        "`run_config.yml` must name the backbone as a Hugging Face folder or hub id.",
        "",
        "## Configuration",
        "",
        "```yaml",
        *yaml.safe_dump(config, sort_keys=False, allow_unicode=True).splitlines(),
        "```",
        "",
    ]
    return "\n".join(lines)
