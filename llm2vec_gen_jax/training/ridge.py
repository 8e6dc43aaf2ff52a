"""Initialization of the alignment head by ridge regression of the targets on the untrained compression states.

Not in the paper, whose randomly initialized head takes thousands of steps for this linear problem.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError, not_finite
from llm2vec_gen_jax.data import batches
from llm2vec_gen_jax.parallel import preemption, processes, sharding

if TYPE_CHECKING:
    from llm2vec_gen_jax.training.compression_trainer import CompressionTrainer

logger = logging.getLogger(__name__)

_PENALTIES = 10.0 ** np.arange(-6, 3)  # relative to the mean variance of the inputs
_HELD_OUT = 10  # every tenth batch is held out to choose the penalty


def solve_alignment_head(
    trainer: CompressionTrainer, trainable: dict[str, Any], examples: int, beat: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Returns a trainable tree with the alignment head solved on the first batches of the trainer's schedule.

    examples: number of examples, at most one epoch. The penalty minimizes the error on held-out batches; the solution
    uses all batches. beat: called with a description before each batch. All processes call it and get the same result.
    Raises InputError for too few examples, and for a query whose states are not finite.
    """
    schedule, mesh, frozen = trainer.schedule, trainer.backbone.mesh, trainer.backbone.frozen
    replicated = sharding.replicated(mesh)
    count = min(-(-examples // schedule.batch_size), schedule.batches_per_epoch)
    if count < 2:
        raise InputError(f"train.ridge_examples={examples}: at least two batches of {schedule.batch_size} are needed")
    D, E = trainer.model.architecture.hidden_size, trainer.model.embedding_size
    sums = {part: sharding.put_replicated(_zero_sums(D, E), mesh) for part in ("fit", "held out")}
    means = jax.jit(functools.partial(_means, trainer.model), out_shardings=replicated)
    add = jax.jit(functools.partial(_add, trainer.model), donate_argnums=0, out_shardings=replicated)
    origin: Any = None
    with progress.bar(count * schedule.batch_size, "example", "ridge") as bar:
        for number, batch in enumerate(batches.iterate(trainer.batches, 0, count)):
            beat("the ridge regression")
            if processes.stop_requested():
                raise preemption.Stopped("stopped on request, while the alignment head was being solved")
            batch = _prefill(trainer, batch)
            if origin is None:  # centers the values, because their squares are summed in float32
                origin = means(trainable, frozen, batch)
            part = "fit" if number % _HELD_OUT else "held out"
            sums[part] = add(sums[part], origin, trainable, frozen, batch)
            bar.update(schedule.batch_size)
    fit, held_out = (jax.tree.map(lambda x: np.asarray(sharding.to_numpy(x), np.float64), sums[part]) for part in sums)
    if not all(np.isfinite(x).all() for x in jax.tree.leaves((fit, held_out))):
        _name_not_finite(trainer, trainable, count)
    errors = [_error(_solve(fit, penalty), held_out) for penalty in _PENALTIES]
    best = int(np.argmin(errors))
    kernel_DE, bias_E = _solve(jax.tree.map(np.add, fit, held_out), _PENALTIES[best])
    x_D, y_E = (np.asarray(sharding.to_numpy(x), np.float64) for x in origin)
    head = {"kernel": kernel_DE, "bias": bias_E + y_E - x_D @ kernel_DE}
    variance = held_out["yy"] - np.square(held_out["y"]).sum() / held_out["n"]
    logger.info(
        f"alignment head: solved on {count * schedule.batch_size} examples, penalty {_PENALTIES[best]:g}, "
        f"explains {1 - errors[best] / variance:.3f} of the targets' variance on those held out"
    )
    head = {name: value.astype(np.float32) for name, value in head.items()}
    return trainable | {"alignment": sharding.put_replicated(head, mesh)}


def _prefill(trainer, batch):
    batch = {name: batch[name] for name in ("query", "query_lengths", "target")}
    return trainer.prefill(sharding.put_batch(batch, trainer.backbone.mesh))


def _name_not_finite(trainer, trainable, count):
    """Raises InputError naming the first query of `count` batches whose states are not finite."""
    frozen, replicated = trainer.backbone.frozen, sharding.replicated(trainer.backbone.mesh)
    inputs = jax.jit(functools.partial(_inputs, trainer.model), out_shardings=replicated)
    for step, batch in enumerate(batches.iterate(trainer.batches, 0, count)):
        finite_B = np.isfinite(sharding.to_numpy(inputs(trainable, frozen, _prefill(trainer, batch)))).all(axis=1)
        if not finite_B.all():
            row = trainer.examples.row[trainer.schedule[step].rows[np.argmin(finite_B)]]
            name = f"{trainer.config.data.responses}: the question of row {row} (from 0)"
            raise not_finite(name, trainer.backbone.dtype)
    raise InputError("train.ridge_examples: sums over the examples exceed float32. Train without it")


def _zero_sums(D, E):
    shapes = {"n": (), "x": (D,), "y": (E,), "xx": (D, D), "xy": (D, E), "yy": ()}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}


def _inputs(model, trainable, frozen, batch):
    """Returns the input of the alignment head: the mean soft prompts (B, D) of a batch."""
    _, soft_prompts_BKD = model.embed(trainable, frozen, batch["query"], batch["query_lengths"])
    return soft_prompts_BKD.mean(axis=1)


def _means(model, trainable, frozen, batch):
    return _inputs(model, trainable, frozen, batch).mean(axis=0), batch["target"].mean(axis=0)


def _add(model, sums, origin, trainable, frozen, batch):
    x_BD = _inputs(model, trainable, frozen, batch) - origin[0]
    y_BE = batch["target"] - origin[1]
    product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    new = {"n": jnp.float32(len(x_BD)), "x": x_BD.sum(axis=0), "y": y_BE.sum(axis=0)}
    new |= {"xx": product(x_BD.T, x_BD), "xy": product(x_BD.T, y_BE), "yy": jnp.square(y_BE).sum()}
    return jax.tree.map(jnp.add, sums, new)


def _solve(sums, penalty):
    """Returns (kernel (D, E), bias (E,)) of the ridge regression, which penalizes the kernel."""
    n, x_D, y_E = sums["n"], sums["x"] / sums["n"], sums["y"] / sums["n"]
    variance_DD = sums["xx"] / n - np.outer(x_D, x_D)
    covariance_DE = sums["xy"] / n - np.outer(x_D, y_E)
    D = len(x_D)
    kernel_DE = np.linalg.solve(variance_DD + penalty * np.trace(variance_DD) / D * np.eye(D), covariance_DE)
    return kernel_DE, y_E - x_D @ kernel_DE


def _error(head, sums):
    """Returns the summed squared error of a head, computed from the sums."""
    kernel_DE, bias_E = head
    cross = (kernel_DE * sums["xy"]).sum() + bias_E @ sums["y"]
    square = (kernel_DE * (sums["xx"] @ kernel_DE)).sum() + 2 * sums["x"] @ kernel_DE @ bias_E
    return sums["yy"] - 2 * cross + square + sums["n"] * bias_E @ bias_E
