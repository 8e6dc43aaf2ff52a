"""Experiment tracking with Weights & Biases or trackio, in addition to metrics.jsonl and TensorBoard."""

import importlib.util
import os
import pathlib
import secrets
from collections.abc import Mapping
from typing import Any

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_json, write_json

_PROJECT = "llm2vec-gen"
# Metric names of the published trainer that differ from ours.
_PUBLISHED_NAMES = {
    "step": "global_step",
    "reconstruction_loss": "recon_loss",
    "alignment_loss": "align_loss",
    "negative_alignment_loss": "neg_mse_loss",
}


def check(package: str | None) -> None:
    """Raises InputError if the package of a `tracking` setting is not installed."""
    if package is None:
        return
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # the folder wandb/ of earlier runs is a namespace package
        raise InputError(f"tracking={package}: the package {package} is not installed: pip install {package}")


def names(record: Mapping[str, Any], kind: str = "train") -> dict[str, Any]:
    """Returns a record with the metric names of the published trainer: train/loss, ... kind: train | validation."""
    return {f"{kind}/{_PUBLISHED_NAMES.get(name, name)}": value for name, value in record.items()}


class Tracker:
    """The tracked run of a run directory: it has its name, and is resumed with it (tracking.json).

    The project is WANDB_PROJECT or TRACKIO_PROJECT, default llm2vec-gen.
    """

    def __init__(
        self,
        package: str,
        folder: pathlib.Path,
        config: Mapping[str, Any] | None,
        last: int = 0,
        last_validated: int = 0,
    ) -> None:
        """package: wandb | trackio. config: of the run, as a dict. last, last_validated: last steps logged before.

        Raises InputError if the tracking service fails.
        """
        check(package)
        path = folder / "tracking.json"
        known = read_json(path) if path.exists() else {}
        self.last = {"train": last, "validation": last_validated} if package in known else {}
        identity = known.setdefault(package, secrets.token_hex(4))
        write_json(path, known)
        start = {"wandb": _start_wandb, "trackio": _start_trackio}[package]
        self._log, self._finish = start(folder, identity, config)

    def write(self, record: Mapping[str, Any], kind: str = "train") -> None:
        """Logs a record, unless an earlier part of the run logged its step. kind: train | validation."""
        if record["step"] > self.last.get(kind, 0):
            self._log(names(record, kind), step=record["step"])

    def finish(self, failed: bool = False) -> None:
        """Ends the tracked run after sending all records."""
        self._finish(failed)


def _start_wandb(folder, identity, config):
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=identity,
            name=str(folder),
            dir=folder.absolute(),  # wandb writes from another process
            config=config,
            resume="allow",
            reinit="create_new",  # independent of other runs of this process
        )
    except wandb.errors.Error as error:
        reason = str(error).rstrip(".")
        raise InputError(f"tracking=wandb: {reason}, or set WANDB_MODE=offline") from None
    return run.log, lambda failed: run.finish(exit_code=int(failed))


def _start_trackio(folder, identity, config):
    import trackio

    # trackio identifies runs by name only.
    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
        name=f"{folder}-{identity}",
        config=config,
        resume="allow",
        embed=False,
    )
    return run.log, lambda failed: trackio.finish()
