"""Estimates memory, FLOPs and time on devices that need not be attached.

python -m launch.plan [CONFIG] [key=value ...]
"""

import os

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import PlanConfig


def main(config: PlanConfig) -> None:
    import jax

    from llm2vec_gen_jax.planning.plan import estimate

    if config.topology:  # leave the attached devices to other programs
        jax.config.update("jax_platforms", "cpu")
    estimate(config)


def run() -> None:
    """Runs the command with the arguments of sys.argv."""
    # Settings for the TPU compiler on a machine without TPUs.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    cli.run(PlanConfig, main)
