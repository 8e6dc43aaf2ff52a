"""The training loop: feeds batches, logs, saves checkpoints, resumes, and stops on request."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, Protocol, Self

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
from llm2vec_gen_jax.training.metrics import MetricsWriter, read_validation
from llm2vec_gen_jax.training.optimizer import make_optimizer, make_schedule
from llm2vec_gen_jax.training.step import TrainState, check_batch_size, new_state

if TYPE_CHECKING:
    from llm2vec_gen_jax.training.validation import Validation

logger = logging.getLogger(__name__)

_SAVE, _STOP = 1, 2  # requests of a process to all processes; the largest is executed

Metrics = dict[str, jax.Array]
_Pending = tuple[int, dict[str, Any], int]  # step, its metrics on the device, computed tokens
StepFunction = Callable[[TrainState, Mapping[str, Any]], tuple[TrainState, Metrics]]


class BatchSource(Protocol):
    """Padded numpy batches by step, from 0; a data source of grain."""

    def __len__(self) -> int: ...
    def __getitem__(self, step: int) -> dict[str, np.ndarray]: ...


class Trainer(Protocol):
    """Model-specific part of a training run.

    record: JSON dict that identifies the run in its checkpoints; another one cannot restore them.
    """

    record: dict[str, Any]

    @property
    def batches(self) -> BatchSource:
        """Batches of this process; every `NAME` with a `NAME_lengths` counts as tokens."""

    def init(self) -> Any:
        """Returns the trainable tree on the mesh."""

    def begin(self, trainable: Any) -> Any:
        """Returns the tree of the first step, computed from that of `init`."""

    def is_revised(self, step: int) -> bool:
        """Whether the tree is changed after a step (from 1)."""

    def revise(self, trainable: Any, beat: Callable[[str], None]) -> Any:
        """Returns the changed tree. beat: called with a description before each part."""

    def compile(
        self, state: TrainState, steps: range, show_progress: bool, heartbeat: Callable[[str], None]
    ) -> StepFunction:
        """Returns the step as a function of (state, batch on the mesh), compiled for `steps` (from 0).

        heartbeat: called with a description before each compilation.
        """

    def describe(self, step: int) -> str:
        """Returns a description of the rows that a step (from 0) reads, for errors about a non-finite loss."""


class TrainingCallback:
    """Hooks of a training run, called on process 0. Override those that are needed."""

    def on_log(self, record: Mapping[str, Any]) -> None:
        """Gets each record of metrics.jsonl."""

    def on_validation(self, record: Mapping[str, Any]) -> bool | None:
        """Gets each record of validation.jsonl. Return True to end the training at this step."""

    def on_checkpoint(self, step: int) -> None:
        """Called when the checkpoint of a step is being written."""


class _Window:
    """Metrics of the steps since the last record, of which a record holds the means."""

    def __init__(self, learning_rates: np.ndarray) -> None:
        self.learning_rates = learning_rates
        self._reset(time.perf_counter())

    def _reset(self, now: float) -> None:
        self.started, self.tokens = now, 0.0
        self.rows: list[dict[str, float]] = []
        self.padding: list[float] = []

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time of what runs inside from tokens_per_second."""
        start = time.perf_counter()
        yield
        self.started += time.perf_counter() - start

    def add(self, values: dict[str, float], computed: int) -> None:
        real = values.pop("tokens")
        self.rows.append(values)
        self.padding.append(1 - real / computed)
        self.tokens += real

    def flush(self, number: int) -> dict[str, Any]:
        now = time.perf_counter()
        record: dict[str, Any] = {"step": number}
        record |= {name: float(np.mean([row[name] for row in self.rows])) for name in self.rows[0]}
        record["learning_rate"] = float(self.learning_rates[number - 1])
        record["tokens_per_second"] = round(self.tokens / (now - self.started), 1)
        record["padding_fraction"] = round(float(np.mean(self.padding)), 4)
        self._reset(now)
        return record


