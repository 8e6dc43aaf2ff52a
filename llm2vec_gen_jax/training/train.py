"""Training: data and targets, the training loop, and the finished model directory."""

import functools
import logging
import pathlib
import shutil
from collections.abc import Callable, Sequence
from typing import Any

import jax

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import require_written
from llm2vec_gen_jax.common.hub import offline_datasets
from llm2vec_gen_jax.config import TrainConfig, hub_options, options
from llm2vec_gen_jax.evaluation.evaluate import Job
from llm2vec_gen_jax.parallel import processes
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone
from llm2vec_gen_jax.teachers import documents
from llm2vec_gen_jax.training.compression_trainer import CompressionTrainer
from llm2vec_gen_jax.training.examples import TrainingData, load_training_data
from llm2vec_gen_jax.training.loop import Run, TrainingCallback
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.run_directory import FREE_KEYS, prepare_run_directory
from llm2vec_gen_jax.training.step import check_microbatches
from llm2vec_gen_jax.training.validation import Validation, resolve_jobs

logger = logging.getLogger(__name__)


def train(config: TrainConfig, show_progress: bool = True, backbone: LoadedBackbone | None = None) -> pathlib.Path:
    """Runs or resumes the training of a TrainConfig. Returns the path of the finished model directory.

    backbone: the config's backbone, if it is already loaded.
    Raises InputError for invalid configuration or data, FloatingPointError naming the step of a non-finite loss.
    """
    options.require(config)
    return train_on(config, lambda: load_training_data(config, backbone), show_progress)


def train_on(
    config: TrainConfig,
    load: Callable[[], TrainingData],
    show_progress: bool = True,
    callbacks: Sequence[TrainingCallback] = (),
    has_held_out: bool = False,
) -> pathlib.Path:
    """`train` on the data that load() returns; it is called after the run directory is claimed.

    has_held_out: whether the data has held-out examples without validation.responses.
    """
    options.require(config, "train.output")
    if config.teacher.adapters and config.teacher.kind != "llm2vec":
        raise InputError(f"teacher.adapters are for teacher.kind=llm2vec, not for {config.teacher.kind}: remove them")
    if not config.train.steps and not config.train.ridge_examples:
        raise InputError("train.steps=0: nothing to train. Set train.ridge_examples to solve the alignment head only")
    if config.train.ridge_every and not config.train.ridge_examples:
        raise InputError(
            f"train.ridge_every={config.train.ridge_every}: set train.ridge_examples, the number of examples"
        )
    check_microbatches(config)
    documents.check(config)
    jobs = resolve_jobs(config, has_held_out or config.validation.responses is not None)
    with processes.locked(str(config.train.output), "train.output"), offline_datasets(config.local_files_only):
        resuming = prepare_run_directory(pathlib.Path(str(config.train.output)), config)
        if config.train.init_from and not resuming:
            # Reports a wrong path before the targets are computed.
            model_directory.local_folder(config.train.init_from, hub_options(config))
        return _train(config, load(), jobs, resuming, show_progress, callbacks)


def _train(
    config: TrainConfig,
    data: TrainingData,
    jobs: Sequence[Job],
    resuming: bool,
    show_progress: bool,
    callbacks: Sequence[TrainingCallback],
) -> pathlib.Path:
    output = pathlib.Path(str(config.train.output))
    final = output / "model"
    trainer = CompressionTrainer(config, data.backbone, data.examples)
    validation = Validation.of(config, data, trainer, jobs)
    run = Run(trainer, config.train, config.optimizer, data.backbone.mesh, output, config, validation, callbacks)

    def is_written(step: int) -> bool:
        return bool(processes.run_on_process_0(lambda: _content(final)) == [step, data.examples.digest])

    is_solved = resuming and not config.train.steps and is_written(0)  # the alignment head, and nothing else is asked
    if not is_solved:
        run.start(resuming)
    if is_solved or (run.is_finished and is_written(run.final_step)):
        logger.info(f"{final}: already finished")
        return final
    if config.train.steps:
        run.loop(show_progress)
    trainable = run.state.trainable
    model_directory.check_finite(trainable, str(output))
    # Without process settings, tracking and speed: equal runs write equal directories.
    extra: dict[str, Any] = {
        "config": {key: value for key, value in options.to_dict(config).items() if key not in FREE_KEYS[""]},
        "data": {"responses": config.data.responses, "examples": len(data.examples), "digest": data.examples.digest},
        "metrics": processes.run_on_process_0(lambda: _metrics_of(output, run.final_step))
        if config.train.steps
        else {"step": 0},
    }
    if validation and (scores := validation.record_of(run.final_step)):
        extra["validation"] = scores
    if final.exists() and jax.process_index() == 0:
        shutil.rmtree(final)  # of a shorter run that was resumed
    keep = functools.partial(documents.save, config=config, transform=data.transform) if config.teacher.keep else None
    model_directory.save(final, trainer.model, trainable, data.backbone, extra, teacher=keep)
    processes.barrier("model directory")
    if jax.process_index() == 0:
        require_written(output / "config.yaml", *([output / "metrics.jsonl"] if config.train.steps else []), final)
    return final


def _content(model: pathlib.Path) -> list[Any]:
    """Returns [step, digest of the data] of a run's model directory; [] without one. The step is 0 if it has none."""
    if not model.exists():
        return []
    extra = model_directory.read_model_directory(model).extra
    return [(extra.get("metrics") or {}).get("step", 0), (extra.get("data") or {}).get("digest")]


def _metrics_of(output: pathlib.Path, step: int) -> dict[str, Any]:
    """Returns the logged metrics of a step. Without the speed."""
    row: dict[str, Any] = next((row for row in read_metrics(output) if row["step"] == step), {})
    return {name: value for name, value in row.items() if name != "tokens_per_second"}
