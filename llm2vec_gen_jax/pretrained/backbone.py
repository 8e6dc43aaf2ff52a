"""From a name to a loaded backbone: parameters on their devices, tokenizer, identity."""

import dataclasses
import hashlib
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp

from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import fingerprint
from llm2vec_gen_jax.config import BackboneConfig, options
from llm2vec_gen_jax.formats import gguf, hf, weights
from llm2vec_gen_jax.model import quantization
from llm2vec_gen_jax.model.architecture import Architecture
from llm2vec_gen_jax.model.execution import AMPERE, Execution, compute_capability
from llm2vec_gen_jax.pretrained import default_backbone
from llm2vec_gen_jax.pretrained.tokenizer import Tokenizer

# LoRA folders that come with the package: the default backbone's teacher, to be merged in this order.
TEACHERS = ("smollm2-135m-mntp", "smollm2-135m-simcse")
# Of a sentence-transformers model: not the exports to other runtimes that many repositories hold too.
EMBEDDER_PATTERNS = ("*.json", "*.txt", "*.model", "*.safetensors", "*pytorch_model*.bin")


@dataclasses.dataclass(frozen=True)
class LoadedBackbone:
    """A frozen backbone.

    frozen: parameter tree on the mesh; None while only its description is loaded. identity: 16 hex digits that are the
    same for the same weights, whatever file and dtype they came from. name: what the user called it. license: SPDX
    id, where it is stated. former_identity: what earlier model directories have in its place, with no more of an untied
    head in it than the first row.
    """

    name: str
    architecture: Architecture
    frozen: Any
    tokenizer: Tokenizer
    identity: str
    execution: Execution
    license: str | None = None
    former_identity: str | None = None

    @property
    def dtype(self):
        """The name of the dtype of most parameters."""
        return "int8" if quantization.is_quantized(self.frozen) else str(self.frozen["embedding"].dtype)

    @property
    def mesh(self):
        """The mesh that the parameters are on."""
        return self.execution.mesh


def resolve_dtype(name):
    """Returns the jnp dtype of a config's dtype name. auto: `default_dtype` of this process's devices."""
    return jnp.dtype(default_dtype(jax.devices()[0]) if name == "auto" else name)


def default_dtype(device):
    """Returns the name of the dtype that `auto` is on a device: float32 on a CPU and on NVIDIA GPUs before Ampere,
    which have no bfloat16 products, else bfloat16."""
    capability = compute_capability(device)
    old = capability is not None and capability < AMPERE
    return "float32" if old or device.platform == "cpu" else "bfloat16"


_process = None  # that has loaded a backbone, by its id


def require_own_process():
    """Raises InputError in a fork of a process that has loaded a backbone: JAX hangs there for ever."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise InputError(
            f"JAX was used by process {_process} and hangs in its fork, this process {os.getpid()}: start processes by "
            'multiprocessing.get_context("spawn") (PyTorch\'s DataLoader: multiprocessing_context="spawn") and load '
            "the model in each of them"
        )


def load_backbone(path, dtype, mesh, attention="auto"):
    """Loads a backbone: the default's name, a .gguf file, a local folder or a hub id.

    dtype: a config name (auto | float32 | bfloat16 | float16 | int8). attention: of kernels.attention.
    Raises InputError for what is missing or unsupported.
    """
    require_own_process()
    options.check_arguments(BackboneConfig, dtype=dtype)
    backbone, source = open_checkpoint(path, Execution(mesh, attention))
    backbone.execution.check(backbone.architecture.head_dim, quantization.product_dtype(resolve_dtype(dtype)))
    frozen = weights.load(source, backbone.architecture, mesh, resolve_dtype(dtype))
    return dataclasses.replace(backbone, frozen=frozen)


def open_checkpoint(path, execution):
    """Returns (LoadedBackbone without its parameters, the source of its weights): cheap, whatever its size."""
    where = resolve_path(path)
    if where.suffix == ".gguf":
        source = gguf.GGUFSource(where)
        architecture, _ = gguf.read_architecture(source)
        tokenizer = Tokenizer(gguf.read_tokenizer(source), gguf.stop_ids(source))
        license = source.field("general.license")
    else:
        from llm2vec_gen_jax.model import architecture as architecture_lib

        config = hf.read_config(where)
        architecture = architecture_lib.from_hf_config(config, where / "config.json")
        source = hf.SafetensorsSource(where)
        if architecture.tied_embeddings:
            source.tie()
            # As in transformers: a head that is in the file and is another than the embeddings is not tied.
            architecture = dataclasses.replace(architecture, tied_embeddings=not weights.has_own_head(source))
        tokenizer = Tokenizer.from_folder(where, hf.stop_ids(where, config))
        license = hf.read_license(where)
    tokenizer.check_fits(architecture.vocab_size, where)
    digest = hashlib.sha256(weights.fingerprint_values(source, architecture).tobytes()).hexdigest()
    parts = [dataclasses.asdict(architecture), digest]
    former = identity = fingerprint(parts)
    if not architecture.tied_embeddings:
        identity = fingerprint([*parts, weights.head_digest(source)])
    return LoadedBackbone(str(path), architecture, None, tokenizer, identity, execution, license, former), source


def resolve_path(path):
    """Returns the local .gguf file or folder of a backbone, fetching it when it is the default or a hub id."""
    if path == default_backbone.NAME:
        return default_backbone.default_backbone()
    local = pathlib.Path(path).expanduser()
    if local.exists():
        if not local.is_dir() and local.suffix != ".gguf":
            raise InputError(f"{path}: a backbone is a folder or a .gguf file")
        return local
    if local.suffix == ".gguf" or not is_hub_id(path):
        raise InputError(f"{path}: no such file or folder (known name: {default_backbone.NAME})")
    return fetch_from_hub(path, hf.PATTERNS)


def is_hub_id(path):
    """Whether a name is to be looked up on the hub: NAMESPACE/NAME, and nothing local goes by it.

    A local folder NAMESPACE makes it a (mistyped) path: a path never touches the network.
    """
    match = re.fullmatch(r"([\w-][\w.-]*)/[\w.-]+", str(path))
    return match is not None and not pathlib.Path(match[1]).exists()


def fetch_from_hub(repository, patterns):
    """Returns the local snapshot of a hub repository. Raises InputError when it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return pathlib.Path(snapshot_download(repository, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise InputError(
            f"{repository}: no such local folder, and it cannot be fetched from the hub ({first_line(error)})"
        ) from None


def resolve_adapter(path):
    """Returns the local folder of a PEFT adapter: one of TEACHERS by its name, or fetched when it is a hub id."""
    folder = pathlib.Path(path).expanduser()
    if not folder.exists() and str(path) in TEACHERS:
        return pathlib.Path(__file__).parent / "assets" / "teachers" / str(path)
    if is_hub_id(path):
        folder = fetch_from_hub(path, ["adapter_config.json", "adapter_model.safetensors"])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"teacher.adapters: {path} has no {name}")
    return folder


def resolve_embedder(path):
    """Returns the local folder of a sentence-transformers model, fetching it when it is a hub id."""
    folder = pathlib.Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not is_hub_id(path):
        raise InputError(f"teacher.path={path}: no such folder, and not a hub id (OWNER/NAME)")
    return fetch_from_hub(path, EMBEDDER_PATTERNS)
