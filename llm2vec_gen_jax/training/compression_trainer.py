"""The model, batches and programs of a training run of compression tokens and heads."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import diff
from llm2vec_gen_jax.config import TrainConfig, hub_options
from llm2vec_gen_jax.data.batches import Batches, BatchSchedule
from llm2vec_gen_jax.data.examples import Examples
from llm2vec_gen_jax.model.execution import first_remat
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import sharding
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import LoadedBackbone
from llm2vec_gen_jax.training import ridge, step_memory
from llm2vec_gen_jax.training.loop import StepFunction
from llm2vec_gen_jax.training.programs import CompiledCache
from llm2vec_gen_jax.training.step import TrainState, abstract_cache, jit_prefill, jit_step


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
        reads_answers = config.loss.reconstruction > 0
        read = examples if reads_answers else dataclasses.replace(examples, answer=[])
        self.schedule = BatchSchedule(
            [len(ids) for ids in examples.query],
            [len(ids) for ids in read.answer] or np.zeros(len(examples), int),
            config.train.batch_size,
            config.data.max_buckets,
            config.data.shuffle,
            config.data.seed,
            [max(map(len, texts)) for texts in zip(*examples.extra.values())],
        )
        self.batches = Batches(read, self.schedule, *sharding.batch_part(backbone.mesh))
        # The keys and values of all batches are padded to the same number of slots: the step compiles once per answer
        # length and the prefill once per query length, instead of once per pair. Without answers there are no pairs.
        slots: dict[str, int | None] = {"query": None, "extra": None}
        if reads_answers:
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
        """Returns the initial trainable tree: that of train.init_from, or a random one.

        A LoRA that the model of train.init_from does not have begins as in PEFT, without an effect on the vectors.
        """
        config = self.config.train
        init = jax.jit(self.model.init, out_shardings=sharding.replicated(self.backbone.mesh))
        initial: dict[str, Any] = init(jax.random.key(config.seed), self.backbone.frozen)
        if not config.init_from:
            return initial
        record = model_directory.read_model_directory(config.init_from, hub_options(self.config))
        model, trainable = model_directory.to_model(record, self.backbone, config.init_from)
        if not model.lora_rank:
            model = dataclasses.replace(model, lora_rank=self.model.lora_rank, lora_scale=self.model.lora_scale)
        if differing := diff(model.shapes, self.model.shapes):
            raise InputError(f"train.init_from={config.init_from}: differs from the model of this run ({differing})")
        return initial | trainable

    def begin(self, trainable: Any) -> Any:
        """Returns the tree of the first step: with a ridge-regression alignment head if train.ridge_examples is set."""
        count = self.config.train.ridge_examples
        return ridge.solve_alignment_head(self, trainable, count) if count else trainable

    def is_revised(self, step: int) -> bool:
        """Whether the alignment head is solved after a step (from 1)."""
        every = self.config.train.ridge_every
        return every > 0 and step % every == 0

    def revise(self, trainable: Any, beat: Callable[[str], None]) -> Any:
        """Returns the tree with the alignment head solved again."""
        return ridge.solve_alignment_head(self, trainable, self.config.train.ridge_examples, beat)

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
        return f"rows {rows} (from 0) of {self.config.data.responses or 'the records'}"
