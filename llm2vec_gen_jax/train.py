"""Training: one pure step, and the loop that feeds, logs, checkpoints and resumes it."""

import dataclasses
import functools
import pathlib
import shutil
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from llm2vec_gen_jax import config as config_lib
from llm2vec_gen_jax import data, directory, losses, optim, progress, sharding, supervised, teacher
from llm2vec_gen_jax.checkpoint import Checkpoints
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.files import changes, write_text
from llm2vec_gen_jax.layers import Dropout
from llm2vec_gen_jax.loading import load_backbone
from llm2vec_gen_jax.metrics import MetricsWriter, read_metrics
from llm2vec_gen_jax.model import Model

# What may change when a run is resumed: how long and where it runs, not what it computes.
_FREE_KEYS = {
    "train": ("steps", "log_every", "checkpoint_every", "keep_checkpoints", "output", "overwrite"),
    "teacher": ("batch_size",),
    "mesh": ("data", "fsdp", "tensor"),
}


@struct.dataclass
class TrainState:
    """All that changes: step (int32), trainable tree and optimizer state (float32)."""

    step: jax.Array
    trainable: Any
    opt_state: Any


def train_step(state, frozen, cache, batch, *, model, optimizer, weights, lora_dropout=0.0, seed=0):
    """One update. `frozen` is an argument: never differentiated, never donated, never a constant of the program.

    Returns (new state, metrics of this step). A non-finite loss or gradient leaves the trainable tree as it was.
    """
    dropout = None
    if lora_dropout:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        dropout = Dropout(jax.random.split(key, model.architecture.num_layers), lora_dropout, 0.0)
    (loss, parts), gradients = jax.value_and_grad(losses.total, has_aux=True)(
        state.trainable, model, frozen, cache, batch, weights, dropout
    )
    norm = optax.tree.norm(gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trainable)
    updated = TrainState(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state)
    sound = jnp.isfinite(loss) & jnp.isfinite(norm)
    kept = jax.tree.map(lambda new, old: jnp.where(sound, new, old), updated, state)
    return kept, {"loss": loss, **parts, "grad_norm": norm}


def train(config, show_progress=True, backbone=None):
    """Runs (or resumes) the training that a TrainConfig describes. Returns the path of the finished model directory.

    backbone: the config's backbone where it is loaded already.

    Raises InputError for bad configuration or data, FloatingPointError naming the step of a non-finite loss.
    """
    config_lib.require(config, "data.responses", "train.output")
    output = pathlib.Path(config.train.output)
    resuming = _claim(output, config)
    final = output / "model"
    mesh = sharding.make_mesh(config.mesh)
    records = data.read_records(config.data.responses, supervised.columns(config.loss), config.data.split)
    backbone = backbone or load_backbone(config.backbone.path, config.backbone.dtype, mesh)
    extra = supervised.texts(config.loss)
    examples = data.tokenize(records, backbone.tokenizer, config.data, _num_appended(config), extra)
    if len(examples) < len(records):
        print(f"left out {len(records) - len(examples)} of {len(records)} records: their answer is empty")
    if config.teacher.kind == "file":
        config_lib.require(config, "teacher.path")
        if "negative_target" in supervised.targets(config.loss):
            raise InputError("teacher.kind=file has no targets of negative answers: pass loss.negative=0")
        examples.target = teacher.read_targets(config.teacher.path, len(records), examples.row)
    else:
        for name, column in supervised.targets(config.loss).items():
            answers = [records[row][column].strip() for row in examples.row]
            targets, backbone = teacher.targets_of(backbone, config, answers, config.data.responses)
            setattr(examples, name, targets)
    run = Run(config, backbone, examples, output)
    run.start(resuming)
    if final.exists() and run.first_step >= config.train.steps:
        print(f"{final}: already finished")
        return final
    run.loop(show_progress)
    trainable = run.state.trainable
    directory.check_finite(trainable, output)
    if jax.process_index() == 0:
        if final.exists():
            shutil.rmtree(final)  # of a shorter run that this one went on from
        # A run that was killed after its last step has logged everything and only lacks the directory.
        last = run.last_record or read_metrics(output)[-1]
        summary = [
            f"Trained for {config.train.steps} steps at batch {config.train.batch_size} on {len(examples)} responses; "
            f"reconstruction loss {last['reconstruction_loss']:.4f}, alignment loss {last['alignment_loss']:.4f}."
        ]
        directory.save(final, run.model, trainable, backbone, config_lib.to_dict(config), summary)
    return final


