"""`LLM2VecGenTrainer`: training from Python."""

import contextlib
import dataclasses
import os
import pathlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax.api import LLM2VecGen
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import TrainConfig, options
from llm2vec_gen_jax.data.records import Source
from llm2vec_gen_jax.parallel import preemption
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone
from llm2vec_gen_jax.training.compression_trainer import CompressionTrainer
from llm2vec_gen_jax.training.examples import TrainingData, load_training_data
from llm2vec_gen_jax.training.loop import TrainingCallback
from llm2vec_gen_jax.training.train import train_on
from llm2vec_gen_jax.training.validation import Validation, resolve_jobs

Path = str | os.PathLike[str]
Values = Mapping[str, Any]


class LLM2VecGenTrainer:
    """Trains an LLM2VecGen as `python -m launch.train` does, with the same settings, checks and files.

        trainer = LLM2VecGenTrainer(records, "runs/demo", train={"steps": 200}, loss={"reconstruction": 0.5})
        model = trainer.train()

    The arguments after `callbacks` are the sections of the configuration, each a dict of the keys that differ from
    `config`, or a dataclass of llm2vec_gen_jax.config.
    """

    def __init__(
        self,
        records: Source,
        output: Path,
        *,
        held_out: Source | None = None,
        backbone: Path | LoadedBackbone | Values | config_lib.BackboneConfig | None = None,
        config: TrainConfig | Path | None = None,
        callbacks: Sequence[TrainingCallback] = (),
        show_progress: bool = True,
        compression: Values | config_lib.CompressionConfig | None = None,
        lora: Values | config_lib.LoraConfig | None = None,
        teacher: Values | config_lib.TeacherConfig | None = None,
        data: Values | config_lib.DataConfig | None = None,
        loss: Values | config_lib.LossConfig | None = None,
        optimizer: Values | config_lib.OptimizerConfig | None = None,
        train: Values | config_lib.TrainSettings | None = None,
        validation: Values | config_lib.ValidationConfig | None = None,
        kernels: Values | config_lib.KernelsConfig | None = None,
        mesh: Values | config_lib.MeshConfig | None = None,
        tracking: str | None = None,
        token: str | None = None,
        cache_dir: Path | None = None,
        local_files_only: bool | None = None,
    ) -> None:
        """records: {question, answer} dicts, a datasets.Dataset, a JSONL file or a hub dataset id.

        output: run directory; an interrupted run in it is resumed. held_out: records for evaluation, as `records`.
        backbone: path or hub id, the section `backbone`, or a loaded one. config: a TrainConfig, or a YAML file from
        which the other arguments deviate. token, cache_dir, local_files_only: of the Hugging Face hub.
        Raises InputError for an unknown key and for an invalid value.
        """
        values: dict[str, Any] = {}
        if config is not None:
            config = config if isinstance(config, TrainConfig) else options.load(TrainConfig, config)
            values = dataclasses.asdict(config)  # with the token
        sections: dict[str, Any] = {
            "compression": compression,
            "lora": lora,
            "teacher": teacher,
            "data": data,
            "loss": loss,
            "optimizer": optimizer,
            "train": train,
            "validation": validation,
            "kernels": kernels,
            "mesh": mesh,
        }
        if isinstance(backbone, LoadedBackbone):
            sections["backbone"] = {"path": backbone.name, "revision": backbone.revision, "dtype": backbone.dtype}
        else:
            sections["backbone"] = {"path": backbone} if isinstance(backbone, str | os.PathLike) else backbone
        for name, section in sections.items():
            if section is not None:
                values[name] = values.get(name, {}) | _keys_of(name, section)
        values["train"] = values.get("train", {}) | {"output": output}
        for key, name, source in (("data", "responses", records), ("validation", "responses", held_out)):
            if isinstance(source, str | os.PathLike):
                values[key] = values.get(key, {}) | {name: source}
        keys = {
            "tracking": tracking,
            "token": token,
            "cache_dir": None if cache_dir is None else str(cache_dir),
            "local_files_only": local_files_only,
        }
        values |= {key: value for key, value in keys.items() if value is not None}
        self.config = options.from_values(TrainConfig, values, type(self).__name__)
        self.records, self.held_out, self.callbacks = records, held_out, callbacks
        self.backbone = backbone if isinstance(backbone, LoadedBackbone) else None
        self.show_progress = show_progress
        self.model: LLM2VecGen | None = None
        self._data: TrainingData | None = None

    def train(self) -> LLM2VecGen:
        """Trains, or resumes an interrupted run. Returns the model, which is also in OUTPUT/model.

        The first Ctrl-C saves a checkpoint and raises KeyboardInterrupt. Raises as training.train.train does.
        """
        with _stoppable():
            path = train_on(self.config, self._load, self.show_progress, self.callbacks, self.held_out is not None)
        self.model = self._read(path)
        return self.model

    def evaluate(self) -> dict[str, float]:
        """Returns the losses of the held-out records and the scores of validation.tasks, of the trained model."""
        if self.model is None:
            path = pathlib.Path(str(self.config.train.output)) / "model"
            if not path.exists():
                raise InputError(f"{path}: no model. Call train() first")
            self.model = self._read(path)
        data = self._load()
        trainer = CompressionTrainer(self.config, data.backbone, data.examples)
        validation = Validation.of(self.config, data, trainer, resolve_jobs(self.config, data.held_out is not None))
        if validation is None:
            raise InputError("nothing to evaluate: pass held_out=RECORDS or validation={'tasks': FOLDER}")
        return validation.evaluate(self.model.trainable)

    def _load(self) -> TrainingData:
        if self._data is None:
            self._data = load_training_data(self.config, self.backbone, *map(_in_memory, (self.records, self.held_out)))
        return self._data

    def _read(self, path: pathlib.Path) -> LLM2VecGen:
        """Returns the model of a directory, with the loaded backbone."""
        record = model_directory.read_model_directory(path)
        backbone = self._load().backbone
        model, trainable = model_directory.to_model(record, backbone, path)
        hub = config_lib.hub_options(self.config, self.config.backbone.revision)
        return LLM2VecGen(model, trainable, backbone, record=record, hub=hub)


def _keys_of(name: str, section: Any) -> dict[str, Any]:
    if dataclasses.is_dataclass(section) and not isinstance(section, type):
        return dataclasses.asdict(section)
    if not isinstance(section, Mapping):
        raise InputError(f"{name}: expected a dict of settings, found {type(section).__name__}")
    return dict(section)


def _in_memory(source: Source | None) -> Source | None:
    return None if isinstance(source, str | os.PathLike) else source


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Makes signals save and raise KeyboardInterrupt; outside the main thread, which gets all signals, does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with preemption.caught():
        preemption.stop_at_once()
        try:
            yield
        except preemption.Stopped as error:
            raise KeyboardInterrupt(f"{error}. Call train() again to resume") from None
