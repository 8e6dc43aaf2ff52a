"""Training of the method: one pure step, and the run that targets, trains and saves."""

import dataclasses
import functools
import pathlib
import shutil

import jax

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import diff, require_written
from llm2vec_gen_jax.config import options
from llm2vec_gen_jax.data import batches
from llm2vec_gen_jax.data.examples import tokenize
from llm2vec_gen_jax.data.records import read_records
from llm2vec_gen_jax.model.execution import first_remat
from llm2vec_gen_jax.model.layers import Dropout
from llm2vec_gen_jax.model.llm2vec_gen import LLM2VecGenModel
from llm2vec_gen_jax.parallel import processes, sharding
from llm2vec_gen_jax.pretrained import model_directory
from llm2vec_gen_jax.pretrained.backbone import load_backbone
from llm2vec_gen_jax.teachers import targets, whitening
from llm2vec_gen_jax.training import losses, optimizer, ridge, step_memory, supervised
from llm2vec_gen_jax.training.loop import Run, Task
from llm2vec_gen_jax.training.metrics import read_metrics
from llm2vec_gen_jax.training.programs import CompiledCache
from llm2vec_gen_jax.training.run_directory import FREE_KEYS, prepare_run_directory
from llm2vec_gen_jax.training.state import update


def train_step(state, frozen, cache, batch, *, model, optimizer, loss_config, lora_dropout=0.0, seed=0):
    """One update. `frozen` is an argument: never differentiated, never donated, never a constant of the program.

    Returns (new state, metrics of this step).
    """
    dropout = None
    if lora_dropout:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        dropout = Dropout(jax.random.split(key, model.architecture.num_layers), lora_dropout, 0.0)
    return update(state, lambda t: losses.loss_fn(t, model, frozen, cache, batch, loss_config, dropout), optimizer)


def jit_step(config, model):
    """The one place where a step of a config with `lora`, `loss`, `optimizer` and `train` becomes a program.

    The state is donated, and is whole on every device; the frozen backbone stays where it is.
    """
    chunk_tokens = config.loss.chunk_tokens or step_memory.chunk_tokens(model.architecture, model.execution)
    step = functools.partial(
        train_step,
        model=model,
        optimizer=optimizer.make_optimizer(config.optimizer),
        loss_config=dataclasses.replace(config.loss, chunk_tokens=chunk_tokens),
        lora_dropout=config.lora.dropout if config.lora.rank else 0.0,
        seed=config.train.seed,
    )
    execution = model.execution
    return jax.jit(
        step,
        donate_argnums=0,
        out_shardings=sharding.replicated(execution.mesh),
        compiler_options=execution.compiler_options,
    )


def jit_prefill(model, slots, prefix=LLM2VecGenModel.prefix):
    """`prefix` of a model, padded to a number of slots, as a program of (frozen, ids)."""
    execution = model.execution
    return jax.jit(
        functools.partial(prefix, model, slots=slots),
        out_shardings=sharding.cache_sharding(execution.mesh),
        compiler_options=execution.compiler_options,
    )


def abstract_cache(jitted, mesh, frozen, ids):
    """Returns the ShapeDtypeStructs of what a `jit_prefix` makes."""
    put = sharding.cache_sharding(mesh)
    cache = jax.eval_shape(jitted, frozen, ids)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=put), cache)


def train(config, show_progress=True, backbone=None):
    """Runs (or resumes) the training that a TrainConfig describes. Returns the path of the finished model directory.

    backbone: the config's backbone where it is loaded already.

    Raises InputError for bad configuration or data, FloatingPointError naming the step of a non-finite loss.
    """
    options.require(config, "data.responses", "train.output")
    if config.teacher.adapters and config.teacher.kind != "llm2vec":
        raise InputError(f"teacher.adapters are for teacher.kind=llm2vec, not for {config.teacher.kind}: remove them")
    with processes.locked(config.train.output, "train.output"):
        return _train(config, show_progress, backbone)


