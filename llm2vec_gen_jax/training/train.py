"""Training: data and targets, the training loop, and the finished model directory."""

import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import jax

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import diff, require_written
from llm2vec_gen_jax.config import TrainConfig, options
from llm2vec_gen_jax.data.batches import Batches, BatchSchedule
from llm2vec_gen_jax.data.examples import Examples, tokenize
from llm2vec_gen_jax.data.records import read_records
from llm2vec_gen_jax.model.execution import Execution, first_remat
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import processes, sharding
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone, load_backbone, open_checkpoint
from llm2vec_gen_jax.teachers import targets, whitening
from llm2vec_gen_jax.training import ridge, step_memory, supervised
from llm2vec_gen_jax.training.loop import Run, StepFunction
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.programs import CompiledCache
from llm2vec_gen_jax.training.run_directory import FREE_KEYS, prepare_run_directory
from llm2vec_gen_jax.training.step import TrainState, abstract_cache, jit_prefill, jit_step

logger = logging.getLogger(__name__)


def train(config: TrainConfig, show_progress: bool = True, backbone: LoadedBackbone | None = None) -> pathlib.Path:
    """Runs or resumes the training of a TrainConfig. Returns the path of the finished model directory.

    backbone: the config's backbone, if it is already loaded.
    Raises InputError for invalid configuration or data, FloatingPointError naming the step of a non-finite loss.
    """
    options.require(config, "data.responses", "train.output")
    if config.teacher.adapters and config.teacher.kind != "llm2vec":
        raise InputError(f"teacher.adapters are for teacher.kind=llm2vec, not for {config.teacher.kind}: remove them")
    if not config.train.steps and not config.train.ridge_examples:
        raise InputError("train.steps=0: nothing to train. Set train.ridge_examples to solve the alignment head only")
    with processes.locked(str(config.train.output), "train.output"):
        return _train(config, show_progress, backbone)


def _train(config: TrainConfig, show_progress: bool, backbone: LoadedBackbone | None) -> pathlib.Path:
    output = pathlib.Path(str(config.train.output))
    resuming = prepare_run_directory(output, config)
    final = output / "model"
    examples, backbone = load_examples(config, backbone)
    trainer = CompressionTrainer(config, backbone, examples)
    run = Run(trainer, config.train, config.optimizer, backbone.mesh, output, config)
    run.start(resuming)
    if run.first_step >= config.train.steps and processes.run_on_process_0(final.exists):
        logger.info(f"{final}: already finished")
        return final
    if config.train.steps:
        run.loop(show_progress)
    trainable = run.state.trainable
    model_directory.check_finite(trainable, str(output))
    # A run killed after its last step has logged everything and lacks only the model directory.
    last = run.last_record or (read_metrics(output)[-1] if config.train.steps else {})
    extra = {
        # Without process settings, tracking and speed: equal runs write equal directories.
        "config": {key: value for key, value in options.to_dict(config).items() if key not in FREE_KEYS[""]},
        "data": {"responses": config.data.responses, "examples": len(examples), "digest": examples.digest},
        "metrics": {name: value for name, value in last.items() if name != "tokens_per_second"},
    }
    if final.exists() and jax.process_index() == 0:
        shutil.rmtree(final)  # of a shorter run that was resumed
    model_directory.save(final, trainer.model, trainable, backbone, extra)
    processes.barrier("model directory")
    if jax.process_index() == 0:
        require_written(output / "config.yaml", *([output / "metrics.jsonl"] if config.train.steps else []), final)
    return final


def load_examples(config: TrainConfig, backbone: LoadedBackbone | None = None) -> tuple[Examples, LoadedBackbone]:
    """Returns the tokenized examples of a TrainConfig with their targets, and the backbone.

    The weights are loaded after the targets are computed, so that only one copy is in memory at a time.
    """
    columns = supervised.columns(config.loss) + (("finish",) if config.data.finished_only else ())
    records = read_records(str(config.data.responses), columns, config.data.split, key="data.responses")
    path, kernel = config.backbone.path, config.kernels.attention
    description = backbone or open_checkpoint(path, Execution(sharding.make_mesh(config.mesh), kernel))[0]
    num_appended = config.compression.num_tokens + config.compression.num_thought_tokens
    extra = supervised.texts(config.loss)
    examples = tokenize(records, description.tokenizer, config.data, num_appended, extra)
    processes.assert_equal_across_processes({"data": examples.digest_ids(), "backbone": description.identity})
    if len(examples) < len(records):
        reason = "their answer is empty" + ", or was cut" * config.data.finished_only
        logger.warning(f"left out {len(records) - len(examples)} of {len(records)} records: {reason}")
    if config.teacher.kind == "file":
        options.require(config, "teacher.path")
        if config.teacher.query_weight:
            raise InputError("teacher.kind=file has no vectors of queries: mix them in the file, without query_weight")
        if "negative_target" in supervised.targets(config.loss):
            raise InputError("teacher.kind=file has no targets of negative answers: pass loss.negative=0")
        examples.target = targets.read_targets(str(config.teacher.path), len(records), examples.row)
    else:
        for name, column in supervised.targets(config.loss).items():
            pair = (column, column.replace("answer", "question"))
            answers, queries = ([records[row][key].strip() for row in examples.row] for key in pair)
            responses = str(config.data.responses)
            setattr(examples, name, targets.compute_mixed_targets(description, config, answers, queries, responses))
    questions = [records[row]["question"].strip() for row in examples.row]
    whitening.transform_targets(examples, config.teacher, questions)
    return examples, backbone or load_backbone(path, config.backbone.dtype, description.mesh, kernel)


