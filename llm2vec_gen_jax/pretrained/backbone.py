"""Loads a backbone by name, path or hub id: parameters on the mesh, tokenizer, identity."""

import dataclasses
import hashlib
import os
import pathlib
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import fingerprint
from llm2vec_gen_jax.common.hub import DEFAULT_HUB, HubOptions, fetch_from_hub, is_hub_id, require_no_revision
from llm2vec_gen_jax.config import BackboneConfig, options
from llm2vec_gen_jax.formats import gguf, hf, peft, weights
from llm2vec_gen_jax.model import quantization
from llm2vec_gen_jax.model.architecture import Architecture, from_hf_config
from llm2vec_gen_jax.model.execution import AMPERE, Execution, compute_capability
from llm2vec_gen_jax.pretrained import default_backbone
from llm2vec_gen_jax.pretrained.tokenizer import Tokenizer

# LoRA folders shipped with the package: the default backbone's teacher, merged in this order.
TEACHERS = ("smollm2-135m-mntp", "smollm2-135m-simcse")
# Files of a sentence-transformers model, without the exports to other runtimes that many repositories have.
EMBEDDER_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "*pytorch_model*.bin")


@dataclasses.dataclass(frozen=True)
class LoadedBackbone:
    """A frozen backbone.

    name: as the user passed it. frozen: parameter tree on the mesh; None until the weights are loaded.
    identity: 16 hex digits, the same for the same weights in any file format and dtype. license: SPDX id, if stated.
    former_identity: the identity in model directories of earlier versions, which hashed one row of an untied head.
    revision: of the hub repository, as the user passed it.
    """

    name: str
    architecture: Architecture
    frozen: Any
    tokenizer: Tokenizer
    identity: str
    execution: Execution
    license: str | None = None
    former_identity: str | None = None
    revision: str | None = None

    @property
    def dtype(self) -> str:
        """The name of the dtype of most parameters."""
        return "int8" if quantization.is_quantized(self.frozen) else str(self.frozen["embedding"].dtype)

    @property
    def mesh(self) -> Mesh:
        """The mesh of the parameters."""
        return cast(Mesh, self.execution.mesh)


def resolve_dtype(name: str) -> jnp.dtype:
    """Returns the dtype of a config's dtype name; auto is the `default_dtype` of the first device."""
    return jnp.dtype(default_dtype(jax.devices()[0]) if name == "auto" else name)


def default_dtype(device: jax.Device) -> str:
    """Returns the dtype name that `auto` selects on a device.

    float32 on CPUs and on NVIDIA GPUs before Ampere, which have no bfloat16 products; otherwise bfloat16.
    """
    capability = compute_capability(device)
    no_bfloat16 = capability is not None and capability < AMPERE
    return "float32" if no_bfloat16 or device.platform == "cpu" else "bfloat16"


_loading_pid: int | None = None  # process that loaded the first backbone; a fork inherits the value


def require_own_process() -> None:
    """Raises InputError in a fork of a process that loaded a backbone: JAX would hang there."""
    global _loading_pid
    _loading_pid = _loading_pid or os.getpid()
    if _loading_pid != os.getpid():
        raise InputError(
            f"JAX was used by process {_loading_pid} and hangs in its fork, this process {os.getpid()}. Use "
            'multiprocessing.get_context("spawn") (PyTorch DataLoader: multiprocessing_context="spawn") and load the '
            "model in each process"
        )


def load_backbone(
    path: str | os.PathLike[str], dtype: str, mesh: Any, attention: str = "auto", hub: HubOptions = DEFAULT_HUB
) -> LoadedBackbone:
    """Loads a backbone onto a mesh.

    path: the name of the default backbone, a .gguf file, a local folder or a hub id. dtype: auto | float32 | bfloat16 |
    float16 | int8. mesh: a jax.sharding.Mesh with the axes of sharding.MESH_AXES. attention: a value of
    kernels.attention. Raises InputError for missing or unsupported input.
    """
    require_own_process()
    options.check_arguments(BackboneConfig, dtype=dtype)
    where = resolve_path(path, hub)
    with progress.announce(f"loading {path}"):
        backbone, source = _open(path, where, Execution(mesh, attention), hub.revision)
        backbone.execution.check(backbone.architecture.head_dim, quantization.product_dtype(resolve_dtype(dtype)))
        frozen = weights.load(source, backbone.architecture, mesh, resolve_dtype(dtype))
    return dataclasses.replace(backbone, frozen=frozen)