def _train(config, show_progress, backbone):
    output = pathlib.Path(config.train.output)
    resuming = prepare_run_directory(output, config)
    final = output / "model"
    mesh = sharding.make_mesh(config.mesh)
    columns = supervised.columns(config.loss) + (("finish",) if config.data.finished_only else ())
    records = read_records(config.data.responses, columns, config.data.split, key="data.responses")
    backbone = backbone or load_backbone(config.backbone.path, config.backbone.dtype, mesh, config.kernels.attention)
    extra = supervised.texts(config.loss)
    examples = tokenize(records, backbone.tokenizer, config.data, _num_appended(config), extra)
    processes.assert_equal_across_processes({"data": examples.digest_ids(), "backbone": backbone.identity})
    if len(examples) < len(records):
        why = "their answer is empty" + ", or was cut" * config.data.finished_only
        print(f"left out {len(records) - len(examples)} of {len(records)} records: {why}")
    if config.teacher.kind == "file":
        options.require(config, "teacher.path")
        if "negative_target" in supervised.targets(config.loss):
            raise InputError("teacher.kind=file has no targets of negative answers: pass loss.negative=0")
        examples.target = targets.read_targets(config.teacher.path, len(records), examples.row)
    else:
        for name, column in supervised.targets(config.loss).items():
            answers = [records[row][column].strip() for row in examples.row]
            vectors, backbone = targets.targets_of(backbone, config, answers, config.data.responses)
            setattr(examples, name, vectors)
    whitening.transform_targets(examples, config.teacher, [records[row]["question"].strip() for row in examples.row])
    method = CompressionTrainer(config, backbone, examples)
    run = Run(method.task(), config.train, config.optimizer, backbone.mesh, output, config)
    run.start(resuming)
    if run.first_step >= config.train.steps and processes.run_on_process_0(final.exists):
        print(f"{final}: already finished")
        return final
    run.loop(show_progress)
    trainable = run.state.trainable
    model_directory.check_finite(trainable, output)
    # A run that was killed after its last step has logged everything and only lacks the directory.
    last = run.last_record or read_metrics(output)[-1]
    extra = {
        # Not how its processes were joined, nor what tracks it, nor the speed: equal runs leave equal directories.
        "config": {key: value for key, value in options.to_dict(config).items() if key not in FREE_KEYS[""]},
        "data": {"responses": config.data.responses, "examples": len(examples), "digest": examples.digest},
        "metrics": {name: value for name, value in last.items() if name != "tokens_per_second"},
    }
    if final.exists() and jax.process_index() == 0:
        shutil.rmtree(final)  # of a shorter run that this one went on from
    model_directory.save(final, method.model, trainable, backbone, extra)
    processes.barrier("model directory")
    if jax.process_index() == 0:
        require_written(output / "config.yaml", output / "metrics.jsonl", final)
    return final


def _num_appended(config):
    return config.compression.num_tokens + config.compression.num_thought_tokens


