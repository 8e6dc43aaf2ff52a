"""The data of a training run: tokenized examples with their targets, held-out examples, and the backbone."""

import dataclasses
import logging
import os
from collections.abc import Sequence
from typing import Any

from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.config import TrainConfig, hub_options, options
from llm2vec_gen_jax.data.examples import Examples, tokenize
from llm2vec_gen_jax.data.instructions import REPEAT
from llm2vec_gen_jax.data.records import Source, read_records
from llm2vec_gen_jax.data.texts import read_instructions
from llm2vec_gen_jax.model.execution import Execution
from llm2vec_gen_jax.parallel import processes, sharding
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone, load_backbone, open_checkpoint
from llm2vec_gen_jax.teachers import targets, whitening
from llm2vec_gen_jax.training import supervised

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class TrainingData:
    """Examples and held-out examples, with targets, the loaded backbone, and the Transform of the targets."""

    examples: Examples
    held_out: Examples | None
    backbone: LoadedBackbone
    transform: whitening.Transform


def load_training_data(
    config: TrainConfig,
    backbone: LoadedBackbone | None = None,
    records: Source | None = None,
    held_out: Source | None = None,
) -> TrainingData:
    """Returns the TrainingData of a TrainConfig.

    backbone: that of the config, if it is loaded. records, held_out: default data.responses and validation.responses.
    The weights are loaded after the targets are computed, so that only one copy is in memory at a time.
    """
    path, kernel, hub = config.backbone.path, config.kernels.attention, hub_options(config, config.backbone.revision)
    description = backbone or open_checkpoint(path, Execution(sharding.make_mesh(config.mesh), kernel), hub)[0]
    source = config.data.responses if records is None else records
    key = "data.responses" if records is None else "records"
    examples, questions = _examples(config, description, source, key)
    held_out_source = config.validation.responses if held_out is None else held_out
    others = None
    if held_out_source is not None:
        if config.teacher.kind == "file":
            raise InputError("teacher.kind=file has no targets of validation.responses: use validation.tasks instead")
        key = "validation.responses" if held_out is None else "held_out"
        others, _ = _examples(config, description, held_out_source, key)
    transform = whitening.transform_targets(examples, config.teacher, questions, others)
    backbone = backbone or load_backbone(path, config.backbone.dtype, description.mesh, kernel, hub)
    return TrainingData(examples, others, backbone, transform)


def _repeat_instructions(config: TrainConfig) -> list[str]:
    """Returns the instructions of the extra texts that repeat an answer."""
    path, texts = config.loss.repeat_instructions, supervised.texts(config.loss)
    if path is None:
        return [REPEAT]
    if not {"repeat", "negative_repeat"} & texts.keys():
        raise InputError(f"loss.repeat_instructions={path}: no loss uses them. Set loss.repeat, or remove them")
    return read_instructions(path, "loss.repeat_instructions")


def _examples(
    config: TrainConfig, description: LoadedBackbone, source: Any, key: str
) -> tuple[Examples, Sequence[str]]:
    """Returns the Examples of a source, with targets that are not transformed, and the stripped questions."""
    columns = supervised.columns(config.loss) + (("finish",) if config.data.finished_only else ())
    records = read_records(source, columns, config.data.split, name=key, hub=hub_options(config))
    name = str(source) if isinstance(source, str | os.PathLike) else key
    num_appended = config.compression.num_tokens + config.compression.num_thought_tokens
    data = dataclasses.replace(config.data, responses=name)
    extra = supervised.texts(config.loss, _repeat_instructions(config))
    examples = tokenize(records, description.tokenizer, data, num_appended, extra)
    processes.assert_equal_across_processes({"data": examples.digest_ids(), "backbone": description.identity})
    if len(examples) < len(records):
        reason = "their answer is empty" + ", or was cut" * config.data.finished_only
        which = "records" if key in ("data.responses", "records") else "held-out records"
        logger.warning(f"left out {len(records) - len(examples)} of {len(records)} {which}: {reason}")
    if config.teacher.kind == "file":
        options.require(config, "teacher.path")
        if config.teacher.query_weight:
            raise InputError("teacher.kind=file has no vectors of queries: mix them in the file, without query_weight")
        if "negative_target" in supervised.targets(config.loss):
            raise InputError("teacher.kind=file has no targets of negative answers: pass loss.negative=0")
        examples.target = targets.read_targets(str(config.teacher.path), len(records), examples.row)
    else:
        for target, column in supervised.targets(config.loss).items():
            pair = (column, column.replace("answer", "question"))
            answers, queries = ([records[row][text].strip() for row in examples.row] for text in pair)
            setattr(examples, target, targets.compute_mixed_targets(description, config, answers, queries, name))
    return examples, [records[row]["question"].strip() for row in examples.row]
