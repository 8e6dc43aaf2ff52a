"""Memory, FLOPs and time bounds on devices that need not be here.

python -m launch.plan [CONFIG] [key=value ...]
"""

import os

from llm2vec_gen_jax.commands import cli
from llm2vec_gen_jax.config import PlanConfig


def main(config):
    import jax

    from llm2vec_gen_jax.planning.plan import estimate

    if config.topology:  # devices that are here are left to others
        jax.config.update("jax_platforms", "cpu")
    estimate(config)


def run():
    """Runs the command with the words of sys.argv."""
    # The TPU compiler alone, on a machine that is no TPU.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    cli.run(PlanConfig, main)