def _num_appended(config):
    return config.compression.num_tokens + config.compression.num_thought_tokens


def _claim(output, config):
    """Makes the run directory this run's. Returns whether it holds an earlier part of the same run."""
    resuming = False
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        old = _config_of(output)
        if config.train.overwrite:
            shutil.rmtree(output)
        elif differing := changes(_fixed(config_lib.to_dict(old)), _fixed(config_lib.to_dict(config))):
            # A run that failed before its first step, often on what is now put right, left its config only.
            if any(path.name != "config.yaml" for path in output.iterdir()):
                raise InputError(
                    f"train.output={output}: holds another run ({differing}). Repeat its settings to resume it, "
                    "choose another output, or pass train.overwrite=true"
                )
        else:
            resuming = True
    write_text(output / "config.yaml", config_lib.to_yaml(config))
    return resuming


def _config_of(output):
    """Returns the TrainConfig of a run directory. Raises InputError when the directory is anything else."""
    try:
        found = config_lib.load(config_lib.TrainConfig, output / "config.yaml")
        config_lib.require(found, "train.output")  # what every run's config has
    except InputError as error:
        raise InputError(
            f"train.output={output}: exists and is not a run directory; it is left as it is. Choose another ({error})"
        ) from None
    return found


def _fixed(values):
    return {
        section: {key: value for key, value in inner.items() if key not in _FREE_KEYS.get(section, ())}
        for section, inner in values.items()
    }


