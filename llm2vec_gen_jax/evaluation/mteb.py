"""Embedders and task folders as models and tasks of mteb. Imports mteb, and therefore torch.

mteb.evaluate(MTEBEncoder(LLM2VecGen.from_pretrained(path)), mteb.get_tasks(["NFCorpus"]))
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import datasets  # noqa: F401  before mteb, whose own import of the hub's client is circular without it
import jax
import jax.numpy as jnp
import mteb
import numpy as np
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta, SentenceTransformerEncoderWrapper
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import Licenses, PromptType

from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError, first_line, nearest
from llm2vec_gen_jax.common.files import fingerprint
from llm2vec_gen_jax.evaluation import instructions as instructions_lib
from llm2vec_gen_jax.evaluation import tasks
from llm2vec_gen_jax.evaluation.encoders import Encoder, Student
from llm2vec_gen_jax.pretrained import model_card

_CODE = "https://pypi.org/project/llm2vec-gen-jax/"
_EXPORT = "write it with `python -m launch.convert to_pytorch`, and put its backbone on the hub too"
_UNKNOWN: dict[str, Any] = {
    **dict.fromkeys(name for name, field in ModelMeta.model_fields.items() if field.is_required()),
    "open_weights": True,
    "similarity_fn_name": "cosine",
    "use_instructions": True,
}


class MTEBEncoder(AbsEncoder):
    """An mteb model with an embedder for queries and one for documents (default: the same). Similarity is the cosine.

    query, document: an LLM2VecGen, or an Encoder. instructions: {task name: (query instruction, document instruction)};
    default: the published ones. name: of the model in the results of mteb. Its revision there is a hash of all that the
    scores depend on, so that mteb does not return the stored results of another model or of other instructions.
    As published, all texts that are not documents (sentences of a pair, texts to classify) get the query instruction,
    and texts are stripped.
    """

    def __init__(
        self,
        query: LLM2VecGen | Encoder,
        document: LLM2VecGen | Encoder | None = None,
        instructions: Mapping[str, tuple[str, str]] | None = None,
        name: str = "llm2vec_gen_jax/embedder",
    ) -> None:
        self.query, self.document = _as_encoder(query), _as_encoder(document or query)
        self.instructions = instructions_lib.read().pairs() if instructions is None else instructions
        facts = _facts(self.query.model) if isinstance(self.query, Student) else {}
        fields = {"loader": None, "name": name, "revision": self._revision(), "framework": ["JAX"]}
        self.mteb_model_meta = ModelMeta(**_UNKNOWN | facts | fields)

    def _revision(self) -> str:
        parts: list[Any] = [sorted(self.instructions.items())]
        for encoder in (self.query, self.document):
            if not isinstance(encoder, Student):
                return "none"
            parts.append((encoder.model.identity, encoder.max_length))
        return fingerprint(parts)

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Returns the embeddings (n, E) of the texts of a DataLoader. Called by mteb.

        Raises InputError for a task without instructions.
        """
        name = task_metadata.name
        if name not in self.instructions:
            fix = f"pass instructions={{{name!r}: (query instruction, document instruction)}}"
            raise InputError(f"no instruction for task {name}{nearest(name, self.instructions)}: {fix}")
        query, document = self.instructions[name]
        texts = [text.strip() for batch in inputs for text in batch["text"]]
        if prompt_type == PromptType.document:
            return self.document.encode(texts, document)
        return self.query.encode(texts, query)


def model_meta(
    embedder: LLM2VecGen, name: str, instructions: Mapping[str, tuple[str, str]] | None = None, **fields: Any
) -> ModelMeta:
    """Returns the entry of a model directory on the hub for mteb's models, which its leaderboard shows.

    mteb loads it as a SentenceTransformer. name: the hub id. instructions: as of MTEBEncoder. fields: of ModelMeta,
    in place of those that are read from the model directory; what it does not hold is None unless it is passed:
    revision (the commit), release_date, languages, training_datasets, and a license that mteb has no name for.
    Raises InputError for an invalid field and for a GGUF backbone, which PyTorch cannot load.
    """
    if model_card.is_gguf(_backbone_name(embedder)):
        raise InputError(f"{name}: PyTorch cannot load the GGUF backbone {_backbone_name(embedder)}: {_EXPORT}")
    pairs = instructions_lib.read().pairs() if instructions is None else instructions
    loading = {
        "loader": SentenceTransformerEncoderWrapper,
        "loader_kwargs": {"trust_remote_code": True, "model_prompts": _prompts(pairs)},
        "name": name,
        "framework": ["Sentence Transformers", "PyTorch", "JAX", "safetensors"],
        "reference": f"https://huggingface.co/{name}",
    }
    try:
        return ModelMeta(**_UNKNOWN | _facts(embedder) | loading | fields)
    except ValueError as error:  # of pydantic: a headline, then two lines for each field
        _, field, problem, *_ = str(error).splitlines()
        raise InputError(f"model_meta: {field}: {problem.strip()}") from None


