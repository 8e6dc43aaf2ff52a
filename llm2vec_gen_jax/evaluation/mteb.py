"""mteb's side of an evaluation: an encoder and tasks that `mteb.evaluate` takes. Imports mteb, and so torch.

mteb.evaluate(MTEBEncoder(Student(LLM2VecGen.from_pretrained(path))), mteb.get_tasks(["NFCorpus"]))
"""

import math
import warnings

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


class MTEBEncoder(AbsEncoder):
    """Encoders as one mteb model, compared by cosine.

    query, document: objects with `encode(texts, instruction) -> (n, E)`; document is the query's unless given.
    instructions: task name -> (query instruction, document instruction); a task that is not there is an InputError.
    As published, whatever is not a document (a sentence of a pair, a text to classify) gets the query instruction, and
    texts are stripped.
    """

    def __init__(self, query, document=None, instructions=None, name="llm2vec_gen_jax/embedder"):
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

    def encode(self, inputs, *, task_metadata, hf_split, hf_subset, prompt_type=None, **_):
        """What mteb calls: returns the vectors (n, E) of the batches of a DataLoader.

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
    """A tasks.Task in the place of a dataset on the hub. `kind`: what mteb calls its type. build(): its dataset."""

    kind: str
    task: tasks.EvaluationTask

    def load_data(self, *_, **__):
        self.dataset, self.data_loaded = self.build(), True


class Retrieval(_Folder, AbsTaskRetrieval):
    """Judgements of queries that a limit left out are left out too."""

    kind = "Retrieval"

    def build(self):
        data = self.task.data
        asked = {row["id"] for row in data["queries"]}
        split = {
            "corpus": datasets.Dataset.from_list(data["corpus"]),
            "queries": datasets.Dataset.from_list(data["queries"]),
            "relevant_docs": {name: dict(grades) for name, grades in data["qrels"].items() if name in asked},
            "top_ranked": None,
        }
        return {"default": {"test": split}}


class STS(_Folder, AbsTaskSTS):
    """mteb's scaling of the scores is linear and so changes no correlation: task.json's range is not needed."""

    kind = "STS"

    def build(self):
        rows = [row | {"score": float(row["score"])} for row in self.task.data["test"]]
        return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})


class Classification(_Folder, AbsTaskClassification):
    """samples_per_label and n_experiments are task.json's; without them, one experiment on all training rows.

    mteb's classifier stops after 100 iterations: large, unscaled vectors score a point below the converged fit.
    """

    kind = "Classification"

    def build(self):
        train, test = self.task.data["train"], self.task.data["test"]
        self.samples_per_label = self.task.settings.get("samples_per_label", len(train))
        self.n_experiments = self.task.settings.get("n_experiments", 1)
        number = _numbers([*train, *test])
        return datasets.DatasetDict(
            {
                split: datasets.Dataset.from_list([row | {"label": number[row["label"]]} for row in rows])
                for split, rows in (("train", train), ("test", test))
            }
        )


class Clustering(_Folder, AbsTaskClustering):
    """All rows are embedded, and each of mteb's ten experiments samples as many (16,384 at most)."""

    kind = "Clustering"
    max_fraction_of_documents_to_embed = None

    def build(self):
        rows = self.task.data["test"]
        self.max_documents_per_cluster = min(AbsTaskClustering.max_documents_per_cluster, len(rows))
        number = _numbers(rows)
        columns = {"sentences": [row["text"] for row in rows], "labels": [number[row["label"]] for row in rows]}
        return datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})


CLASSES = {"retrieval": Retrieval, "sts": STS, "classification": Classification, "clustering": Clustering}


def folder_task(task):
    """Returns the mteb task of a tasks.Task (any type but safety_retrieval)."""
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
    # To mteb, metadata is an attribute of the class: it deletes an instance's own.
    return type(base.__name__, (base,), {"task": task, "metadata": metadata})()


def hub_tasks(benchmark, names=None):
    """Returns the mteb tasks of a benchmark, or those with the given names."""
    found = list(mteb.get_benchmark(benchmark))
    if names is None:
        return found
    by_name = {task.metadata.name: task for task in found}
    return [by_name[name] for name in names]


def hub_task(name, benchmark):
    """Returns one mteb task by its name: as the benchmark has it (its languages), else whole."""
    with_name = [task for task in mteb.get_benchmark(benchmark) if task.metadata.name == name]
    try:
        return with_name[0] if with_name else mteb.get_task(name)
    except KeyError as error:
        raise InputError(f"tasks={name}: no such folder, and mteb says: {error.args[0]}") from None


def score(encoder, task):
    """Returns {"main_score": x, metric: value, ...} of an MTEBEncoder on an mteb task; undefined metrics are left out.

    Over several splits or languages of a hub task, the mean.
    """
    if not isinstance(task, _Folder):
        _fetch(task)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's, of undefined metrics and unfinished fits, as on the hub
        try:
            result = mteb.evaluate(encoder, task, cache=None, co2_tracker=False, show_progress_bar=False)
        except KeyError as error:
            if error.args[0] != task.metadata.main_score:
                raise
            raise InputError(f"task {task.metadata.name}: main_metric {error.args[0]!r} is none of its type") from None
    found = [scores for split in result.task_results[0].scores.values() for scores in split]
    return average(found)


def _fetch(task):
    try:
        task.load_data()
    except Exception as error:  # the hub's clients raise many types; all of them mean that it cannot be had
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(
            f"task {task.metadata.name}: its data cannot be fetched from the hub ({reason}). "
            "Check the network (HF_HUB_OFFLINE must not be set), or evaluate task folders"
        ) from None


def average(found):
    """Returns the mean of each number that all of a list of score dicts have and that is finite; main_score first."""
    names = [name for name in found[0] if all(_is_finite(scores.get(name)) for scores in found)]
    means = {name: float(np.mean([scores[name] for scores in found])) for name in names}
    return {"main_score": means.pop("main_score", None)} | means


def _is_finite(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(rows):
    return {label: number for number, label in enumerate(sorted({row["label"] for row in rows}, key=str))}
