"""Settings of `reproduce`: what the study runs on, and its sizes."""

import dataclasses
from typing import ClassVar

from llm2vec_gen_jax.config.common import BackboneConfig, HubConfig, KernelsConfig, MeshConfig, section, setting
from llm2vec_gen_jax.config.training import TeacherConfig


@dataclasses.dataclass
class SizesConfig:
    """Sizes of a study; null: the budget's value (BUDGETS)."""

    queries: int | None = setting(None, "number of training queries", least=1)
    held_out: int | None = setting(None, "number of additional held-out queries whose embeddings are decoded", least=2)
    max_new_tokens: int | None = setting(None, "maximum tokens per response", least=1)
    steps: int | None = setting(None, "training steps of the headline run", least=1)
    schedule_steps: int | None = setting(
        None, "steps after which the headline run's learning rate would reach zero", least=1
    )
    ablation_steps: int | None = setting(
        None, "training steps per comparison; the schedule is scaled accordingly", least=1
    )
    batch_size: int | None = setting(None, "training batch size", least=1)
    learning_rate: float | None = setting(None, "peak learning rate")
    seeds: int | None = setting(None, "number of seeds of the headline run", least=1)
    limit: int | None = setting(None, "maximum number of queries or test rows per task; 0: all")
    documents: int | None = setting(
        None,
        "maximum number of documents per retrieval task, including all judged ones, and of training rows per "
        "classification task; 0: all",
    )
    hyde_limit: int | None = setting(None, "maximum number of queries or test rows per task for HyDE; 0: all")
    hyde_tokens: int | None = setting(None, "maximum tokens per HyDE answer", least=1)
    decoded_tokens: int | None = setting(None, "maximum tokens per decoded text", least=1)
    timed: int | None = setting(None, "number of queries for measuring the cost per query", least=1)


# The sizes trade cost for precision; they are not tuned. full: as published, with 160,000 queries.
BUDGETS = {
    "minutes": SizesConfig(
        queries=120,
        held_out=16,
        max_new_tokens=64,
        steps=30,  # as many as ablation_steps: one run is the headline and the base of the comparisons
        schedule_steps=30,
        ablation_steps=30,
        batch_size=8,
        learning_rate=1e-3,
        seeds=1,
        limit=32,
        documents=50,
        hyde_limit=32,  # as limit: teacher and student are evaluated once
        hyde_tokens=48,
        decoded_tokens=48,
        timed=8,
    ),
    "hours": SizesConfig(
        queries=4000,
        held_out=100,
        max_new_tokens=160,
        steps=600,
        schedule_steps=600,
        ablation_steps=200,
        batch_size=16,
        learning_rate=1e-3,
        seeds=3,
        limit=500,
        documents=0,
        hyde_limit=100,
        hyde_tokens=128,
        decoded_tokens=128,
        timed=32,
    ),
    "full": SizesConfig(
        queries=160_000,
        held_out=500,
        max_new_tokens=500,
        steps=5000,
        schedule_steps=20_000,
        ablation_steps=5000,
        batch_size=32,
        learning_rate=5e-4,
        seeds=3,
        limit=0,
        documents=0,
        hyde_limit=0,
        hyde_tokens=256,
        decoded_tokens=256,
        timed=64,
    ),
}


def _shipped_teacher() -> TeacherConfig:
    return TeacherConfig(adapters=["smollm2-135m-mntp", "smollm2-135m-simcse"])


@dataclasses.dataclass
class ReproduceConfig(HubConfig):
    """`python -m launch.reproduce`: run the complete study: queries, responses, training, evaluation, tables and plots.

    Repeat the command to resume; finished stages are skipped. Settings are chosen on development tasks (STS
    development sets, half of the training rows of classification tasks, half of the queries of retrieval tasks); the
    final table covers the remaining data. tasks=DIR contains task folders as for `evaluate`.

    comparisons= from the paper: tokens-1, -2, -5, -20, -50 (K), thoughts-10, alignment-only, reconstruction-only,
    lora-8, supervised-teacher; additional: cosine, centred, centred-cosine, half-whitened, whitened, sampled-4, ridge,
    alternating, query-0.5, query-0.75, query-1, forms, finished-only, alignment-10, reconstruction-10, longer; custom:
    "NAME: key=value key=value", with keys of `train`.
    """

    REQUIRED: ClassVar = ("tasks",)
    EXAMPLE: ClassVar = "tasks=tasks budget=minutes output=runs/study"

    backbone: BackboneConfig = section(BackboneConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=_shipped_teacher)
    output: str = setting("runs/study", "output directory; repeat the command to resume", path=True)
    budget: str = setting("minutes", "size of the study", ("minutes", "hours", "full"))
    sizes: SizesConfig = section(SizesConfig)
    tasks: str | None = setting(None, "folder of task folders", path=True)
    queries: str | None = setting(None, "queries, as for `respond`; null: generated by the LLM", path=True)
    comparisons: list[str] = setting(["budget"], "runs to compare; budget: comparisons of the paper within the budget")
    recipe: list[str] = setting([], "key=value settings of `train` for every run, including the headline run")
    supervised_teacher: str | None = setting(
        None, "folder or hub id of a sentence-transformers model, for comparisons=supervised-teacher", path=True
    )
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)