def model_meta_source(meta: ModelMeta) -> str:
    """Returns the text of a Python file that defines the entry, for mteb/models/model_implementations/ of mteb."""
    variable = re.sub(r"\W", "_", str(meta.name).rpartition("/")[2].lower())
    variable = variable if variable.isidentifier() else f"model_{variable}"
    imports = ["from mteb.models.model_meta import ModelMeta, ScoringFunction"]
    if meta.loader is not None:
        imports.insert(0, f"from {meta.loader.__module__} import {meta.loader.__name__}")
    return "\n".join([*imports, "", f"{variable} = {meta.to_python()}", ""])


def _as_encoder(embedder: LLM2VecGen | Encoder) -> Encoder:
    return Student(embedder) if isinstance(embedder, LLM2VecGen) else embedder


def _backbone_name(embedder: LLM2VecGen) -> str:
    return embedder.record.backbone if embedder.record else embedder.backbone.name


def _facts(embedder: LLM2VecGen) -> dict[str, Any]:
    """Returns the fields of ModelMeta that are known from a model directory and its backbone."""
    backbone, record = embedder.backbone, embedder.record
    architecture, extra = backbone.architecture, record.extra if record else {}
    trained = sum(leaf.size for leaf in jax.tree.leaves(embedder.trainable))
    size = jnp.dtype(record.dtype if record else backbone.dtype).itemsize
    dataset = model_card.dataset_id(extra)
    return {
        "n_parameters": architecture.num_parameters + trained,
        "n_embedding_parameters": (architecture.vocab_size + embedder.model.num_appended) * architecture.hidden_size,
        "memory_usage_mb": round((architecture.num_parameters * size + trained * 4) / 2**20),
        "max_tokens": embedder.max_seq_length,
        "embed_dim": embedder.get_embedding_dimension(),
        "license": backbone.license if backbone.license in get_args(Licenses) else None,
        "public_training_code": _CODE if extra.get("config") else None,
        "public_training_data": f"https://huggingface.co/datasets/{dataset}" if dataset else None,
        "adapted_from": model_card.hub_id(_backbone_name(embedder)),
        "citation": model_card.CITATION,
    }


def _prompts(pairs: Mapping[str, tuple[str, str]]) -> dict[str, str]:
    """Returns instructions as prompts of mteb's SentenceTransformers, by task, for the tasks that mteb has.

    The queries of a retrieval task are encoded as queries, all other texts except documents without a type.
    """
    prompts: dict[str, str] = {}
    for name, (query, document) in pairs.items():
        try:
            is_retrieval = mteb.get_task(name).metadata.simplified_task_type == "retrieval"
        except KeyError:
            continue
        texts = {f"{name}-query": query, f"{name}-document": document} if is_retrieval else {name: query}
        prompts |= {key: f"{text} " for key, text in texts.items() if text}
    return prompts


class _Folder:
    """An mteb task whose data is a task folder. kind: its type in mteb. build(): returns its dataset."""

    kind: str
    task: tasks.EvaluationTask
    build: Callable[[], Any]

    def load_data(self, *_: Any, **__: Any) -> None:
        self.dataset, self.data_loaded = self.build(), True


class Retrieval(_Folder, AbsTaskRetrieval):
    """Judgments are restricted to the queries within the limit."""

    kind = "Retrieval"

    def build(self):
        data = self.task.data
        query_ids = {row["id"] for row in data["queries"]}
        split = {
            "corpus": datasets.Dataset.from_list(data["corpus"]),
            "queries": datasets.Dataset.from_list(data["queries"]),
            "relevant_docs": {name: dict(grades) for name, grades in data["qrels"].items() if name in query_ids},
            "top_ranked": None,
        }
        return {"default": {"test": split}}


