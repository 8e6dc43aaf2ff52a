"""Run directories: each belongs to one configuration and is resumed only with an equal one."""

import pathlib
import shutil

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import entries, require_same_run, write_text
from llm2vec_gen_jax.config import HUB_KEYS, TeacherTrainConfig, TrainConfig, options
from llm2vec_gen_jax.parallel import processes
from llm2vec_gen_jax.training import tracking

# {section: keys} that may change when a run is resumed: how long and where it runs, not what it computes.
FREE_KEYS = {
    "": ("distributed", "num_processes", "process_id", "join_timeout", "heartbeat_timeout", "tracking", *HUB_KEYS),
    "train": (
        "steps",
        "log_every",
        "checkpoint_every",
        "checkpoint_minutes",
        "keep_checkpoints",
        "output",
        "overwrite",
        "watchdog",
        "remat",
        "microbatches",
        "profile",
    ),
    "teacher": ("batch_size",),
    "validation": ("patience", "keep_best"),
    "kernels": ("attention",),
    "mesh": ("data", "fsdp", "tensor"),
}


def prepare_run_directory(output: pathlib.Path, config: TrainConfig | TeacherTrainConfig) -> bool:
    """Claims the run directory, or verifies that it belongs to the same run. Returns whether the run is resumed."""
    return processes.run_on_process_0(lambda: _prepare(output, config))


def _prepare(output, config):
    tracking.check(config.tracking)
    resuming = False
    if output.is_dir():
        locks.remove_abandoned(output / "config.yaml")
    if output.exists() and not (output.is_dir() and not entries(output)):
        old = _config_of(output, type(config))
        if config.train.overwrite:
            shutil.rmtree(output)
        else:
            records = _fixed(options.to_dict(old), FREE_KEYS), _fixed(options.to_dict(config), FREE_KEYS)
            # A run that failed before its first step, often because of its settings, leaves only its config.
            if entries(output) != ["config.yaml"]:
                remedy = "choose another output, or pass train.overwrite=true"
                require_same_run(f"train.output={output}", *records, remedy)
            resuming = records[0] == records[1]
    write_text(output / "config.yaml", options.to_yaml(config))
    return resuming


def _config_of(output, schema):
    """Returns the config of a run directory. Raises InputError for any other directory."""
    try:
        config = options.load(schema, output / "config.yaml")
        options.require(config, "train.output")  # set in the config of every run
    except InputError as error:
        raise InputError(
            f"train.output={output}: exists and is not a run directory. Choose another, it is not changed ({error})"
        ) from None
    return config


def _fixed(values, free):
    return {
        section: _fixed(inner, {"": free.get(section, ())}) if isinstance(inner, dict) else inner
        for section, inner in values.items()
        if section not in free.get("", ())
    }
