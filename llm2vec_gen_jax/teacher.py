"""Alignment targets: the unsupervised teacher's vector of every response, computed once and kept."""

import functools
import pathlib

import jax
import numpy as np

from llm2vec_gen_jax import progress, sharding
from llm2vec_gen_jax.data import choose_edges, pad
from llm2vec_gen_jax.download import cache_folder
from llm2vec_gen_jax.errors import InputError
from llm2vec_gen_jax.files import exclusive, fingerprint, read_array, read_json, write_json
from llm2vec_gen_jax.formats import peft
from llm2vec_gen_jax.loading import load_backbone, resolve_adapter
from llm2vec_gen_jax.model import Model

_FLUSH_EVERY = 20  # batches between records of how far a target file is


def is_causal(config):
    """Whether the llm2vec teacher of a TeacherConfig attends causally.

    Without adapters an untrained bidirectional pass is far worse than the causal one, so `auto` depends on them.
    """
    return config.attention == "causal" or (config.attention == "auto" and not config.adapters)


def read_targets(path, records, rows):
    """Returns the targets (len(rows), E) that a .npy (records, E) holds for the used rows.

    Raises InputError when it is no such array.
    """
    targets = read_array(path, "teacher.path")
    if targets.ndim != 2 or len(targets) != records or not np.issubdtype(targets.dtype, np.floating):
        raise InputError(
            f"teacher.path={path}: expected a float array ({records} rows of data.responses, E), "
            f"found {targets.dtype} {targets.shape}"
        )
    with np.errstate(over="ignore"):  # a float64 too large for float32 becomes infinite
        targets = np.asarray(targets[rows], np.float32)
    if not (sound := np.isfinite(targets).all(axis=1)).all():
        raise InputError(f"teacher.path={path}: row {rows[np.argmin(sound)]} (from 0) holds NaN or infinity")
    return targets


def targets_of(backbone, config, answers, responses):
    """Returns (targets (n, D) float32, backbone) of stripped answers by the llm2vec teacher of a TrainConfig.

    They are kept beside the responses file under a hash of teacher and texts; an interrupted computation goes on
    where it stopped. Adapters are merged into the backbone itself, which is then loaded again: there is never a
    second copy, and only the returned backbone may be used afterwards.
    """
    adapters = [resolve_adapter(adapter) for adapter in config.teacher.adapters]
    causal = is_causal(config.teacher)
    ids = backbone.tokenizer.encode(answers, config.data.max_answer_length)
    key = fingerprint(
        {
            "backbone": backbone.identity,
            "dtype": str(jax.tree.leaves(backbone.frozen)[0].dtype),
            "adapters": [peft.identity(adapter) for adapter in adapters],
            "causal": causal,
            "ids": fingerprint(ids),
        }
    )
    file = _folder(responses) / f"{key}.npy"
    if file.exists():
        return np.load(file), backbone
    with exclusive(file.with_suffix(".lock")):
        if file.exists():  # another run, on the same responses, has computed them meanwhile
            return np.load(file), backbone
        frozen = backbone.frozen
        for adapter in adapters:
            frozen = peft.merge(frozen, adapter, backbone.architecture)
        pool = functools.partial(mean_pool, backbone.architecture, frozen, causal)
        targets = _compute(file, ids, config.teacher.batch_size, backbone.mesh, pool, backbone.architecture.hidden_size)
    if adapters:
        del frozen, pool
        backbone.frozen = None
        backbone = load_backbone(config.backbone.path, config.backbone.dtype, backbone.mesh)
    return targets, backbone


def _folder(responses):
    path = pathlib.Path(responses)
    return path.with_name(path.name + ".targets") if path.exists() else cache_folder() / "targets"


def mean_pool(architecture, frozen, causal, ids_BT, lengths_B):
    """Model.mean_pool, compiled: the llm2vec teacher's vectors (B, D), float32."""
    model = Model(architecture, 1, 0, architecture.hidden_size)
    return _jitted(model, frozen, ids_BT, lengths_B, causal)


@functools.partial(jax.jit, static_argnums=(0, 4))
def _jitted(model, frozen, ids_BT, lengths_B, causal):
    return model.mean_pool(frozen, ids_BT, lengths_B, causal)


def _compute(file, ids, batch_size, mesh, pool, width):
    """Fills `file` batch by batch, longest texts first, through a partial file that a later call continues."""
    shards = sharding.batch_shards(mesh)
    batch_size = -(-batch_size // shards) * shards
    order = np.argsort([-len(row) for row in ids], kind="stable")
    edges = choose_edges([len(row) for row in ids], 8)
    partial, marker = file.with_name(f"{file.stem}.partial.npy"), file.with_name(f"{file.stem}.partial.json")
    if marker.exists() and partial.exists():
        done = read_json(marker)["done"]
        targets = np.lib.format.open_memmap(partial, mode="r+")
    else:
        done = 0
        marker.unlink(missing_ok=True)
        targets = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=(len(ids), width))
    with progress.bar(len(ids), "text", "teacher targets", initial=done) as bar:
        for number, start in enumerate(range(done, len(ids), batch_size)):
            rows = order[start : start + batch_size]
            batch = [ids[row] for row in rows] + [[]] * (batch_size - len(rows))
            lengths_B = np.array([len(row) for row in batch], np.int32)
            ids_BT = pad(batch, edges[np.searchsorted(edges, lengths_B.max())])
            targets[rows] = np.asarray(pool(*sharding.put_batch((ids_BT, lengths_B), mesh)))[: len(rows)]
            bar.update(len(rows))
            if number % _FLUSH_EVERY == _FLUSH_EVERY - 1:
                targets.flush()
                write_json(marker, {"done": start + len(rows)})
    targets.flush()
    partial.replace(file)
    marker.unlink(missing_ok=True)
    return np.load(file)
