"""The model card: README.md of a model directory, with metadata for the Hugging Face hub."""

import json
import numbers
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.yaml_files import to_yaml
from llm2vec_gen_jax.formats.published import PublishedModel
from llm2vec_gen_jax.pretrained import default_backbone

PAPER = "2603.10913"
CITATION = """\
@article{behnamghader2026llm2vecgen,
  title = {LLM2Vec-Gen: Generative Embeddings from Large Language Models},
  author = {BehnamGhader, Parishad and Adlakha, Vaibhav and Schmidt, Fabian David and Chapados, Nicolas and
            Mosbach, Marius and Reddy, Siva},
  year = {2026},
  journal = {arXiv preprint arXiv:2603.10913},
  url = {https://arxiv.org/abs/2603.10913},
}"""
_LIMITS = """\
## Limits

* The vectors encode what the LLM would answer, with its errors and its biases. Text decoded from them may be wrong.
* A text is truncated to 512 tokens, including the trained tokens, unless `max_length` (`max_seq_length`) is set.
* Languages are those of the LLM and of the training data; nothing else was trained or measured.
* Vectors are comparable with vectors of this model only, by their cosine similarity."""
_TAGS = ["llm2vec-gen", "text-embeddings", "sentence-similarity", "jax", "flax", "pytorch"]


def model_card(record: PublishedModel, identifier: str, license: str | None = None) -> str:
    """Returns the text of a model card.

    record: these keys of its `extra` are shown if present: "config" (resolved settings of the training run), "data"
    (facts about the training data), "facts" (list of sentences on the training, instead of those from config and data),
    "metrics" (last logged values) and "scores" ({task: main score}, or {task: {"value": main score, "type": task type,
    "metric": its name, "dataset": hub id}}, all optional but the value).
    identifier: path or hub id in the usage examples. license: SPDX id of the backbone, which applies to the model too.
    Raises InputError for a score that is not a number.
    """
    extra, base = record.extra, hub_id(record.backbone)
    results = [_result(task, score) for task, score in (extra.get("scores") or {}).items()]
    data = ModelCardData(
        library_name="llm2vec_gen_jax",
        pipeline_tag="feature-extraction",
        license=license or "other",
        license_name=None if license else "that-of-the-base-model",
        base_model=base,
        base_model_relation="adapter" if base else None,
        datasets=[dataset] if (dataset := dataset_id(extra)) else None,
        tags=_TAGS if is_gguf(record.backbone) else [*_TAGS, "sentence-transformers"],
        model_name=identifier.rstrip("/").rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
    sections = [
        _description(record, base),
        _usage(identifier, is_gguf(record.backbone)),
        *([] if base else [_local_backbone(record)]),
        *([_scores(results)] if results else []),
        _LIMITS,
        _training(extra),
        _license(base or record.backbone, license),
        f"## Citation\n\n```bibtex\n{CITATION}\n```",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"))


def is_gguf(backbone: str) -> bool:
    """Whether the name of a backbone stands for a GGUF file, which PyTorch cannot load."""
    return backbone == default_backbone.NAME or backbone.endswith(".gguf")


def hub_id(backbone: str) -> str | None:
    """Returns the hub id of a backbone's name, None for a local path."""
    if backbone == default_backbone.NAME:
        return default_backbone.HUB_ID
    return backbone if backbone.count("/") == 1 and not backbone.startswith(("/", ".", "~")) else None


def dataset_id(extra: Mapping[str, Any]) -> str | None:
    """Returns the hub id of the training data in the metadata of a model, None for a local file."""
    source = str((extra.get("data") or {}).get("responses", ""))
    return source if source.count("/") == 1 and not source.endswith((".jsonl", ".gz", ".json")) else None


def _description(record, base):
    size, count = record.alignment["bias"].size, record.num_tokens
    lora = " and a LoRA on the encoding pass" if record.lora else ""
    return (
        f"# LLM2Vec-Gen embedder on {base or record.backbone}\n\n"
        f"Embeddings of size {size} that encode the answer that the LLM would give to a text, not the text "
        f"(LLM2Vec-Gen, [arXiv {PAPER}](https://arxiv.org/abs/{PAPER})). The LLM stays frozen: what was trained, and "
        f"is in this directory, are {len(record.special_tokens)} token embeddings ({count} of them read), two affine "
        f"heads{lora}."
    )


def _usage(identifier, convert):
    """Returns the examples, for a directory that PyTorch reads or after its conversion."""
    command = f"python -m launch.convert to_pytorch {identifier} output=model-pt  # writes out the backbone too"
    text = ["What is the capital of France?"]
    directory = json.dumps("model-pt" if convert else identifier)
    return f"""\
## Usage

JAX ([llm2vec_gen_jax](https://pypi.org/project/llm2vec-gen-jax/)):

```python
from llm2vec_gen_jax import LLM2VecGen

model = LLM2VecGen.from_pretrained({json.dumps(identifier)})
vectors, soft_prompts = model.encode({json.dumps(text)}, return_soft_prompts=True)
answers = model.decode(soft_prompts, max_new_tokens=32)  # the text that the LLM reads out of the embedding
```

PyTorch ([llm2vec-gen](https://pypi.org/project/llm2vec-gen/)), the same vectors:

{_shell(command) if convert else ""}```python
from llm2vec_gen.models import LLM2VecGenModel

model = LLM2VecGenModel.from_pretrained({directory})
vectors = model.encode({json.dumps(text)})
```

sentence-transformers with peft, in PyTorch, the same vectors:

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer({directory}, trust_remote_code=True)
vectors = model.encode({json.dumps(text)})
```"""


def _shell(command):
    return f"```bash\n{command}\n```\n\n"


def _local_backbone(record):
    return (
        f"The backbone is the local `{record.backbone}`. On another machine, change `model_name_or_path` in "
        "`run_config.yml` (PyTorch reads it too), or pass `backbone=` to `LLM2VecGen.from_pretrained`."
    )


def _result(task, score):
    """Returns the EvalResult of an entry of "scores"."""
    entry = score if isinstance(score, dict) else {"value": score}
    value = entry.get("value")
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise InputError(f"scores of the model card: {task}: expected a number, found {value!r}")
    return EvalResult(
        task_type=entry.get("type", "feature-extraction"),
        dataset_type=entry.get("dataset", task),
        dataset_name=task,
        metric_type=entry.get("metric", "main_score"),
        metric_value=float(value),
    )


def _scores(results):
    rows = [f"| {result.dataset_name} | {result.metric_type} | {result.metric_value:.3f} |" for result in results]
    return "\n".join(["## Scores", "", "| task | metric | score |", "|---|---|---|", *rows])


def _training(extra):
    metrics = {name: value for name, value in (extra.get("metrics") or {}).items() if name != "step"}
    validation = dict(extra.get("validation") or {})
    step = validation.pop("step", None)
    lines = ["## Training", "", *(f"* {line}" for line in extra.get("facts") or _facts(extra))]
    lines += ["", "| metric | value |", "|---|---|"] if metrics else []
    values = [*metrics.items(), *((f"validation {name}, step {step}", value) for name, value in validation.items())]
    lines += [f"| {name.replace('_', ' ')} | {value:.6g} |" for name, value in values]
    if extra.get("config"):
        lines += ["", "Hyper-parameters:", "", "```yaml", *to_yaml(extra["config"]).splitlines(), "```"]
    return "\n".join(lines)


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


def _license(base, license):
    return (
        f"## License\n\n* The LLM, `{base}`: {license or 'see its model card'}.\n"
        "* What was trained, in this directory, is derived from the LLM, and is under the same license."
    )