class CompressionTrainer:
    """The method as what a Run trains: model, plan of batches and jitted functions of a TrainConfig."""

    def __init__(self, config, backbone, examples):
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
        self.plan = batches.BatchSchedule(
            [len(ids) for ids in examples.query],
            [len(ids) for ids in examples.answer],
            config.train.batch_size,
            config.data.max_buckets,
            config.data.shuffle,
            config.data.seed,
            [max(map(len, texts)) for texts in zip(*examples.extra.values())],
        )
        self.batches = batches.Batches(examples, self.plan, jax.process_index(), jax.process_count())
        # Every batch's keys and values are padded to the same slots: the step compiles once per answer length,
        # the prefix once per query length, instead of once per pair of them.
        self.prefix = CompiledCache(jit_prefill(self.model, self.plan.query_edges[-1]))
        if examples.extra:
            self.extra_prefix = CompiledCache(jit_prefill(self.model, self.plan.extra_edges[-1], supervised.prefix))
        self.update = CompiledCache(jit_step(config, self.model))

    def task(self):
        """Returns the Task."""
        record = {
            "backbone": self.backbone.identity,
            "data": self.examples.digest,
            "shapes": {
                "tokens": [self.model.num_appended, self.model.architecture.hidden_size],
                "embedding": self.model.embedding_size,
                "lora": self.model.lora_rank,
            },
        }
        return Task(self.init, self.step, self.batches, record, self.where, self.compile, self.begin)

    def init(self):
        """Returns the trainable tree to start from: that of train.init_from, or a fresh one."""
        config = self.config.train
        if config.init_from:
            model, trainable = model_directory.to_model(
                model_directory.read_model_directory(config.init_from), self.backbone, config.init_from
            )
            if differing := diff(model.shapes, self.model.shapes):
                raise InputError(f"train.init_from={config.init_from}: is another model than this run's ({differing})")
            return trainable
        init = jax.jit(self.model.init, out_shardings=sharding.replicated(self.backbone.mesh))
        return init(jax.random.key(config.seed), self.backbone.frozen)

    def begin(self, trainable):
        """Returns the trainable tree of the first step."""
        examples = self.config.train.ridge_examples
        return ridge.start(self, trainable, examples) if examples else trainable

    def step(self, state, batch):
        """One update on a batch that is on the mesh."""
        cache, batch = self.read(batch)
        return self.update(state, self.backbone.frozen, cache, batch)

    def read(self, batch):
        """Returns (keys and values of the queries, what is left of the batch); None and all of it with a LoRA, which
        changes what the query's states are."""
        if self.model.lora_rank:
            return None, batch
        cache = self.prefix(self.backbone.frozen, batch.pop("query"))
        if "extra" in batch:
            batch["extra_cache"] = self.extra_prefix(self.backbone.frozen, batch.pop("extra"))
        return cache, batch

    def compile(self, state, steps, show_progress, beat=lambda what: None):
        """Compiles every program that the batches of `steps` need, the largest first; so what does not fit is known
        before anything is begun, and train.remat=auto is settled by it."""
        batches = {(batch.S, batch.T, batch.extra): step for step in reversed(steps) for batch in [self.plan[step]]}
        order = sorted(batches, reverse=True)
        frozen, lora = self.backbone.frozen, self.model.lora_rank
        with progress.bar(len(order), "batch shape", "compile", enabled=show_progress and len(order) > 0) as bar:
            for number, shape in enumerate(order):
                beat(f"the compilation for batch shape {number + 1} of {len(order)}")
                batch = sharding.abstract_batch(self.batches[batches[shape]], self.backbone.mesh)
                cache = None
                if not lora:
                    cache = self._compile_prefix(self.prefix, batch.pop("query"))
                    if "extra" in batch:
                        batch["extra_cache"] = self._compile_prefix(self.extra_prefix, batch.pop("extra"))
                if number == 0 and self.config.train.remat == "auto":
                    self._choose_remat(state, cache, batch)
                self.update.compile(state, frozen, cache, batch)
                bar.update(1)

    def _compile_prefix(self, prefix, ids):
        """Compiles a prefix. Returns the abstract cache that it makes."""
        prefix.compile(self.backbone.frozen, ids)
        return abstract_cache(prefix.jitted, self.backbone.mesh, self.backbone.frozen, ids)

    def _choose_remat(self, state, cache, batch):
        """Makes the model, and its step, that of the policy that fits the largest batch."""

        def compile_with(policy):
            execution = dataclasses.replace(self.model.execution, remat=policy)
            self.model = dataclasses.replace(self.model, execution=execution)
            self.update = CompiledCache(jit_step(self.config, self.model))
            return self.update.compile(state, self.backbone.frozen, cache, batch)

        step_memory.choose_remat(compile_with, self.backbone.mesh)

    def where(self, step):
        """Names the records of a step."""
        rows = self.examples.row[self.plan[step].rows].tolist()
        return f"rows {rows} (from 0) of {self.config.data.responses}"
