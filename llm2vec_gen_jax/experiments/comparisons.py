"""The comparisons of the study: trainings that override a few settings of the recipe, selected by name."""

import pathlib
from typing import Any

from llm2vec_gen_jax.common.errors import InputError, nearest
from llm2vec_gen_jax.config import HUB_KEYS, ReproduceConfig, TrainConfig, options
from llm2vec_gen_jax.training.metrics import read_metrics

# `key=value` overrides of `train`, applied after the recipe.
PAPER_COMPARISONS: dict[str, list[str]] = {
    "reconstruction-only": ["loss.alignment=0"],
    "alignment-only": ["loss.reconstruction=0"],
    **{f"tokens-{number}": [f"compression.num_tokens={number}"] for number in (1, 2, 5, 20, 50)},
    "thoughts-10": ["compression.num_thought_tokens=10"],
    "lora-8": ["lora.rank=8"],
}
SUPERVISED_TEACHER = "supervised-teacher"
# Not in the paper and not in any budget: run only when named.
EXTRA_COMPARISONS: dict[str, list[str]] = {
    "cosine": ["loss.alignment_function=cosine"],
    "centred": ["teacher.centre=true"],
    "centred-cosine": ["teacher.centre=true", "loss.alignment_function=cosine"],
    "half-whitened": ["teacher.whiten=0.5"],
    "whitened": ["teacher.whiten=1"],
    "sampled-4": ["teacher.average=true"],
    "ridge": ["train.ridge_examples=1000000"],  # at most one epoch
    "alternating": ["train.ridge_examples=4096", "train.ridge_every=200", "optimizer.head_learning_rate=0"],
    **{f"query-{weight}": [f"teacher.query_weight={weight}"] for weight in (0.5, 0.75, 1)},
    "forms": ["loss.repeat=1", "loss.repeat_instructions=configs/evaluate/instructions.txt"],
    "finished-only": ["data.finished_only=true"],
    "alignment-10": ["loss.alignment=10"],
    "reconstruction-10": ["loss.reconstruction=10"],
    "longer": [],
}
STEP_MULTIPLIERS = {"longer": 3}
# Responses per query; the number of queries is divided by it, so that the number of responses stays the same.
RESPONSES_PER_QUERY = {"sampled-4": 4}
BUDGET_COMPARISONS = {
    "minutes": ["alignment-only", "reconstruction-only", "tokens-1"],
    "hours": [name for name in PAPER_COMPARISONS if name != "lora-8"],
    "full": list(PAPER_COMPARISONS),
}


def resolve_comparisons(config: ReproduceConfig) -> dict[str, list[str]]:
    """Returns {name: overrides} of config.comparisons, "base" (no overrides) first.

    Raises InputError for an unknown name and for overrides that `train` does not accept.
    """
    known = PAPER_COMPARISONS | EXTRA_COMPARISONS
    if config.supervised_teacher:
        teacher = ["teacher.kind=sentence_transformers", f"teacher.path={config.supervised_teacher}"]
        known[SUPERVISED_TEACHER] = [*teacher, "teacher.adapters=[]"]
    comparisons: dict[str, list[str]] = {"base": []}
    for entry in config.comparisons:
        name, colon, overrides = entry.partition(":")
        if entry == "budget":
            names = BUDGET_COMPARISONS[config.budget] + [SUPERVISED_TEACHER] * (SUPERVISED_TEACHER in known)
            comparisons |= {name: known[name] for name in names}
        elif colon and name.strip() and "/" not in name and name.strip() not in known | comparisons:
            comparisons[name.strip()] = overrides.split()
        elif not colon and name in known:
            comparisons[name] = known[name]
        elif not colon and name == SUPERVISED_TEACHER:
            raise InputError(f"comparisons={SUPERVISED_TEACHER} needs supervised_teacher=FOLDER_OR_HUB_ID")
        else:
            suggestion = nearest(name, [*known, "budget"])
            raise InputError(f"comparisons={entry}: expected a known name or a new 'NAME: key=value ...'{suggestion}")
    for overrides_of_run in (config.recipe, *comparisons.values()):
        if keys := set(HUB_KEYS) & {override.partition("=")[0] for override in overrides_of_run}:
            raise InputError(f"recipe and comparisons: {min(keys)} is not a key of a run. Pass {min(keys)}= by itself")
        options.load(TrainConfig, None, overrides_of_run)  # report a misspelled key before any work
    return comparisons


def final_losses(run: pathlib.Path) -> dict[str, Any]:
    """Returns the last logged step of a run directory and its losses: `step`, `loss` and every `*_loss`.

    Without a logged step (train.steps=0): only `step`, 0.
    """
    if not (run / "metrics.jsonl").exists():
        return {"step": 0}
    last = read_metrics(run)[-1]
    return {name: last[name] for name in ("step", "loss", *(name for name in last if name.endswith("_loss")))}