def open_checkpoint(
    path: str | os.PathLike[str], execution: Execution, hub: HubOptions = DEFAULT_HUB
) -> tuple[LoadedBackbone, weights.WeightSource]:
    """Returns (LoadedBackbone without parameters, source of its weights). Cheap for a checkpoint of any size."""
    return _open(path, resolve_path(path, hub), execution, hub.revision)


def _open(
    path: str | os.PathLike[str], where: pathlib.Path, execution: Execution, revision: str | None
) -> tuple[LoadedBackbone, weights.WeightSource]:
    source: weights.WeightSource
    if where.suffix == ".gguf":
        source = file = gguf.GGUFSource(where)
        architecture = gguf.read_architecture(file)
        tokenizer = Tokenizer(gguf.read_tokenizer(file), gguf.stop_ids(file))
        license = file.field("general.license")
    else:
        config = hf.read_config(where)
        architecture = from_hf_config(config, where / "config.json")
        source = folder = hf.SafetensorsSource(where)
        if architecture.tied_embeddings:
            folder.tie()
            # As in transformers, a stored head that differs from the embeddings is not tied.
            architecture = dataclasses.replace(architecture, tied_embeddings=not weights.has_untied_head(source))
        tokenizer = Tokenizer.from_folder(where, hf.stop_ids(where, config))
        license = hf.read_license(where)
    tokenizer.check_fits(architecture.vocab_size, where)
    digest = hashlib.sha256(weights.fingerprint_values(source, architecture).tobytes()).hexdigest()
    parts = [architecture.to_dict(), digest]
    former = identity = fingerprint(parts)
    if not architecture.tied_embeddings:
        identity = fingerprint([*parts, weights.head_digest(source)])
    facts = license, former, revision
    return LoadedBackbone(str(path), architecture, None, tokenizer, identity, execution, *facts), source


def is_local(name: str | os.PathLike[str]) -> bool:
    """Whether the name of a backbone is an existing path. The default backbone's name is not, even if there is one."""
    return str(name) != default_backbone.NAME and pathlib.Path(name).expanduser().exists()


def resolve_path(path: str | os.PathLike[str], hub: HubOptions = DEFAULT_HUB) -> pathlib.Path:
    """Returns the local .gguf file or folder of a backbone; the default backbone and hub ids are downloaded.

    Raises InputError if there is none, and for a revision of anything but a hub id.
    """
    local, is_default = pathlib.Path(path).expanduser(), str(path) == default_backbone.NAME
    if is_default or local.exists():
        require_no_revision(path, hub)
    if is_default:
        return default_backbone.default_backbone()
    if local.exists():
        if not local.is_dir() and local.suffix != ".gguf":
            raise InputError(f"{path}: not a backbone: expected a folder or a .gguf file")
        return local
    if local.suffix == ".gguf" or not is_hub_id(path):
        raise InputError(f"{path}: no such file or folder (known name: {default_backbone.NAME})")
    return fetch_from_hub(path, hf.PATTERNS, hub)


def resolve_adapter(path: str | os.PathLike[str], hub: HubOptions = DEFAULT_HUB) -> pathlib.Path:
    """Returns the local folder of a PEFT adapter: a path, a name of TEACHERS, or a hub id, which is downloaded."""
    folder = pathlib.Path(path).expanduser()
    if not folder.exists() and str(path) in TEACHERS:
        return included_adapter(str(path))
    if is_hub_id(path):
        folder = fetch_from_hub(path, peft.FILES, hub)
    for name in peft.FILES:
        if not (folder / name).is_file():
            raise InputError(f"{path}: not a PEFT adapter: no {name}")
    return folder


def included_adapter(name: str) -> pathlib.Path:
    """Returns the folder of one of TEACHERS."""
    return pathlib.Path(__file__).parent / "assets" / "teachers" / name


def resolve_embedder(path: str | os.PathLike[str], hub: HubOptions = DEFAULT_HUB) -> pathlib.Path:
    """Returns the local folder of a sentence-transformers model; a hub id is downloaded."""
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(path):
        raise InputError(f"{path}: no such folder, and not a hub id (OWNER/NAME)")
    return fetch_from_hub(path, EMBEDDER_PATTERNS, hub)
