"""The teacher of a trained model in its model directory, as the encoder of documents.

The vector of a query approximates the teacher's vector of an answer, so the documents that are searched for it can be
encoded by the teacher itself, with the Transform of the targets.
"""

import dataclasses
import functools
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import read_json, sha256_file, write_json
from llm2vec_gen_jax.common.hub import DEFAULT_HUB, HubOptions
from llm2vec_gen_jax.config import TrainConfig, hub_options
from llm2vec_gen_jax.formats import peft, published
from llm2vec_gen_jax.pretrained.backbone import (
    TEACHERS,
    LoadedBackbone,
    included_adapter,
    load_backbone,
    resolve_adapter,
)
from llm2vec_gen_jax.teachers import targets
from llm2vec_gen_jax.teachers.encoder import Teacher
from llm2vec_gen_jax.teachers.whitening import Transform

_SETTINGS, _TRANSFORM = "teacher.json", "targets.safetensors"
_FORMAT_VERSION = 1

Tag = TypeVar("Tag")


@dataclasses.dataclass(frozen=True)
class DocumentEncoder:
    """Encodes texts as the alignment targets of a model are: by its teacher, then centered or whitened.

    identity: hashes of the files that the vectors depend on, beside the backbone.
    """

    teacher: Teacher
    transform: Transform
    identity: list[Any]

    def encode(self, texts: Sequence[str], instruction: str = "") -> NDArray[np.float32]:
        """Returns the vectors (n, E) of texts."""
        return self.transform(self.teacher.encode(texts, instruction))

    def encode_windows(
        self,
        windows: Iterable[tuple[Tag, Sequence[NDArray[np.int32]]]],
        batch_size: int,
        bar: Any,
        on_not_finite: Callable[[Tag, int], None],
    ) -> Iterator[tuple[Tag, NDArray[np.float32], None]]:
        """Yields (tag, vectors (n, E), None) for each (tag, n id lists), as LLM2VecGen.encode_windows."""
        teacher = dataclasses.replace(self.teacher, batch_size=batch_size)
        for tag, ids in windows:
            report = functools.partial(on_not_finite, tag)
            yield tag, self.transform(teacher.encode_ids(ids, bar, report)), None


def check(config: TrainConfig) -> None:
    """Raises InputError if teacher.keep is set for a teacher that a model directory cannot hold."""
    teacher = config.teacher
    if teacher.keep and (teacher.kind != "llm2vec" or teacher.path):
        which = f"teacher.path={teacher.path}" if teacher.kind == "llm2vec" else f"teacher.kind={teacher.kind}"
        raise InputError(f"teacher.keep=true: only for a teacher on the backbone of the model, not with {which}")


def save(folder: pathlib.Path, config: TrainConfig, transform: Transform) -> None:
    """Writes the teacher of a TrainConfig to a new folder: settings, adapters, and the Transform of the targets."""
    folder.mkdir()
    names, hub = [], hub_options(config)
    for number, adapter in enumerate(config.teacher.adapters):
        source = resolve_adapter(adapter, hub)
        if adapter in TEACHERS and not pathlib.Path(adapter).exists():  # part of this package
            names.append(adapter)
            continue
        names.append(f"adapter-{number}")
        (folder / names[-1]).mkdir()
        for name in peft.FILES:
            shutil.copyfile(source / name, folder / names[-1] / name)
    settings = {"adapters": names, "causal": targets.is_causal(config.teacher)}
    settings |= {"max_length": config.data.max_answer_length, "format_version": _FORMAT_VERSION}
    write_json(folder / _SETTINGS, settings)
    arrays = {"mean": transform.mean_E, "matrix": transform.matrix_EE}
    published.write_safetensors(folder / _TRANSFORM, {name: x for name, x in arrays.items() if x is not None})


def load(folder: pathlib.Path, backbone: LoadedBackbone, hub: HubOptions = DEFAULT_HUB) -> DocumentEncoder:
    """Returns the DocumentEncoder in a folder. backbone: that of the model, whose weights are loaded a second time.

    Raises InputError naming the file and what is missing or invalid in it.
    """
    path = folder / _SETTINGS
    settings = read_json(path)
    names: Any = settings.get("adapters")
    causal, max_length, version = (settings.get(key) for key in ("causal", "max_length", "format_version"))
    if version != _FORMAT_VERSION:
        raise InputError(f"{path}: format_version is {version}, expected {_FORMAT_VERSION}")
    valid = isinstance(names, list) and all(name in TEACHERS or _is_name(name) for name in names)
    if not valid or not isinstance(causal, bool) or type(max_length) is not int or max_length < 1:
        raise InputError(
            f"{path}: expected adapters (a list of folders here), causal (a boolean) and max_length (tokens)"
        )
    adapters = [included_adapter(name) if name in TEACHERS else resolve_adapter(folder / name) for name in names]
    transform = _read_transform(folder / _TRANSFORM, backbone.architecture.hidden_size)
    frozen, dtype = backbone.frozen, backbone.dtype
    if adapters or dtype == "int8":  # merging changes the weights; targets are computed without quantization
        dtype = "bfloat16" if dtype == "int8" else dtype
        frozen = load_backbone(backbone.name, dtype, backbone.mesh, backbone.execution.attention, hub).frozen
    frozen = peft.merge(frozen, adapters, backbone.architecture)
    identity = [*map(peft.identity, adapters), *(sha256_file(folder / name)[:16] for name in (_SETTINGS, _TRANSFORM))]
    return DocumentEncoder(Teacher(backbone, frozen, causal, max_length=max_length), transform, identity)


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and name.startswith("adapter-") and pathlib.Path(name).name == name


def _read_transform(path: pathlib.Path, size: int) -> Transform:
    tensors = published.read_safetensors(path)
    shapes = {name: x.shape for name, x in tensors.items()}
    known: Any = ({}, {"mean": (size,)}, {"mean": (size,), "matrix": (size, size)})
    if shapes not in known or not all(np.isfinite(x).all() for x in tensors.values()):
        raise InputError(f"{path}: expected a finite mean ({size},) and matrix ({size}, {size}), found {shapes}")
    return Transform(tensors.get("mean"), tensors.get("matrix"))
