"""One HTML page of what the embeddings of some texts hold, beside what the LLM really answers."""

import pathlib

import jinja2
import numpy as np

from llm2vec_gen_jax.common.files import write_text
from llm2vec_gen_jax.config import EvaluateConfig, options
from llm2vec_gen_jax.lens import chart
from llm2vec_gen_jax.lens.logit import logit_lens
from llm2vec_gen_jax.lens.search import Index, latent_lens
from llm2vec_gen_jax.teachers import encoder, hyde, targets

_TEMPLATE = "report.html"
_SENTENCES = 3  # of a layer's neighbours that are shown with their sentences


def write_report(model, texts, path, config):
    """Writes the page of a ReportConfig to config.output. model: the LLM2VecGen at `path`. Complete or not at all."""
    options.require(config, "output")
    index = Index(config.index, model.backbone) if config.index is not None else None
    page = render(gather(model, texts, config, index) | {"name": str(path)})
    write_text(config.output, page)


def gather(model, texts, config, index=None):
    """Returns what the template shows, a dict: the texts, the map of their vectors or why there is none."""
    reading = {"batch_size": config.batch_size, "max_length": config.max_length, "show_progress_bar": True}
    embeddings, soft_prompts = model.encode(texts, return_soft_prompts=True, **reading)
    decoded = model.decode(soft_prompts, config.max_new_tokens, batch_size=config.batch_size, show_progress_bar=True)
    words = {
        state: logit_lens(model, texts, config.top_k, state, words=True, **reading)
        for state in ("hidden", "soft_prompts")
    }
    neighbours = latent_lens(model, index, texts, config.top_k, **reading) if index else [{}] * len(texts)
    reader, adapters, missing = _teacher(model, config)
    answers = hyde.Hyde(
        model.backbone, reader, config.max_new_tokens, config.batch_size, config.max_length, True
    ).answers(texts)
    if missing is None:
        of_queries, of_answers = reader.encode(texts), reader.encode(answers)
        panels = {
            "input-centric": chart.panel(of_queries, of_answers, config.projection),
            "output-centric": chart.panel(embeddings, of_answers, config.projection),
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
                "words": {state: found[row] for state, found in words.items()},
                "layers": [_layer(*layer) for layer in neighbours[row].items()],
                "nearest": _nearest(cosines[row], row, config.nearest),
            }
            for row, text in enumerate(texts)
        ],
        "panels": panels,
        "no_map": missing,
        "teacher": ", ".join([reader.backbone.name, "causal" if reader.causal else "bidirectional", *adapters]),
        "projection": config.projection,
        "size": {"width": chart.WIDTH, "height": chart.HEIGHT},
    }


def render(values):
    """Returns the page of what `gather` returned and a `name`; every text is escaped."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(values)


def _layer(number, tokens):
    """The nearest context of each compression token in a layer, and the nearest of all, each word once."""
    nearest = {}
    for one in sorted((one for token in tokens for one in token), key=lambda one: -one.cosine):
        nearest.setdefault(one.word.lower(), one)
    return {"number": number, "tokens": [token[0] for token in tokens], "nearest": list(nearest.values())[:_SENTENCES]}


def _nearest(cosines, row, count):
    order = [int(other) for other in np.argsort(-cosines, kind="stable") if other != row]
    return [{"row": other, "cosine": float(cosines[other])} for other in order[:count]]


def _teacher(model, config):
    """Returns (embedders.Teacher, its adapters, why its vectors cannot be compared with the model's, or None)."""
    trained = {"kind": "llm2vec", "path": None, "adapters": [], "attention": "auto"}
    if model.record:
        trained |= model.record.extra.get("config", {}).get("teacher", {})
    sizes = {"batch_size": config.batch_size, "max_length": config.max_length, "show_progress": True}
    own = encoder.Teacher(model.backbone, model.backbone.frozen, True, **sizes)
    given = bool(config.adapters) or config.attention != "auto"
    if trained["kind"] != "llm2vec" and not given:
        return own, [], f"the model's teacher was of the kind {trained['kind']}, which is not at hand here"
    used = {key: getattr(config, key) if given else trained[key] for key in ("adapters", "attention")}
    place = None if given else trained["path"]
    if place or used["adapters"]:
        settings = EvaluateConfig(kind="teacher", **used, batch_size=config.batch_size, dtype=config.dtype)
        settings.mesh, settings.kernels = config.mesh, config.kernels
        found, _, _ = hyde.load_baseline(place or model.backbone.name, settings)
    else:
        causal = targets.is_causal(EvaluateConfig(**used))
        found = encoder.Teacher(model.backbone, model.backbone.frozen, causal, **sizes)
    width, expected = found.backbone.architecture.hidden_size, model.get_embedding_dimension()
    missing = None if width == expected else f"the teacher's vectors have {width} numbers, the model's {expected}"
    return found, used["adapters"], missing