class Run:
    """A training run: a Trainer, its checkpoints and its current state."""

    def __init__(
        self,
        trainer: Trainer,
        settings: TrainSettings,
        optimizer: OptimizerConfig,
        mesh: jax.sharding.Mesh,
        output: pathlib.Path,
        config: TrackingConfig,
        validation: Validation | None = None,
        callbacks: Sequence[TrainingCallback] = (),
    ) -> None:
        """config: complete configuration of the command, for the tracker."""
        shards = sharding.batch_shards(mesh)
        check_batch_size(settings, shards)
        self.trainer, self.settings, self.mesh, self.output, self.config = trainer, settings, mesh, output, config
        # Computed before the loop: inside it, each value would wait for the running step.
        rates = make_schedule(optimizer)(jnp.arange(settings.steps))
        self.learning_rates = np.broadcast_to(rates, settings.steps)
        self.optimizer = make_optimizer(optimizer)
        self.validation, self.callbacks = validation, callbacks

    def start(self, resuming: bool) -> None:
        """Initializes state and step, from the newest valid checkpoint if `resuming`."""
        record = self.trainer.record | ({"validation": self.validation.digest} if self.validation else {})
        processes.assert_equal_across_processes({"record": record})
        replicated = sharding.replicated(self.mesh)
        start = jax.jit(lambda trainable: new_state(trainable, self.optimizer), out_shardings=replicated)
        self.state: TrainState = start(self.trainer.init())
        self.first_step = 0
        keep, validation = self.settings.keep_checkpoints, self.validation
        kept_step = (lambda: validation.kept_step) if validation else lambda: None
        self.checkpoints = Checkpoints(self.output / "checkpoints", record, keep, kept_step)
        restored = self.checkpoints.restore(self.state) if resuming else None
        if restored is not None:
            self.state, self.first_step = restored
            logger.info(f"resuming {self.output} at step {self.first_step}")
        else:
            self.state = start(self.trainer.begin(self.state.trainable))
        self.step = self.first_step
        if validation:
            validation.rows = processes.run_on_process_0(lambda: read_validation(self.output, self.first_step))

    @property
    def is_finished(self) -> bool:
        """Whether no step and no evaluation is left."""
        if self.step < self.settings.steps and not (self.validation and self.validation.is_exhausted):
            return False
        return not self._is_evaluation_missing()

    @property
    def final_step(self) -> int:
        """The step whose state is the result of a finished run."""
        kept = self.validation.kept_step if self.validation else None
        return self.step if kept is None else kept

    def _is_evaluation_missing(self) -> bool:
        validation, step = self.validation, self.step
        return bool(
            validation and step and validation.is_due(step, self.settings.steps) and not validation.record_of(step)
        )

    def loop(self, show_progress: bool, name: str = "train") -> None:
        """Trains until train.steps, with logging, evaluations and checkpoints. The state is then that of final_step.

        Raises preemption.Stopped on a stop request, after saving a checkpoint of the last step. Step n is dispatched
        before the metrics of step n-1 are read, so that the device does not wait for the host.
        """
        self.name = name
        settings = self.settings
        if processes.stop_requested():
            self.checkpoints.close()
            raise preemption.Stopped(f"{self.output}: stopped on request, at step {self.first_step}")
        watchdog = Watchdog(settings.watchdog, self.checkpoints.check)

        def before_compiling(description: str) -> None:
            watchdog.beat(description)
            if processes.stop_requested():
                raise preemption.Stopped(f"{self.output}: stopped on request, at step {self.first_step}")

        with watchdog, self.checkpoints.settled():
            steps = range(self.first_step, settings.steps)
            train_step = self.trainer.compile(self.state, steps, show_progress, before_compiling)
            with preemption.deferred():
                self._train(train_step, show_progress, watchdog.beat)
            if self.final_step != self.step:
                self.checkpoints.wait()
                self.state = self.checkpoints.read(self.final_step, self.state)
        self.checkpoints.close()

    def _train(self, train_step: StepFunction, show_progress: bool, beat: Callable[[str], None]) -> None:
        settings, state = self.settings, self.state
        window = _Window(self.learning_rates)
        steps = range(self.first_step + 1, settings.steps + 1)
        bar = progress.bar(settings.steps, "step", self.name, initial=self.first_step, enabled=show_progress)
        batches = iterate(self.trainer.batches, self.first_step, settings.steps)
        self.saved_step, self.saved_at = self.first_step, time.monotonic()
        with self._writer() as writer, bar, _Profile(settings.profile, self.output) as profile:
            # If the run was interrupted between checkpoint and evaluation.
            ends = self._is_evaluation_missing() and self._validate(writer, bar, beat)
            if ends or self.is_finished:
                return
            pending: _Pending | None = None
            for number, (batch, on_mesh) in zip(steps, _ahead(batches, self.mesh)):
                beat(f"step {number}")
                self.checkpoints.check()
                profile.before(number)
                evaluates = self._is_evaluated(number)
                due = number % settings.checkpoint_every == 0 or number == settings.steps or evaluates
                due = due or self.trainer.is_revised(number)
                real, computed = count_tokens(on_mesh if jax.process_count() > 1 else batch)
                request: Any = self._request_of_any()
                # An implicit transfer would wait for the running step and block the host.
                with jax.transfer_guard("disallow"):
                    state, metrics = train_step(state, on_mesh)
                    action = self._finish(pending, window, writer, bar)
                    pending = (number, metrics | {"tokens": real, "request": request}, computed)
                    if due or action or number in (steps[0], profile.last):  # the first step is timed separately
                        action = max(action, self._finish(pending, window, writer, bar))
                        pending = None
                profile.after(number)
                if self.trainer.is_revised(number):
                    with window.paused():
                        state = dataclasses.replace(state, trainable=self.trainer.revise(state.trainable, beat))
                self.state, self.step = state, number
                if due or action:
                    self.checkpoints.save(number, state)
                    self.saved_step, self.saved_at = number, time.monotonic()
                    self._call(lambda callback: callback.on_checkpoint(self.step))
                if action == _STOP and number < settings.steps:
                    self._stop()
                if evaluates:
                    with window.paused():
                        ends = self._validate(writer, bar, beat)
                    if ends:
                        break

    def _stop(self) -> NoReturn:
        self.checkpoints.close()
        raise preemption.Stopped(f"{self.output}: stopped on request, and saved at step {self.step}")

    def _is_evaluated(self, step: int) -> bool:
        return self.validation is not None and self.validation.is_due(step, self.settings.steps)

    def _call(self, hook: Callable[[TrainingCallback], Any]) -> bool:
        """Calls a hook of all callbacks on process 0. Returns whether one of them returned True, on all processes."""
        if not self.callbacks:
            return False
        return bool(processes.run_on_process_0(lambda: any([hook(callback) is True for callback in self.callbacks])))

    def _validate(self, writer: MetricsWriter | None, bar: Any, beat: Callable[[str], None]) -> bool:
        """Evaluates the state and logs the record. Returns whether training is to end."""
        assert self.validation is not None
        validation = self.validation

        def check(description: str) -> None:
            beat(f"the evaluation of step {self.step}")
            bar.set_description_str(f"validate: {description}")
            if processes.stop_requested():
                self._stop()

        values = validation.evaluate(self.state.trainable, check)
        bar.set_description_str(self.name)
        record = processes.run_on_process_0(lambda: {"step": self.step} | values)
        if writer:
            writer.write_validation(record)
        validation.rows.append(record)
        if not bar.disable:
            text = ", ".join(f"{name} {value:.4f}" for name, value in record.items() if name != "step")
            best = " (best so far)" if validation.best_step == self.step else ""
            bar.write(f"step {self.step}: {text}{best}")
        return self._call(lambda callback: callback.on_validation(record)) or validation.is_exhausted

    def _writer(self) -> contextlib.AbstractContextManager[MetricsWriter | None]:
        if jax.process_index() > 0:
            return contextlib.nullcontext()
        return MetricsWriter(self.output, self.first_step, self.config.tracking, options.to_dict(self.config))

    def _request_of_any(self) -> jax.Array | int:
        """Returns the largest request of all processes: to stop, to save because of checkpoint_minutes, or 0.

        It is read with the metrics of its step, which avoids another synchronization.
        """
        minutes = self.settings.checkpoint_minutes
        due = 0 < minutes * 60 <= time.monotonic() - self.saved_at
        request = _STOP if preemption.asked() else _SAVE * due
        if jax.process_count() == 1:
            return request
        rows = np.full(self.settings.batch_size // sharding.batch_part(self.mesh)[1], request, np.int32)
        return jnp.max(sharding.put_batch(rows, self.mesh))

    def _finish(self, pending: _Pending | None, window: _Window, writer: MetricsWriter | None, bar: Any) -> int:
        """Reads the metrics of a dispatched step and logs them if due. Returns the request of the processes."""
        if pending is None:
            return 0
        number, metrics, computed = pending
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            last = self.saved_step
            saved = f"the checkpoint of step {last} is intact" if last else "there is no checkpoint yet"
            raise FloatingPointError(
                f"step {number}: the loss is {values['loss']}, the gradient norm {values['grad_norm']}; {saved}. "
                f"The batch is {self.trainer.describe(number - 1)}"
            )
        request = int(values.pop("request"))
        window.add(values, computed)
        bar.update(1)
        bar.set_postfix_str(f"loss {values['loss']:.3f}", refresh=False)
        is_end = number in (self.first_step + 1, self.settings.steps)
        if number % self.settings.log_every == 0 or is_end or self._is_evaluated(number):
            record = window.flush(number)
            if writer:
                writer.write(record)
            for callback in self.callbacks if jax.process_index() == 0 else ():
                callback.on_log(record)
        return request


def _ahead(
    batches: Iterable[dict[str, np.ndarray]], mesh: jax.sharding.Mesh, depth: int = 2
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, jax.Array]]]:
    """Yields (batch, batch on the mesh). Transfers of the next batches overlap with the computation."""
    transferred: collections.deque[tuple[dict[str, np.ndarray], dict[str, jax.Array]]] = collections.deque()
    for batch in batches:
        transferred.append((batch, sharding.put_batch(batch, mesh)))
        if len(transferred) > depth:
            yield transferred.popleft()
    yield from transferred


class _Profile:
    """Writes a trace of the steps START:STOP to output/profile, for TensorBoard and xprof."""

    def __init__(self, steps: str | None, output: pathlib.Path) -> None:
        self.folder, self.running = output / "profile", False
        self.first: int | None = None
        self.last: int | None = None
        if steps is not None:
            first, _, last = steps.partition(":")
            self.first, self.last = whole_number(first), whole_number(last)
            if self.first is None or self.last is None or not 1 <= self.first <= self.last:
                raise InputError(f"train.profile={steps}: expected START:STOP, the first and the last step of a trace")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.running:
            self._stop()

    def before(self, number: int) -> None:
        if number == self.first:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def after(self, number: int) -> None:
        """Stops the trace after step `last`. Call it when the metrics of that step have been read."""
        if self.running and number == self.last:
            self._stop()

    def _stop(self) -> None:
        self.running = False
        jax.profiler.stop_trace()
        if jax.process_index() == 0:
            logger.info(f"profile: {self.folder}")
