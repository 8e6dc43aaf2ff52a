"""Training records in Weights & Biases or trackio, beside metrics.jsonl and TensorBoard."""

import importlib.util
import os
import secrets

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_json, write_json

_PROJECT = "llm2vec-gen"
# What the published trainer's runs call the same thing; every other name of a record is its name there, or only ours.
_PUBLISHED_NAMES = {
    "step": "global_step",
    "reconstruction_loss": "recon_loss",
    "alignment_loss": "align_loss",
    "negative_alignment_loss": "neg_mse_loss",
}


def check(package):
    """Raises InputError where the package of a `tracking` setting, if any, is not installed."""
    if package is None:
        return
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:  # a folder wandb/ of earlier runs is a package of sorts, without a file
        raise InputError(f"tracking={package}: the package {package} is not installed: pip install {package}")


def names(record):
    """Returns a record of metrics.jsonl under the names of the published trainer's runs: train/loss ..."""
    return {f"train/{_PUBLISHED_NAMES.get(name, name)}": value for name, value in record.items()}


class Tracker:
    """The tracked run of a run directory: named after it, and gone on with when it is resumed (tracking.json).

    The project is WANDB_PROJECT or TRACKIO_PROJECT, else llm2vec-gen.
    """

    def __init__(self, package, folder, config, last=0):
        """package: wandb | trackio. config: a dict. last: the last step that an earlier part of the run has logged.

        Raises InputError where the service refuses.
        """
        check(package)
        path = folder / "tracking.json"
        known = read_json(path) if path.exists() else {}
        self.last = last if package in known else 0
        identity = known.setdefault(package, secrets.token_hex(4))
        write_json(path, known)
        start = {"wandb": _start_wandb, "trackio": _start_trackio}[package]
        self._log, self._finish = start(folder, identity, config)

    def write(self, record):
        """Logs a record, unless an earlier part of the run did."""
        if record["step"] > self.last:
            self._log(names(record), step=record["step"])

    def finish(self, failed=False):
        """Ends the tracked run, once all of it has been sent."""
        self._finish(failed)


def _start_wandb(folder, identity, config):
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=identity,
            name=str(folder),
            dir=folder.absolute(),  # wandb writes from a process of its own
            config=config,
            resume="allow",
            reinit="create_new",  # whatever other run this process may have
        )
    except wandb.errors.Error as error:
        reason = str(error).rstrip(".")
        raise InputError(f"tracking=wandb: {reason}, or set WANDB_MODE=offline") from None
    return run.log, lambda failed: run.finish(exit_code=int(failed))


def _start_trackio(folder, identity, config):
    import trackio

    # It knows a run by its name alone.
    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", _PROJECT),
        name=f"{folder}-{identity}",
        config=config,
        resume="allow",
        embed=False,
    )
    return run.log, lambda failed: trackio.finish()
