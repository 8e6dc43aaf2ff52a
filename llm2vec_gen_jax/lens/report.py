"""HTML report on the content of embeddings: decoded texts, lenses, and the actual answers of the LLM."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2
import numpy as np

from llm2vec_gen_jax.common.files import write_text
from llm2vec_gen_jax.config import EvaluateConfig, ReportConfig, hub_access, options
from llm2vec_gen_jax.lens import chart
from llm2vec_gen_jax.lens.logit import logit_lens
from llm2vec_gen_jax.lens.search import Index, latent_lens
from llm2vec_gen_jax.teachers import encoder, hyde, targets

_TEMPLATE = "report.html"
_SENTENCES = 3  # neighbors per layer shown with their sentences


def write_report(model: Any, texts: list[str], path: str | os.PathLike[str], config: ReportConfig) -> None:
    """Writes the page of a ReportConfig to config.output, atomically. model: the LLM2VecGen at `path`."""
    options.require(config, "output")
    index = Index(config.index, model.backbone) if config.index is not None else None
    name = f"{path}, revision {config.revision}" if config.revision else str(path)
    page = render(gather(model, texts, config, index) | {"name": name})
    write_text(str(config.output), page)


def gather(model: Any, texts: list[str], config: ReportConfig, index: Index | None = None) -> dict[str, Any]:
    """Returns the values of the template: the texts, and the plots of their vectors or why there are none."""
    reading: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "show_progress_bar": True,
    }
    embeddings, soft_prompts = model.encode(texts, return_soft_prompts=True, **reading)
    decoded = model.decode(soft_prompts, config.max_new_tokens, batch_size=config.batch_size, show_progress_bar=True)
    words = {
        state: logit_lens(model, texts, config.top_k, state, words=True, **reading)
        for state in ("hidden", "soft_prompts")
    }
    neighbors = latent_lens(model, index, texts, config.top_k, **reading) if index else [{}] * len(texts)
    teacher, adapters, missing = _teacher(model, config)
    answers = hyde.Hyde(
        model.backbone, teacher, config.max_new_tokens, config.batch_size, config.max_length, True
    ).answers(texts)
    if missing is None:
        query_vectors, answer_vectors = teacher.encode(texts), teacher.encode(answers)
        panels = {
            "input-centric": chart.panel(query_vectors, answer_vectors, config.projection),
            "output-centric": chart.panel(embeddings, answer_vectors, config.projection),
        }
    else:
        panels = {}
    cosines = model.similarity(embeddings, embeddings)
    return {
        "model": model,
        "texts": [
            {
                "text": text,
                "answer": answers[row],
                "decoded": decoded[row],
                "words": {state: candidates[row] for state, candidates in words.items()},
                "layers": [_layer(*layer) for layer in neighbors[row].items()],
                "nearest": _nearest(cosines[row], row, config.nearest),
            }
            for row, text in enumerate(texts)
        ],
        "panels": panels,
        "no_map": missing,
        "teacher": ", ".join([teacher.backbone.name, "causal" if teacher.causal else "bidirectional", *adapters]),
        "projection": config.projection,
        "size": {"width": chart.WIDTH, "height": chart.HEIGHT},
    }


def render(values: Mapping[str, Any]) -> str:
    """Returns the page for the values of `gather` and a `name`. All texts are escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(values)


def _layer(number, tokens):
    """Returns the nearest context of each compression token in a layer, and the nearest overall, one per word."""
    nearest = {}
    for one in sorted((one for token in tokens for one in token), key=lambda one: -one.cosine):
        nearest.setdefault(one.word.lower(), one)
    return {"number": number, "tokens": [token[0] for token in tokens], "nearest": list(nearest.values())[:_SENTENCES]}


def _nearest(cosines, row, count):
    order = [int(other) for other in np.argsort(-cosines, kind="stable") if other != row]
    return [{"row": other, "cosine": float(cosines[other])} for other in order[:count]]


def _teacher(model: Any, config: ReportConfig) -> tuple[encoder.Teacher, list[str], str | None]:
    """Returns (teacher, its adapters, why its vectors are not comparable with the model's or None)."""
    trained: dict[str, Any] = {"kind": "llm2vec", "path": None, "adapters": [], "attention": "auto"}
    if model.record:
        trained |= model.record.extra.get("config", {}).get("teacher", {})
    sizes: dict[str, Any] = {
        "batch_size": config.batch_size,
        "max_length": config.max_length,
        "show_progress": True,
    }
    configured = bool(config.adapters) or config.attention != "auto"
    if trained["kind"] != "llm2vec" and not configured:
        teacher = encoder.Teacher(model.backbone, model.backbone.frozen, True, **sizes)
        return teacher, [], f"the model's teacher was of kind {trained['kind']}, which is not available here"
    used: dict[str, Any] = {
        key: getattr(config, key) if configured else trained[key] for key in ("adapters", "attention")
    }
    path = None if configured else trained["path"]
    if path or used["adapters"]:
        settings = EvaluateConfig(kind="teacher", **used, **hub_access(config), dtype=config.dtype)
        settings.batch_size, settings.mesh, settings.kernels = config.batch_size, config.mesh, config.kernels
        settings.revision = None if path else model.backbone.revision
        _, teacher, _ = hyde.load_baseline(path or model.backbone.name, settings)
    else:
        causal = targets.is_causal(EvaluateConfig(**used))
        teacher = encoder.Teacher(model.backbone, model.backbone.frozen, causal, **sizes)
    width, expected = teacher.backbone.architecture.hidden_size, model.get_embedding_dimension()
    missing = None if width == expected else f"the teacher's vectors have {width} dimensions, the model's {expected}"
    return teacher, used["adapters"], missing