class Run:
    """A training run: the jitted functions, the data plan, the checkpoints and where it stands."""

    def __init__(self, config, backbone, examples, output):
        self.config, self.backbone, self.examples, self.output = config, backbone, examples, output
        self.mesh = backbone.mesh
        compression, settings = config.compression, config.train
        self.model = Model(
            backbone.architecture,
            compression.num_tokens,
            compression.num_thought_tokens,
            examples.target.shape[1],
            config.lora.rank,
            config.lora.alpha / config.lora.rank if config.lora.rank else 0.0,
        )
        shards = sharding.batch_shards(self.mesh)
        if settings.batch_size % shards:
            raise InputError(f"train.batch_size={settings.batch_size} does not divide over {shards} data shards")
        self.plan = data.Plan(
            [len(ids) for ids in examples.query],
            [len(ids) for ids in examples.answer],
            settings.batch_size,
            config.data.max_buckets,
            config.data.shuffle,
            config.data.seed,
            [max(map(len, texts)) for texts in zip(*examples.extra.values())],
        )
        self.schedule = optim.make_schedule(config.optimizer)
        self.optimizer = optim.make_optimizer(config.optimizer)
        # Every batch's keys and values are padded to the same slots: the step compiles once per answer length,
        # the prefix once per query length, instead of once per pair of them.
        slots = self.plan.query_edges[-1]
        self.prefix = jax.jit(functools.partial(self.model.prefix, slots=slots))
        if examples.extra:
            slots = self.plan.extra_edges[-1]
            self.extra_prefix = jax.jit(functools.partial(supervised.prefix, self.model, slots=slots))
        self.step = jax.jit(
            functools.partial(
                train_step,
                model=self.model,
                optimizer=self.optimizer,
                weights=config.loss,
                lora_dropout=config.lora.dropout if config.lora.rank else 0.0,
                seed=settings.seed,
            ),
            donate_argnums=0,
        )
        self.checkpoints = None
        self.last_record = None

    def start(self, resuming):
        """Sets state and first step: from the newest checkpoint, from train.init_from, or fresh."""
        record = {
            "backbone": self.backbone.identity,
            "data": self.examples.digest,
            "shapes": {
                "tokens": [self.model.num_appended, self.model.architecture.hidden_size],
                "embedding": self.model.embedding_size,
                "lora": self.model.lora_rank,
            },
        }
        self.state, self.first_step = self._fresh_state(), 0
        self.checkpoints = Checkpoints(self.output / "checkpoints", record, self.config.train.keep_checkpoints)
        latest = self.checkpoints.latest() if resuming else None
        if latest is not None:
            self.state = self.checkpoints.restore(latest, self.state)
            self.first_step = latest
            print(f"resuming {self.output} at step {latest}")

    def _fresh_state(self):
        config = self.config.train
        if config.init_from:
            model, trainable = directory.to_model(directory.read(config.init_from), self.backbone, config.init_from)
            if differing := changes(dataclasses.asdict(model), dataclasses.asdict(self.model)):
                raise InputError(f"train.init_from={config.init_from}: is another model than this run's ({differing})")
        else:
            init = jax.jit(self.model.init, out_shardings=sharding.replicated(self.mesh))
            trainable = init(jax.random.key(config.seed), self.backbone.frozen)
        start = jax.jit(
            lambda trainable: TrainState(jnp.int32(0), trainable, self.optimizer.init(trainable)),
            out_shardings=sharding.replicated(self.mesh),
        )
        return start(trainable)

    def loop(self, show_progress):
        """Trains to train.steps, logging and checkpointing on the way.

        Step n is dispatched before the metrics of step n-1 are read, so the device never waits for the host.
        """
        config, state = self.config.train, self.state
        batches = data.Batches(self.examples, self.plan, jax.process_index(), jax.process_count())
        writer = MetricsWriter(self.output, self.first_step) if jax.process_index() == 0 else None
        window = _Window(self.schedule, self.first_step)
        steps = range(self.first_step + 1, config.steps + 1)
        with progress.bar(config.steps, "step", "train", initial=self.first_step, enabled=show_progress) as bar:
            pending = None
            for number, batch in zip(steps, data.iterate(batches, self.first_step, config.steps)):
                arrays = sharding.put_batch(batch, self.mesh)
                # A LoRA changes what the query's states are: then the step reads the query itself.
                cache = None if self.model.lora_rank else self.prefix(self.backbone.frozen, arrays.pop("query"))
                if "extra" in arrays and not self.model.lora_rank:
                    arrays["extra_cache"] = self.extra_prefix(self.backbone.frozen, arrays.pop("extra"))
                state, metrics = self.step(state, self.backbone.frozen, cache, arrays)
                self._finish(pending, window, writer, bar)
                pending = (number, metrics, batch)
                due = number % config.checkpoint_every == 0 or number == config.steps
                if due or number == steps[0]:  # the first step compiles: its time is its own
                    self._finish(pending, window, writer, bar)
                    pending = None
                if due:
                    self.checkpoints.save(number, state)
        self.checkpoints.wait()
        self.checkpoints.close()
        if writer:
            writer.close()
        self.state = state

    def _finish(self, pending, window, writer, bar):
        """Reads the metrics of a dispatched step; logs them when they are due."""
        if pending is None:
            return
        number, metrics, batch = pending
        values = {name: float(value) for name, value in metrics.items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            rows = self.examples.row[self.plan[number - 1].rows].tolist()
            raise FloatingPointError(
                f"step {number}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}. The last "
                f"checkpoint is sound; the batch's records are rows {rows} (from 0) of {self.config.data.responses}"
            )
        window.add(values, batch)
        bar.update(1)
        bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
        if number % self.config.train.log_every == 0 or number in (self.first_step + 1, self.config.train.steps):
            self.last_record = window.flush(number)
            if writer:
                writer.write(self.last_record)


class _Window:
    """Means of the steps since the last record."""

    def __init__(self, schedule, first_step):
        self.schedule, self.rows, self.tokens, self.padding = schedule, [], 0, []
        self.started = time.perf_counter()

    def add(self, values, batch):
        padding, real = data.padding_fraction(batch)
        self.rows.append(values)
        self.padding.append(padding)
        self.tokens += real

    def flush(self, number):
        elapsed = time.perf_counter() - self.started
        record = {"step": number}
        record |= {name: float(np.mean([row[name] for row in self.rows])) for name in self.rows[0]}
        record["learning_rate"] = float(self.schedule(number - 1))
        record["tokens_per_second"] = round(self.tokens / elapsed, 1)
        record["padding_fraction"] = round(float(np.mean(self.padding)), 4)
        self.__init__(self.schedule, number)
        return record
