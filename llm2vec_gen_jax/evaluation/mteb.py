"""Encoders and task folders as models and tasks of mteb. Imports mteb, and therefore torch.

mteb.evaluate(MTEBEncoder(Student(LLM2VecGen.from_pretrained(path))), mteb.get_tasks(["NFCorpus"]))
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets  # noqa: F401  before mteb, whose own import of the hub's client is circular without it
import mteb
import numpy as np
from mteb.abstasks import AbsTaskClassification, AbsTaskClustering, AbsTaskRetrieval, AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from mteb.types import PromptType

from llm2vec_gen_jax.common.errors import InputError, nearest
from llm2vec_gen_jax.evaluation import instructions as instructions_lib
from llm2vec_gen_jax.evaluation import tasks
from llm2vec_gen_jax.evaluation.encoders import Encoder


class MTEBEncoder(AbsEncoder):
    """An mteb model with one encoder for queries and one for documents (default: the same). Similarity is the cosine.

    instructions: {task name: (query instruction, document instruction)}; default: the published ones.
    As published, all texts that are not documents (sentences of a pair, texts to classify) get the query instruction,
    and texts are stripped.
    """

    def __init__(
        self,
        query: Encoder,
        document: Encoder | None = None,
        instructions: Mapping[str, tuple[str, str]] | None = None,
        name: str = "llm2vec_gen_jax/embedder",
    ) -> None:
        if instructions is None:
            instructions = instructions_lib.read().pairs()
        self.query, self.document, self.instructions = query, document or query, instructions
        unknown = (
            "release_date languages n_parameters memory_usage_mb max_tokens embed_dim license public_training_code "
            "public_training_data training_datasets"
        )
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=name,
            revision="none",
            open_weights=True,
            framework=["JAX"],
            similarity_fn_name="cosine",
            use_instructions=True,
            **dict.fromkeys(unknown.split()),
        )

    def encode(
        self, inputs: Any, *, task_metadata: Any, hf_split: str, hf_subset: str, prompt_type: Any = None, **_: Any
    ) -> np.ndarray:
        """Returns the embeddings (n, E) of the texts of a DataLoader. Called by mteb.

        Raises InputError for a task without instructions.
        """
        name = task_metadata.name
        if name not in self.instructions:
            raise InputError(f"no instruction for task {name}{nearest(name, self.instructions)}")
        query, document = self.instructions[name]
        texts = [text.strip() for batch in inputs for text in batch["text"]]
        if prompt_type == PromptType.document:
            return self.document.encode(texts, document)
        return self.query.encode(texts, query)


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
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"task {task.metadata.name}: its data cannot be fetched from the hub ({reason}). "
            "Check the network (HF_HUB_OFFLINE must not be set), or evaluate task folders"
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
