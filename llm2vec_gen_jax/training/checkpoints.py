"""Checkpoints (orbax) of the training state: step, trainable tree and optimizer state, with a record of the run.

Orbax does not detect flipped bits, so every checkpoint has a digest of every leaf.
"""

import contextlib
import dataclasses
import errno
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import diff, fingerprint
from llm2vec_gen_jax.parallel import processes
from llm2vec_gen_jax.training.step import TrainState

logger = logging.getLogger(__name__)

_policies = ocp.checkpoint_managers
_ITEMS = ("state", "record")
_DISK_ERRORS = ("OS error", "os_error_code", "No space left", "RESOURCE_EXHAUSTED")  # in messages of tensorstore
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by itemsize


class Checkpoints:
    """The checkpoints/ folder of a run, without the frozen backbone. Saving is asynchronous.

    record: a JSON dict that identifies the run (backbone, data, trainable shapes); restoring with another one raises
    InputError naming the difference. keep: number of latest checkpoints to keep. kept_step: returns a step that is
    kept too.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        record: dict[str, Any],
        keep: int,
        kept_step: Callable[[], int | None] = lambda: None,
    ) -> None:
        self.folder, self.record = folder.absolute(), record
        # Orbax moves deleted steps to _deleted, so that a kill never leaves half a step, and never empties it.
        self._purge()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_policies.AnyPreservationPolicy([_policies.LatestN(keep), _KeepStep(kept_step)]),
            cleanup_tmp_directories=True,
            todelete_subdir="_deleted",
        )
        self.manager = ocp.CheckpointManager(self.folder, item_names=_ITEMS, options=options)

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving a state."""
        record = {"of": self.record, "digests": _digests(state)}
        record = ocp.args.JsonSave(record | {"digest": fingerprint(record)})
        with self._name_failures():
            self.manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=record))

    def restore(self, like: TrainState) -> tuple[TrainState, int] | None:
        """Returns (state, step) of the newest valid checkpoint, with the devices and dtypes of `like`.

        None without checkpoints. Damaged checkpoints are reported and moved to _damaged/, because their steps will be
        saved again; if all are damaged, they stay and InputError is raised.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            state, reason = self._read(step, like)
            if reason is None:
                for damaged_step, damage in damaged.items():
                    self._set_aside(damaged_step, damage)
                return state, step
            damaged[step] = reason
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"{self.folder}: all checkpoints are damaged ({reasons}). Pass train.overwrite=true to start again"
            )
        return None

    def read(self, step: int, like: TrainState) -> TrainState:
        """Returns the state of a step. Raises InputError if its checkpoint is missing or damaged."""
        state, reason = self._read(step, like)
        if reason is not None:
            raise InputError(
                f"{self.folder / str(step)}: the checkpoint of the best step is missing or damaged ({reason}). Pass "
                "validation.keep_best=false to write the model of the last step"
            )
        restored: TrainState = state
        return restored

    def _read(self, step: int, like: TrainState) -> tuple[Any, str | None]:
        """Returns (state, None), or (None, what is damaged)."""
        try:
            record = self.manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            if record.pop("digest", None) != fingerprint(record):
                return None, "the digest of its record differs"
        except Exception as error:  # damaged files raise many types
            return None, _damage(error)
        # Evaluation may begin or end when a run is resumed, but its values must be of the same data.
        begun = {"validation"} - (record["of"].keys() & self.record.keys())
        before, now = ({k: v for k, v in of.items() if k not in begun} for of in (record["of"], self.record))
        if differing := diff(before, now):
            raise InputError(
                f"{self.folder / str(step)}: is of another run ({differing}). Use the settings of that run, choose "
                "another train.output, or pass train.overwrite=true"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        except Exception as error:
            return None, _damage(error)
        digests = _digests(state["state"])
        wrong = [name for name, digest in record["digests"].items() if digests.get(name) != digest]
        return (state["state"], None) if not wrong else (None, f"the digest of {wrong[0]} differs")

    def _set_aside(self, step: int, reason: str) -> None:
        logger.warning(f"{self.folder / str(step)}: damaged ({reason}); moved to _damaged, an older one is used")
        if jax.process_index() == 0:
            target = self.folder / "_damaged" / f"{step}.{time.time_ns()}"
            target.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
        processes.barrier(f"damaged checkpoint {step}")
        self.manager.reload()

    def check(self) -> None:
        """Raises OSError if a save in progress failed."""
        with self._name_failures():
            self.manager.check_for_errors()

    def wait(self) -> None:
        """Waits until all saves are on disk. Raises OSError if one failed."""
        with self._name_failures():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def settled(self) -> Iterator[None]:
        """Waits for a save in progress if the block raises: the interpreter cannot exit during a save.

        Not with several processes, which may have ended, and which exit without finalizing the interpreter.
        """
        try:
            yield
        except BaseException:
            if jax.process_count() == 1:
                with contextlib.suppress(Exception):
                    self.manager.wait_until_finished()
            raise

    def close(self) -> None:
        """Waits for all saves, then closes the orbax manager."""
        self.wait()
        self.manager.close()
        self._purge()

    @contextlib.contextmanager
    def _name_failures(self) -> Iterator[None]:
        """Raises OSError naming the folder for a failed save, which orbax reports in any later call, in many types."""
        try:
            yield
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) and not any(sign in str(error) for sign in _DISK_ERRORS):
                raise
            steps = [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]
            newest = f"the newest one is of step {max(steps)}" if steps else "there is none yet"
            number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            reason = f"a checkpoint could not be written ({first_line(error)}); {newest}"
            raise OSError(number, reason, str(self.folder)) from error

    def _purge(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / "_deleted", ignore_errors=True)


@dataclasses.dataclass(frozen=True)
class _KeepStep:
    """A preservation policy of orbax: keeps the checkpoint of the step that a function returns during later saves."""

    step: Callable[[], int | None]

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        return [checkpoint.step == self.step() for checkpoint in checkpoints]


@jax.jit
def _digest_leaves(leaves):
    """Returns a checksum of the bits of each array. The weights are odd, so any change of one element changes it."""

    def digest(x):
        bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).ravel().astype(jnp.uint32)
        weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) | 1
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    return [digest(leaf) for leaf in leaves]


def _digests(state: TrainState | Mapping[str, Any]) -> dict[str, int]:
    """Returns {path: digest} of a state, independent of devices and number of processes."""
    paths, leaves = zip(*jax.tree.leaves_with_path(state))
    digests = jax.device_get(_digest_leaves(leaves))
    return {jax.tree_util.keystr(path): int(digest) for path, digest in zip(paths, digests, strict=True)}


def _damage(error: Exception) -> str:
    """Returns a summary of a reader's exception. Raises it if it reports that another process has ended."""
    if processes.names_a_peer(error):
        raise error
    return first_line(error)