class STS(_Folder, AbsTaskSTS):
    """mteb scales scores linearly, which does not change correlations: the range in task.json is not needed."""

    kind = "STS"

    def build(self):
        rows = [row | {"score": float(row["score"])} for row in self.task.data["test"]]
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


class Classification(_Folder, AbsTaskClassification):
    """samples_per_label and n_experiments are read from task.json; default: one experiment on all training rows.

    mteb stops its classifier after 100 iterations: large, unscaled vectors score a point below the converged fit.
    """

    kind = "Classification"

    def build(self):
        train, test = self.task.data["train"], self.task.data["test"]
        self.samples_per_label = self.task.settings.get("samples_per_label", len(train))
        self.n_experiments = self.task.settings.get("n_experiments", 1)
        number = _label_numbers([*train, *test])
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list([row | {"label": number[row["label"]]} for row in rows])
                for split, rows in (("train", train), ("test", test))
            }
        )


class Clustering(_Folder, AbsTaskClustering):
    """Embeds all rows; each of mteb's ten experiments draws a sample of the same size (at most 16,384)."""

    kind = "Clustering"
    max_fraction_of_documents_to_embed = None

    def build(self):
        rows = self.task.data["test"]
        self.max_documents_per_cluster = min(AbsTaskClustering.max_documents_per_cluster, len(rows))
        number = _label_numbers(rows)
        columns = {"sentences": [row["text"] for row in rows], "labels": [number[row["label"]] for row in rows]}
        return datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})


CLASSES = {"retrieval": Retrieval, "sts": STS, "classification": Classification, "clustering": Clustering}


def folder_task(task: tasks.EvaluationTask) -> Any:
    """Returns the mteb task of a task folder of any type except safety_retrieval."""
    base = CLASSES[task.type]
    metadata = TaskMetadata(
        name=task.name,
        type=base.kind,
        main_score=task.main_metric,
        description=task.name,
        dataset={"path": f"local/{task.digest}", "revision": task.digest},
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
    )
    # mteb expects metadata as a class attribute and deletes an attribute of the instance.
    return type(base.__name__, (base,), {"task": task, "metadata": metadata})()


def hub_tasks(benchmark: str, names: Sequence[str] | None = None) -> list[Any]:
    """Returns the mteb tasks of a benchmark; names: only these."""
    benchmark_tasks = list(mteb.get_benchmark(benchmark))
    if names is None:
        return benchmark_tasks
    by_name = {task.metadata.name: task for task in benchmark_tasks}
    return [by_name[name] for name in names]


def hub_task(name: str, benchmark: str) -> Any:
    """Returns an mteb task by name, restricted to the languages of the benchmark if it is part of it."""
    with_name = [task for task in mteb.get_benchmark(benchmark) if task.metadata.name == name]
    try:
        return with_name[0] if with_name else mteb.get_task(name)
    except KeyError as error:
        raise InputError(f"tasks={name}: neither a folder nor a task of mteb ({error.args[0]})") from None


def score(encoder: MTEBEncoder, task: Any) -> dict[str, float | None]:
    """Returns {"main_score": x, metric: value, ...} of an mteb task, without undefined metrics.

    The values are means over the splits and languages of a hub task.
    """
    if not isinstance(task, _Folder):
        _fetch(task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn warns of undefined metrics and fits that did not converge
        try:
            result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
        except KeyError as error:
            if error.args[0] != task.metadata.main_score:
                raise
            raise InputError(
                f"task {task.metadata.name}: main_metric {error.args[0]!r} is not a metric of its type"
            ) from None
    return average([scores for split in result.task_results[0].scores.values() for scores in split])


def _fetch(task: Any) -> None:
    try:
        task.load_data()
    except Exception as error:  # the hub's clients raise exceptions of many types
        raise InputError(
            f"task {task.metadata.name}: its data cannot be fetched from the hub ({first_line(error)}). "
            "Check the network (neither HF_HUB_OFFLINE nor local_files_only may be set), or evaluate task folders"
        ) from None


def average(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Returns the means of the metrics that are finite in all results, main_score first (None if undefined)."""
    names = [name for name in results[0] if all(_is_finite(scores.get(name)) for scores in results)]
    means = {name: float(np.mean([scores[name] for scores in results])) for name in names}
    return {"main_score": means.pop("main_score", None)} | means


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _label_numbers(rows: Sequence[Mapping[str, Any]]) -> dict[Any, int]:
    return {label: number for number, label in enumerate(sorted({row["label"] for row in rows}, key=str))}
