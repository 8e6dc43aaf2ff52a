"""Checkpoints of what trains, by orbax: step, trainable tree, optimizer state, and a record of what they belong to."""

import shutil

import jax
import orbax.checkpoint as ocp

from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.files import changes

_policies = ocp.checkpoint_managers


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
        self.manager = ocp.CheckpointManager(self.folder, item_names=("state", "record"), options=options)

    def latest(self):
        """Returns the newest step, or None."""
        return self.manager.latest_step()

    def save(self, step, state):
        """Starts to save a state under its step."""
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(self.record))
        self.manager.save(step, args=args)

    def restore(self, step, like):
        """Returns the state of a step, on the devices and in the types of `like`."""
        record = self.manager.restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        if differing := changes(record, self.record):
            raise InputError(
                f"{self.folder / str(step)}: is of another run ({differing}). Use what it was made with, choose "
                "another train.output, or pass train.overwrite=true"
            )
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self.manager.restore(step, args=args)["state"]

    def wait(self):
        """Returns when every started save is on disk."""
        self.manager.wait_until_finished()

    def close(self):
        """Waits, then frees what orbax holds."""
        self.manager.close()
        self._purge()

    def _purge(self):
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / "_deleted", ignore_errors=True)
