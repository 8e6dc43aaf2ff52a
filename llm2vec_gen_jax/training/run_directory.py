"""Run directories: claimed by one configuration, resumed only with the same."""

import shutil

from llm2vec_gen_jax.common import locks
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import entries, require_same_run, write_text
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.parallel import processes
from llm2vec_gen_jax.training import tracking

# What may change when a run is resumed: how long and where it runs, not what it computes.
FREE_KEYS = {
    "": ("distributed", "num_processes", "process_id", "join_timeout", "heartbeat_timeout", "tracking"),
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
        "profile",
    ),
    "teacher": ("batch_size",),
    "kernels": ("attention",),
    "mesh": ("data", "fsdp", "tensor"),
}


def prepare_run_directory(output, config, free=FREE_KEYS):
    """Makes the run directory this run's. Returns whether it holds an earlier part of the same run.

    free: {section: keys} that may differ from what the earlier part was run with; "" stands for no section.
    """
    return processes.run_on_process_0(lambda: _prepare(output, config, free))


def _prepare(output, config, free):
    tracking.check(config.tracking)
    resuming = False
    if output.is_dir():
        locks.remove_abandoned(output / "config.yaml")
    if output.exists() and not (output.is_dir() and not entries(output)):
        old = _config_of(output, type(config))
        if config.train.overwrite:
            shutil.rmtree(output)
        else:
            records = _fixed(options.to_dict(old), free), _fixed(options.to_dict(config), free)
            # A run that failed before its first step, often because of these settings, left only its config.
            if entries(output) != ["config.yaml"]:
                remedy = "choose another output, or pass train.overwrite=true"
                require_same_run(f"train.output={output}", *records, remedy)
            resuming = records[0] == records[1]
    write_text(output / "config.yaml", options.to_yaml(config))
    return resuming


def _config_of(output, schema):
    """Returns the config of a run directory. Raises InputError when the directory is anything else."""
    try:
        found = options.load(schema, output / "config.yaml")
        options.require(found, "train.output")  # what every run's config has
    except InputError as error:
        raise InputError(
            f"train.output={output}: exists and is not a run directory; it is left as it is. Choose another ({error})"
        ) from None
    return found


def _fixed(values, free):
    return {
        section: _fixed(inner, {"": free.get(section, ())}) if isinstance(inner, dict) else inner
        for section, inner in values.items()
        if section not in free.get("", ())
    }
