"""Checkpoints of what trains, by orbax: step, trainable tree, optimizer state, and a record of what they belong to.

Orbax restores an array with a flipped bit without a word, so every checkpoint holds a digest of every leaf.
"""

import contextlib
import errno
import shutil
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from llm2vec_gen_jax.common.errors import InputError, first_line
from llm2vec_gen_jax.common.files import diff, fingerprint
from llm2vec_gen_jax.parallel import processes

_policies = ocp.checkpoint_managers
_ITEMS = ("state", "record")
_OF_THE_DISK = ("OS error", "os_error_code", "No space left", "RESOURCE_EXHAUSTED")  # in what tensorstore says
_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint32}  # by bytes of a number


class Checkpoints:
    """The checkpoints/ folder of a run. Saving is asynchronous; the frozen backbone is never in it.

    record: a JSON dict of what a checkpoint only fits (backbone, data, trainable shapes); restoring with another one
    raises InputError that names the difference.
    """

    def __init__(self, folder, record, keep):
        self.folder, self.record = folder.absolute(), record
        # Orbax moves deleted steps here first, so that a kill never leaves half a step; it never empties it.
        self._purge()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_policies.LatestN(keep), cleanup_tmp_directories=True, todelete_subdir="_deleted"
        )
        self.manager = ocp.CheckpointManager(self.folder, item_names=_ITEMS, options=options)

    def save(self, step, state):
        """Starts to save a state under its step."""
        record = {"of": self.record, "digests": _digests(state)}
        record = ocp.args.JsonSave(record | {"digest": fingerprint(record)})
        with self._failures_named():
            self.manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), record=record))

    def restore(self, like):
        """Returns (state, step) of the newest sound checkpoint, on the devices and in the types of `like`.

        None where there is no checkpoint. Damaged ones are named and moved to _damaged/, out of the way of the steps
        that are to be saved again; when all are, they stay where they are and it is an InputError.
        """
        damaged = {}
        for step in sorted(self.manager.all_steps(), reverse=True):
            state, reason = self._read(step, like)
            if reason is None:
                for number, reason in damaged.items():
                    self._set_aside(number, reason)
                return state, step
            damaged[step] = reason
        if damaged:
            reasons = "; ".join(f"{step}: {reason}" for step, reason in damaged.items())
            raise InputError(
                f"{self.folder}: no checkpoint is sound ({reasons}). Pass train.overwrite=true to start anew"
            )
        return None

    def _read(self, step, like):
        """Returns (state, None), or (None, what is wrong with it)."""
        try:
            record = self.manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
            if record.pop("digest", None) != fingerprint(record):
                return None, "its record does not have its digest"
        except Exception as error:  # whatever a damaged file makes of a reader
            return None, _damage(error)
        if differing := diff(record["of"], self.record):
            raise InputError(
                f"{self.folder / str(step)}: is of another run ({differing}). Use what it was made with, choose "
                "another train.output, or pass train.overwrite=true"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            state = self.manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        except Exception as error:
            return None, _damage(error)
        found = _digests(state["state"])
        wrong = [name for name, digest in record["digests"].items() if found.get(name) != digest]
        return (state["state"], None) if not wrong else (None, f"{wrong[0]} does not have its digest")

    def _set_aside(self, step, reason):
        print(f"{self.folder / str(step)}: damaged ({reason}); moved to _damaged, an older one is used", flush=True)
        if jax.process_index() == 0:
            target = self.folder / "_damaged" / f"{step}.{time.time_ns()}"
            target.parent.mkdir(exist_ok=True)
            (self.folder / str(step)).rename(target)
        processes.barrier(f"damaged checkpoint {step}")
        self.manager.reload()

    def check(self):
        """Raises OSError when a save that was started cannot be written."""
        with self._failures_named():
            self.manager.check_for_errors()

    def wait(self):
        """Returns when every started save is on disk. Raises OSError when one cannot be written."""
        with self._failures_named():
            self.manager.wait_until_finished()

    @contextlib.contextmanager
    def settled(self):
        """Lets a save that is under way come to its end when the block fails: Python cannot end in the midst of one.

        Not in a run of several processes: the others may be gone, and its processes end without any ado.
        """
        try:
            yield
        except BaseException:
            if jax.process_count() == 1:
                with contextlib.suppress(Exception):
                    self.manager.wait_until_finished()
            raise

    def close(self):
        """Waits, then frees what orbax holds."""
        self.wait()
        self.manager.close()
        self._purge()

    @contextlib.contextmanager
    def _failures_named(self):
        """A save that fails is reported by orbax later, in the next call of any kind, and by many types."""
        try:
            yield
        except (ValueError, OSError) as error:
            if isinstance(error, ValueError) and not any(sign in str(error) for sign in _OF_THE_DISK):
                raise
            steps = [int(path.name) for path in self.folder.iterdir() if path.name.isdecimal()]
            newest = f"the newest one there is of step {max(steps)}" if steps else "there is none yet"
            number = errno.ENOSPC if "No space left" in str(error) else errno.EIO
            reason = f"a checkpoint could not be written ({first_line(error)}); {newest}"
            raise OSError(number, reason, str(self.folder)) from error

    def _purge(self):
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / "_deleted", ignore_errors=True)


@jax.jit
def _digest_leaves(leaves):
    """A number of the bits of each array. The weights are odd: a change of any one element changes the sum."""

    def digest(x):
        bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).ravel().astype(jnp.uint32)
        weights = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) | 1
        return jnp.sum(bits * weights, dtype=jnp.uint32)

    return [digest(leaf) for leaf in leaves]


def _digests(state):
    """Returns {path: digest} of a state; the same on any devices and any number of processes."""
    paths, leaves = zip(*jax.tree.leaves_with_path(state))
    digests = jax.device_get(_digest_leaves(leaves))
    return {jax.tree_util.keystr(path): int(digest) for path, digest in zip(paths, digests, strict=True)}


def _damage(error):
    """Returns what a reader's exception says. Raises it where a process that reads as well has ended: no damage."""
    if processes.names_a_peer(error):
        raise error
    return first_line(error)
