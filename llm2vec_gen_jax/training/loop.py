"""The training loop: feeds batches, logs, saves checkpoints, resumes, and stops on request."""

import collections
import contextlib
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from llm2vec_gen_jax.common import progress
from llm2vec_gen_jax.common.errors import InputError
from llm2vec_gen_jax.common.files import whole_number
from llm2vec_gen_jax.config import OptimizerConfig, TrackingConfig, TrainSettings, options
from llm2vec_gen_jax.data.batches import count_tokens, iterate
from llm2vec_gen_jax.parallel import preemption, processes, sharding
from llm2vec_gen_jax.parallel.watchdog import Watchdog
from llm2vec_gen_jax.training.checkpoints import Checkpoints
from llm2vec_gen_jax.training.metrics import MetricsWriter
from llm2vec_gen_jax.training.optimizer import make_optimizer, make_schedule
from llm2vec_gen_jax.training.step import TrainState, new_state

_SAVE, _STOP = 1, 2  # what a process asks of all of them; the largest is done


StepFunction = Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, dict[str, jax.Array]]]


class Trainer(Protocol):
    """What a Run trains.

    batches: padded numpy batches by step from 0, this process's rows of each; `NAME` with a `NAME_lengths` are counted
    as tokens. record: JSON dict of what a checkpoint belongs to; restoring with another one is an error.
    """

    batches: Sequence[dict[str, np.ndarray]]
    record: dict[str, Any]

    def init(self) -> Any:
        """Returns the trainable tree on the mesh."""

    def begin(self, trainable: Any) -> Any:
        """Returns the tree of the first step, computed from that of `init`."""

    def compile(
        self, state: TrainState, steps: range, show_progress: bool, heartbeat: Callable[[str], None]
    ) -> StepFunction:
        """Returns the step as a function of (state, batch on the mesh), with what `steps` (from 0) need compiled.

        heartbeat: to be called with a description before each compilation.
        """

    def describe(self, step: int) -> str:
        """Names the rows that a step (from 0) reads, for the error about a loss that is not finite."""


