"""The model card: README.md of a model directory, with metadata for the Hugging Face hub."""

import json

from llm2vec_gen_jax.common.yaml_files import to_yaml
from llm2vec_gen_jax.formats.published import PublishedModel
from llm2vec_gen_jax.pretrained import default_backbone

PAPER = "2603.10913"


def model_card(record: PublishedModel, identifier: str, license: str | None = None) -> str:
    """Returns the text of a model card.

    record: these keys of its `extra` are shown if present: "config" (resolved settings of the training run), "data"
    (facts about the training data), "metrics" (last logged values) and "scores" ({task: main score}).
    identifier: path or hub id in the usage examples. license: SPDX id of the backbone, which applies to the model too.
    """
    extra, base = record.extra, _hub_id(record.backbone)
    convert = is_gguf(record.backbone)
    metrics = {name: value for name, value in (extra.get("metrics") or {}).items() if name != "step"}
    validation = dict(extra.get("validation") or {})
    step = validation.pop("step", None)
    front = {
        "library_name": "llm2vec_gen_jax",
        "pipeline_tag": "feature-extraction",
        "license": license or "other",
        **({} if license else {"license_name": "that-of-the-base-model"}),
        **({"base_model": base, "base_model_relation": "adapter"} if base else {}),
        **({"datasets": [data]} if (data := _dataset(extra)) else {}),
        "tags": ["llm2vec-gen", "text-embeddings", "sentence-similarity", "jax", "flax", "pytorch"],
    }
    size, count = record.alignment["bias"].size, record.num_tokens
    lines = [
        "---",
        *to_yaml(front).splitlines(),
        "---",
        "",
        f"# LLM2Vec-Gen embedder on {base or record.backbone}",
        "",
        f"Embeddings of size {size} that encode the answer that the LLM would give to a text, not the text "
        f"(LLM2Vec-Gen, [arXiv {PAPER}](https://arxiv.org/abs/{PAPER})). The LLM stays frozen: what was trained, and "
        f"is in this directory, are {len(record.special_tokens)} token embeddings ({count} of them read), two affine "
        f"heads{' and a LoRA on the encoding pass' if record.lora else ''}.",
        "",
        "## Usage",
        "",
        "JAX ([llm2vec_gen_jax](https://pypi.org/project/llm2vec-gen-jax/)):",
        "",
        "```python",
        "from llm2vec_gen_jax import LLM2VecGen",
        f"model = LLM2VecGen.from_pretrained({json.dumps(identifier)})",
        'vectors, soft_prompts = model.encode(["What is the capital of France?"], return_soft_prompts=True)',
        "answers = model.decode(soft_prompts)  # the text that the LLM reads out of the embedding",
        "```",
        "",
        "PyTorch ([llm2vec-gen](https://pypi.org/project/llm2vec-gen/)), the same vectors:",
        "",
        *(_to_pytorch(identifier) if convert else []),
        "```python",
        "from llm2vec_gen.models import LLM2VecGenModel",
        f"model = LLM2VecGenModel.from_pretrained({json.dumps('model-pt' if convert else identifier)})",
        'vectors = model.encode(["What is the capital of France?"])',
        "```",
        "",
        "sentence-transformers with peft, in PyTorch, the same vectors:",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        f"model = SentenceTransformer({json.dumps('model-pt' if convert else identifier)}, trust_remote_code=True)",
        'vectors = model.encode(["What is the capital of France?"])',
        "```",
        "",
        *([] if base else _local_backbone(record)),
        *(_scores(extra["scores"]) if extra.get("scores") else []),
        "## Training",
        "",
        *[f"* {line}" for line in _facts(extra)],
        *(["", "| metric | value |", "|---|---|"] if metrics else []),
        *[f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in metrics.items()],
        *[f"| validation {name.replace('_', ' ')}, step {step} | {value:.6g} |" for name, value in validation.items()],
        "",
    ]
    if extra.get("config"):
        settings = to_yaml(extra["config"]).splitlines()
        lines += ["Hyper-parameters:", "", "```yaml", *settings, "```", ""]
    return "\n".join(lines)


def is_gguf(backbone: str) -> bool:
    """Whether the name of a backbone stands for a GGUF file, which PyTorch cannot load."""
    return backbone == default_backbone.NAME or backbone.endswith(".gguf")


def _hub_id(backbone):
    """Returns the hub id of a backbone's name, None for a local path."""
    if backbone == default_backbone.NAME:
        return default_backbone.HUB_ID
    return backbone if backbone.count("/") == 1 and not backbone.startswith(("/", ".", "~")) else None


def _dataset(extra):
    source = str((extra.get("data") or {}).get("responses", ""))
    return source if source.count("/") == 1 and not source.endswith((".jsonl", ".gz", ".json")) else None


def _to_pytorch(identifier):
    command = f"python -m launch.convert to_pytorch {identifier} output=model-pt"
    return ["```bash", f"{command}  # writes out the backbone too", "```", ""]


def _local_backbone(record):
    return [
        f"The backbone is the local `{record.backbone}`. On another machine, change `model_name_or_path` in "
        "`run_config.yml` (PyTorch reads it too), or pass `backbone=` to `LLM2VecGen.from_pretrained`.",
        "",
    ]


def _scores(scores):
    rows = [f"| {name} | {score:.3f} |" for name, score in scores.items()]
    return ["## Scores", "", "| task | score |", "|---|---|", *rows, ""]


def _facts(extra):
    data, facts = extra.get("data") or {}, []
    if data:
        facts.append(f"data: {data['examples']:,} records of queries and responses, `{data['responses']}`")
    if config := extra.get("config") or {}:
        teacher, train = config.get("teacher", {}), config.get("train", {})
        adapters = ", ".join(f"`{name}`" for name in teacher.get("adapters") or ()) or "no adapters"
        facts.append(f"alignment targets: {teacher.get('kind')} ({adapters}), attention {teacher.get('attention')}")
        if train.get("ridge_examples"):
            initial = f" of `{train['init_from']}`" if train.get("init_from") else ""
            facts.append(f"alignment head{initial} solved by ridge regression on at most one epoch of the data")
        facts.append(f"{train.get('steps')} steps at batch {train.get('batch_size')}, seed {train.get('seed')}")
    return facts or ["not recorded: this model was trained elsewhere"]
