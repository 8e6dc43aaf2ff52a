"""The settings of the whole study: what it runs on, and how large it is."""

import dataclasses

from llm2vec_gen_jax.config.common import BackboneConfig, KernelsConfig, MeshConfig, section, setting
from llm2vec_gen_jax.config.training import TeacherConfig


@dataclasses.dataclass
class SizesConfig:
    """How large a study is; null: as the budget says (BUDGETS)."""

    queries: int | None = setting(None, "queries to train on", least=1)
    held_out: int | None = setting(None, "more of them, never trained on, whose embeddings are decoded", least=2)
    max_new_tokens: int | None = setting(None, "tokens of a response", least=1)
    steps: int | None = setting(None, "training steps of the headline", least=1)
    schedule_steps: int | None = setting(None, "after which the learning rate would be zero", least=1)
    ablation_steps: int | None = setting(
        None, "training steps of each comparison (their schedule: in proportion)", least=1
    )
    batch_size: int | None = setting(None, "training batch", least=1)
    learning_rate: float | None = setting(None, "peak")
    seeds: int | None = setting(None, "trainings of the headline", least=1)
    limit: int | None = setting(None, "queries or test rows of a task; 0: all")
    documents: int | None = setting(
        None, "of a retrieval task, the judged ones among them, and training rows of a classification task; 0: all"
    )
    hyde_limit: int | None = setting(None, "queries or test rows of a task that HyDE answers; 0: all")
    hyde_tokens: int | None = setting(None, "tokens of an answer of HyDE", least=1)
    decoded_tokens: int | None = setting(None, "tokens of a decoded text", least=1)
    timed: int | None = setting(None, "queries whose cost is measured", least=1)


# Each number is a choice of cost, none a finding. full: as published, on 160,000 queries.
BUDGETS = {
    "minutes": SizesConfig(
        queries=240,
        held_out=16,
        max_new_tokens=64,
        steps=120,
        schedule_steps=120,
        ablation_steps=60,
        batch_size=8,
        learning_rate=1e-3,
        seeds=1,
        limit=50,
        documents=200,
        hyde_limit=10,
        hyde_tokens=64,
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


def _shipped_teacher():
    return TeacherConfig(adapters=["smollm2-135m-mntp", "smollm2-135m-simcse"])


@dataclasses.dataclass
class ReproduceConfig:
    """`python -m launch.reproduce`: the whole study: queries, responses, trainings, scores, tables and plots.

    Repeat the command to go on after a kill; what is finished is skipped. Settings are chosen on development tasks
    (STS development sets, halves of the training rows of classification, half of the queries of retrieval), the final
    table is of the rest. tasks=DIR holds task folders as for `evaluate`.

    comparisons= of the paper: tokens-1, -2, -5, -20, -50 (K), thoughts-10, alignment-only, reconstruction-only, lora-8,
    supervised-teacher; beyond it: cosine, centred, centred-cosine, half-whitened, whitened, sampled-4, ridge,
    finished-only, alignment-10, reconstruction-10, longer; your own: "NAME: key=value key=value", keys of `train`.
    """

    backbone: BackboneConfig = section(BackboneConfig)
    teacher: TeacherConfig = dataclasses.field(default_factory=_shipped_teacher)
    output: str = setting("runs/study", "directory for everything; repeat the command to resume", path=True)
    budget: str = setting("minutes", "how large the study is", ("minutes", "hours", "full"))
    sizes: SizesConfig = section(SizesConfig)
    tasks: str | None = setting(None, "a folder of task folders", path=True)
    queries: str | None = setting(None, "JSONL[.gz] of {question}; null: the LLM writes them", path=True)
    comparisons: list[str] = setting(["budget"], "trainings that are compared; budget: those of the paper that it pays")
    recipe: list[str] = setting([], "key=value of `train` for every training, the headline too")
    supervised_teacher: str | None = setting(
        None, "folder or hub id of a sentence-transformers model, for comparisons=supervised-teacher", path=True
    )
    kernels: KernelsConfig = section(KernelsConfig)
    mesh: MeshConfig = section(MeshConfig)