class Run:
    """A training run: a Trainer, its checkpoints, and the state reached."""

    def __init__(
        self,
        trainer: Trainer,
        settings: TrainSettings,
        optimizer: OptimizerConfig,
        mesh: jax.sharding.Mesh,
        output: pathlib.Path,
        config: TrackingConfig,
    ) -> None:
        """config: the whole configuration of the command, for the tracker."""
        shards = sharding.batch_shards(mesh)
        if settings.batch_size % shards:
            raise InputError(f"train.batch_size={settings.batch_size} does not divide over {shards} data shards")
        self.trainer, self.settings, self.mesh, self.output, self.config = trainer, settings, mesh, output, config
        # All at once and before the loop: one by one, each would wait on the device behind the step under way.
        rates = make_schedule(optimizer)(jnp.arange(settings.steps))
        self.learning_rates = np.broadcast_to(rates, settings.steps)
        self.optimizer = make_optimizer(optimizer)
        self.last_record = None

    def start(self, resuming):
        """Sets state and first step: from the newest sound checkpoint, or fresh."""
        processes.assert_equal_across_processes({"record": self.trainer.record})
        replicated = sharding.replicated(self.mesh)
        start = jax.jit(lambda trainable: new_state(trainable, self.optimizer), out_shardings=replicated)
        self.state, self.first_step = start(self.trainer.init()), 0
        self.checkpoints = Checkpoints(self.output / "checkpoints", self.trainer.record, self.settings.keep_checkpoints)
        found = self.checkpoints.restore(self.state) if resuming else None
        if found is not None:
            self.state, self.first_step = found
            print(f"resuming {self.output} at step {self.first_step}")
        else:
            self.state = start(self.trainer.begin(self.state.trainable))

    def loop(self, show_progress, name="train"):
        """Trains to train.steps, logging and checkpointing on the way.

        Raises preemption.Stopped when asked to stop, with a checkpoint of the last step. Step n is dispatched before
        the metrics of step n-1 are read, so the device never waits for the host.
        """
        settings = self.settings
        if processes.stop_requested():
            self.checkpoints.close()
            raise preemption.Stopped(f"{self.output}: stopped as asked, at step {self.first_step}")
        watchdog = Watchdog(settings.watchdog, self.checkpoints.check)

        def before_compiling(what):
            watchdog.beat(what)
            if processes.stop_requested():
                raise preemption.Stopped(f"{self.output}: stopped as asked, at step {self.first_step}")

        with watchdog, self.checkpoints.settled():
            steps = range(self.first_step, settings.steps)
            train_step = self.trainer.compile(self.state, steps, show_progress, before_compiling)
            with preemption.deferred():
                self._train(train_step, show_progress, name, watchdog.beat)
        self.checkpoints.close()

    def _train(self, train_step, show_progress, name, beat):
        settings, state = self.settings, self.state
        window = _Window(self.learning_rates)
        steps = range(self.first_step + 1, settings.steps + 1)
        bar = progress.bar(settings.steps, "step", name, initial=self.first_step, enabled=show_progress)
        batches = iterate(self.trainer.batches, self.first_step, settings.steps)
        self.saved_step, self.saved_at = self.first_step, time.monotonic()
        with self._writer() as writer, bar, _Profile(settings.profile, self.output) as profile:
            pending = None
            for number, (batch, on_mesh) in zip(steps, _ahead(batches, self.mesh)):
                beat(f"step {number}")
                self.checkpoints.check()
                profile.before(number)
                due = number % settings.checkpoint_every == 0 or number == settings.steps
                real, computed = count_tokens(on_mesh if jax.process_count() > 1 else batch)
                asked = self._asked_on_any()
                # What goes over to the device unasked would wait there for the step under way, and the host with it.
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, on_mesh)
                    wish = self._finish(pending, window, writer, bar)
                    pending = (number, metrics | {"tokens": real, "asked": asked}, computed)
                    if due or wish or number in (steps[0], profile.last):  # the first has a time of its own
                        wish = max(wish, self._finish(pending, window, writer, bar))
                        pending = None
                profile.after(number)
                if due or wish:
                    self.checkpoints.save(number, state)
                    self.saved_step, self.saved_at = number, time.monotonic()
                if wish == _STOP and number < settings.steps:
                    self.checkpoints.close()
                    raise preemption.Stopped(f"{self.output}: stopped as asked, and saved at step {number}")
        self.state = state

    def _writer(self):
        if jax.process_index() > 0:
            return contextlib.nullcontext()
        return MetricsWriter(self.output, self.first_step, self.config.tracking, options.to_dict(self.config))

    def _asked_on_any(self):
        """Whether any process was asked to stop, or is due to save by its clock: the same on all of them.

        Read with the metrics of its step, so that nobody waits for it.
        """
        minutes = self.settings.checkpoint_minutes
        due = 0 < minutes * 60 <= time.monotonic() - self.saved_at
        asked = _STOP if preemption.asked() else _SAVE * due
        if jax.process_count() == 1:
            return asked
        rows = np.full(self.settings.batch_size // jax.process_count(), asked, np.int32)
        return jnp.max(sharding.put_batch(rows, self.mesh))

    def _finish(self, pending, window, writer, bar):
        """Reads the metrics of a dispatched step; logs them when they are due. Returns what any process asked for."""
        if pending is None:
            return 0
        number, metrics, computed = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            last = self.saved_step
            kept = f"the checkpoint of step {last} is sound" if last else "there is no checkpoint yet"
            raise FloatingPointError(
                f"step {number}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}; {kept}. "
                f"The batch is {self.trainer.describe(number - 1)}"
            )
        asked = int(values.pop("asked"))
        window.add(values, computed)
        bar.update(1)
        bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
        if number % self.settings.log_every == 0 or number in (self.first_step + 1, self.settings.steps):
            self.last_record = window.flush(number)
            if writer:
                writer.write(self.last_record)
        return asked


def _ahead(batches, mesh, depth=2):
    """Yields (batch, batch on the mesh): what the next steps read goes over while the device computes."""
    waiting = collections.deque()
    for batch in batches:
        waiting.append((batch, sharding.put_batch(batch, mesh)))
        if len(waiting) > depth:
            yield waiting.popleft()
    yield from waiting


class _Profile:
    """Writes a trace of the steps START:STOP to output/profile, which TensorBoard and xprof show."""

    def __init__(self, steps, output):
        self.folder, self.first, self.last, self.running = output / "profile", None, None, False
        if steps is not None:
            first, _, last = steps.partition(":")
            self.first, self.last = whole_number(first), whole_number(last)
            if None in (self.first, self.last) or not 1 <= self.first <= self.last:
                raise InputError(f"train.profile={steps}: expected START:STOP, the first and the last step of a trace")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.running:
            self._stop()

    def before(self, number):
        if number == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, number):
        """Call it when the metrics of step `last` have been read: then the device is done with it."""
        if self.running and number == self.last:
            self._stop()

    def _stop(self):
        self.running = False
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            print(f"profile: {self.folder}", flush=True)


class _Window:
    """Means of the steps since the last record."""

    def __init__(self, learning_rates):
        self.learning_rates = learning_rates
        self._open(time.perf_counter())

    def _open(self, now):
        self.started, self.rows, self.tokens, self.padding = now, [], 0, []

    def add(self, values, computed):
        real = values.pop("tokens")
        self.rows.append(values)
        self.padding.append(1 - real / computed)
        self.tokens += real

    def flush(self, number):
        now = time.perf_counter()
        record = {"step": number}
        record |= {name: float(np.mean([row[name] for row in self.rows])) for name in self.rows[0]}
        record["learning_rate"] = float(self.learning_rates[number - 1])
        record["tokens_per_second"] = round(self.tokens / (now - self.started), 1)
        record["padding_fraction"] = round(float(np.mean(self.padding)), 4)
        self._open(now)
        return record