class CompressionTrainer:
    """Trains compression tokens and heads (and a LoRA) on examples: model, batches and programs of a TrainConfig."""

    def __init__(self, config: TrainConfig, backbone: LoadedBackbone, examples: Examples) -> None:
        assert examples.target is not None
        self.config, self.backbone, self.examples = config, backbone, examples
        self.model = LLM2VecGenModel(
            backbone.architecture,
            config.compression.num_tokens,
            config.compression.num_thought_tokens,
            examples.target.shape[1],
            config.lora.rank,
            config.lora.alpha / config.lora.rank if config.lora.rank else 0.0,
            dataclasses.replace(backbone.execution, remat=first_remat(config.train.remat)),
        )
        self.schedule = BatchSchedule(
            [len(ids) for ids in examples.query],
            [len(ids) for ids in examples.answer],
            config.train.batch_size,
            config.data.max_buckets,
            config.data.shuffle,
            config.data.seed,
            [max(map(len, texts)) for texts in zip(*examples.extra.values())],
        )
        self.batches = Batches(examples, self.schedule, jax.process_index(), jax.process_count())
        # The keys and values of all batches are padded to the same number of slots: the step compiles once per answer
        # length and the prefill once per query length, instead of once per pair.
        slots = {"query": self.schedule.query_edges[-1], "extra": max(self.schedule.extra_edges, default=0)}
        names = [] if self.model.lora_rank else ["query", *(["extra"] if examples.extra else [])]
        self.prefills = {name: CompiledCache(jit_prefill(self.model, slots[name])) for name in names}
        self.record = {
            "backbone": backbone.identity,
            "data": examples.digest,
            "shapes": {
                "tokens": [self.model.num_appended, self.model.architecture.hidden_size],
                "embedding": self.model.embedding_size,
                "lora": self.model.lora_rank,
            },
        }

    def init(self) -> Any:
        """Returns the initial trainable tree: that of train.init_from, or a random one."""
        config = self.config.train
        if config.init_from:
            record = model_directory.read_model_directory(config.init_from)
            model, trainable = model_directory.to_model(record, self.backbone, config.init_from)
            if differing := diff(model.shapes, self.model.shapes):
                raise InputError(
                    f"train.init_from={config.init_from}: differs from the model of this run ({differing})"
                )
            return trainable
        init = jax.jit(self.model.init, out_shardings=sharding.replicated(self.backbone.mesh))
        return init(jax.random.key(config.seed), self.backbone.frozen)

    def begin(self, trainable: Any) -> Any:
        """Returns the tree of the first step: with a ridge-regression alignment head if train.ridge_examples is set."""
        count = self.config.train.ridge_examples
        return ridge.solve_alignment_head(self, trainable, count) if count else trainable

    def prefill(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a batch with the ids of `query` and `extra` replaced by their keys and values.

        Unchanged with a LoRA, on which the states of the query depend.
        """
        frozen, names = self.backbone.frozen, self.prefills.keys() & batch.keys()
        caches = {name: self.prefills[name](frozen, batch[name], batch[f"{name}_lengths"]) for name in names}
        return dict(batch) | caches

    def compile(
        self, state: TrainState, steps: range, show_progress: bool, heartbeat: Callable[[str], None] = lambda _: None
    ) -> StepFunction:
        """Returns the step as a function of (state, batch), compiled for all batch shapes of `steps`.

        The largest shape is compiled first: it resolves train.remat=auto, and fails if it does not fit in memory.
        """
        batches = {(batch.S, batch.T, batch.extra): step for step in reversed(steps) for batch in [self.schedule[step]]}
        frozen, mesh = self.backbone.frozen, self.backbone.mesh
        programs = CompiledCache(jit_step(self.config, self.model))
        shapes = sorted(batches, reverse=True)
        with progress.bar(len(shapes), "batch shape", "compile", enabled=show_progress and len(shapes) > 0) as bar:
            for number, shape in enumerate(shapes):
                heartbeat(f"the compilation for batch shape {number + 1} of {len(shapes)}")
                batch = sharding.abstract_batch(self.batches[batches[shape]], mesh)
                for name, prefill in self.prefills.items():
                    arguments = frozen, batch[name], batch[f"{name}_lengths"]
                    prefill.compile(*arguments)
                    batch[name] = abstract_cache(prefill.jitted, mesh, *arguments)
                if number == 0 and self.config.train.remat == "auto":
                    programs = step_memory.choose_remat(self._step_with, mesh, (state, frozen, batch))
                programs.compile(state, frozen, batch)
                bar.update(1)
        return lambda state, batch: programs(state, frozen, self.prefill(batch))

    def _step_with(self, remat: str) -> CompiledCache:
        model = dataclasses.replace(self.model, execution=dataclasses.replace(self.model.execution, remat=remat))
        return CompiledCache(jit_step(self.config, model))

    def describe(self, step: int) -> str:
        """Returns a description of the records that a step (from 0) reads."""
        rows = self.examples.row[self.schedule[step].rows].tolist()
        return f"rows {rows} (from 0) of {self.config.data.responses}"
