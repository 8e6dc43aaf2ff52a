"""Evaluation during training: losses of held-out examples, scores of tasks, and the choice of the best step."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import numpy as np

from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError, nearest, not_finite
from llm2vec_gen_jax.common.files import fingerprint
from llm2vec_gen_jax.config import EvaluateConfig, TrainConfig
from llm2vec_gen_jax.data.examples import Examples
from llm2vec_gen_jax.evaluation import evaluate
from llm2vec_gen_jax.evaluation.encoders import Student
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.training.compression_trainer import CompressionTrainer
from llm2vec_gen_jax.training.examples import TrainingData
from llm2vec_gen_jax.training.step import jit_losses

LOSSES = ("loss", "reconstruction_loss", "alignment_loss")  # values of validation.metric that are minimized
TASKS = "tasks"  # name of the mean of the tasks' main scores


def resolve_jobs(config: TrainConfig, has_held_out: bool) -> list[evaluate.Job]:
    """Returns the jobs of validation.tasks, without loading a model.

    Raises InputError for invalid tasks, an unknown metric, and settings without anything to evaluate.
    """
    settings = config.validation
    if not has_held_out and not settings.tasks:
        for key in ("metric", "patience"):
            if getattr(settings, key):
                raise InputError(f"validation.{key} needs validation.responses or validation.tasks")
    jobs = _jobs(config)
    names = [TASKS, *(job.name for job in jobs)] if settings.tasks else []
    names += LOSSES if has_held_out else []
    if settings.metric is not None and settings.metric not in names:
        raise InputError(f"validation.metric={settings.metric}: unknown{nearest(settings.metric, names)}")
    return jobs


def _jobs(config: TrainConfig) -> list[evaluate.Job]:
    settings = config.validation
    if settings.tasks is None:
        return []
    try:
        return evaluate.resolve(EvaluateConfig(tasks=settings.tasks, limit=settings.limit))
    except InputError as error:
        raise InputError(f"validation.{error}" if str(error).startswith(("tasks=", "limit=")) else str(error)) from None


class Validation:
    """Evaluates the trainable tree of a run, and records which step is best.

    rows: the records {"step", name: value, ...} of the evaluated steps. digest: 16 hex digits that identify the
    held-out examples and the tasks.
    """

    def __init__(
        self,
        config: TrainConfig,
        trainer: CompressionTrainer,
        held_out: Examples | None,
        jobs: Sequence[evaluate.Job],
    ) -> None:
        self.settings, self.trainer, self.jobs = config.validation, trainer, jobs
        self.held_out = None if held_out is None else _HeldOut(config, trainer, held_out)
        self.metric = self.settings.metric or (TASKS if held_out is None else "loss")
        self.digest = fingerprint([held_out and held_out.digest, [job.record() for job in jobs]])
        self.rows: list[dict[str, Any]] = []

    @classmethod
    def of(
        cls, config: TrainConfig, data: TrainingData, trainer: CompressionTrainer, jobs: Sequence[evaluate.Job]
    ) -> Self | None:
        """Returns the Validation of a run; None without held-out records and jobs (`resolve_jobs`)."""
        return None if data.held_out is None and not jobs else cls(config, trainer, data.held_out, jobs)

    def is_due(self, step: int, last: int) -> bool:
        """Whether a step (from 1) of a run of `last` steps is evaluated."""
        return step % self.settings.every == 0 or step == last

    def evaluate(self, trainable: Any, beat: Callable[[str], None] = lambda _: None) -> dict[str, float]:
        """Returns {name: value}: losses of the held-out examples, main scores of the tasks and their mean.

        Losses are means over batches; the last examples that do not fill a batch are left out. beat: called with a
        description before each batch and each task. All processes of a run must call it.
        """
        values = self.held_out.losses(trainable, beat) if self.held_out else {}
        model = LLM2VecGen(self.trainer.model, trainable, self.trainer.backbone)
        scores: dict[str, float] = {}
        for job in self.jobs:
            beat(job.name)
            encoder = Student(model, max_length=job.max_length)
            score = evaluate.score(job, encoder, encoder)["main_score"]
            if score is None:
                raise InputError(f"validation.tasks: the score of {job.name} is undefined. Leave out this task")
            scores[job.name] = float(score)
        if scores:
            values |= scores | {TASKS: float(np.mean(list(scores.values())))}
        return values

    def record_of(self, step: int) -> dict[str, Any]:
        """Returns the record of a step, empty if it was not evaluated."""
        return next((row for row in self.rows if row["step"] == step), {})

    @property
    def best_step(self) -> int | None:
        """The first step with the best value of the metric; None before the first evaluation."""
        if not self.rows:
            return None
        sign = 1 if self.metric in LOSSES else -1
        best: int = min(self.rows, key=lambda row: sign * row[self.metric])["step"]
        return best

    @property
    def kept_step(self) -> int | None:
        """The step whose model is the result: the best one, or None for the last."""
        return self.best_step if self.settings.keep_best else None

    @property
    def is_exhausted(self) -> bool:
        """Whether the last validation.patience evaluations were not better than one before."""
        since_best = sum(row["step"] > self.best_step for row in self.rows)
        return bool(self.settings.patience) and since_best >= self.settings.patience


class _HeldOut:
    """Held-out examples and the programs that compute their losses."""

    def __init__(self, config: TrainConfig, trainer: CompressionTrainer, examples: Examples) -> None:
        shards = sharding.batch_shards(trainer.backbone.mesh)
        if len(examples) < shards:
            raise InputError(f"validation.responses: {len(examples)} records for {shards} data shards are too few")
        size = min(config.train.batch_size, len(examples) // shards * shards)
        train = dataclasses.replace(config.train, batch_size=size)
        data = dataclasses.replace(config.data, responses=config.validation.responses)
        config = dataclasses.replace(config, train=train, data=data)
        self.trainer = CompressionTrainer(config, trainer.backbone, examples)
        if self.trainer.model.embedding_size != trainer.model.embedding_size:
            raise InputError("validation.responses: the targets have another size than those of data.responses")
        self.program = jit_losses(config, self.trainer.model)

    def losses(self, trainable: Any, beat: Callable[[str], None]) -> dict[str, float]:
        backbone, rows = self.trainer.backbone, []
        for step in range(self.trainer.schedule.batches_per_epoch):
            beat("held-out examples")
            on_mesh = self.trainer.prefill(sharding.put_batch(self.trainer.batches[step], backbone.mesh))
            rows.append(self.program(trainable, backbone.frozen, on_mesh))
        values = jax.device_get(rows)
        for step, row in enumerate(values):
            if not np.isfinite(row["loss"]):
                raise not_finite(f"validation.responses: a loss of {self.trainer.describe(step)}", backbone.dtype)
        return {name: float(np.mean([row[name] for row in values], dtype=np.float64)) for name in values[0]}
