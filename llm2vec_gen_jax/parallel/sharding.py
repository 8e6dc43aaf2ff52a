"""The mesh, and which of its axes each logical axis is split over. The only file that names mesh axes."""

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding

from llm2vec_gen_jax.common.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
# Logical axis of a backbone weight -> mesh axis. Norms are replicated; nothing is unmatched.
RULES = {
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
}


def make_mesh(config, devices=None):
    """Returns the (data, fsdp, tensor) mesh of a MeshConfig; one device is the mesh (1, 1, 1).

    devices: default those of all processes, which then work together; jax.local_devices() work for this one alone.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [config.data, config.fsdp, config.tensor]
    named = ", ".join(f"mesh.{name}={size}" for name, size in zip(MESH_AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{named}: sizes must be positive, and at most one may be -1")
    if -1 in sizes:
        known = int(np.prod([size for size in sizes if size != -1]))
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if np.prod(sizes) != len(devices):
        raise InputError(f"{named}: does not make {len(devices)} devices")
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_shardings(boxed, mesh):
    """Returns NamedShardings for a tree of boxed parameters (see backbone.abstract_params).

    Raises InputError naming the parameter and sizes when a dimension does not divide over its mesh axis.
    """

    def shard(path, box):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = []
        for size, logical in zip(box.value.shape, box.names, strict=True):
            axis = RULES[logical]
            if axis is not None and size % mesh.shape[axis]:
                raise InputError(
                    f"{name}: its {logical} dimension of {size} does not divide over mesh.{axis}={mesh.shape[axis]}"
                )
            spec.append(axis)
        return NamedSharding(mesh, jax.P(*spec))

    return jax.tree_util.tree_map_with_path(shard, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def replicated(mesh):
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, jax.P())


def batch_sharding(mesh, axis=0):
    """The sharding of an array whose dimension `axis` is the batch."""
    return NamedSharding(mesh, jax.P(*[None] * axis, BATCH_AXES))


def cache_sharding(mesh):
    """The sharding of keys and values (L, B, G, S, H)."""
    return NamedSharding(mesh, jax.P(None, BATCH_AXES, "tensor"))


def batch_shards(mesh):
    """Number of pieces that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def constrain_batch(x, mesh):
    """Inside jit: an array that is split as a batch is, and over nothing else.

    Left to itself the compiler may follow the weights: then fsdp splits every activation by its width, every device
    computes all rows, and activations are moved instead of weights. mesh: None, or of one device: nothing is said.
    """
    if mesh is None or mesh.size == 1 or x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def constrain_vocab(head_VD, mesh):
    """Inside jit: the output matrix, gathered over fsdp once and not for every chunk of logits."""
    if mesh is None or mesh.size == 1 or head_VD.shape[0] % mesh.shape["tensor"]:
        return head_VD
    return jax.lax.with_sharding_constraint(head_VD, NamedSharding(mesh, jax.P("tensor")))


def on_shards(function, mesh, *arrays):
    """Inside jit: `function` of arrays (B, T, heads, size), (B, T) or None, run by each device on its rows and heads.

    For kernels that the compiler cannot split. What it returns is as the first array.
    """
    if mesh is None or mesh.size == 1:
        return function(*arrays)
    rows = BATCH_AXES if arrays[0].shape[0] % batch_shards(mesh) == 0 else None
    specs = [jax.P(rows, None, "tensor") if x is not None and x.ndim == 4 else jax.P(rows) for x in arrays]
    # check_vma: kernels do not say over which axes their results vary.
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(*arrays)


def put_batch(tree, mesh):
    """Makes global arrays, split over the batch, from the rows that this process holds (numpy, leading B)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), tree)


def abstract_batch(tree, mesh):
    """The ShapeDtypeStructs of what `put_batch` makes of the rows that this process holds."""
    sharding, processes = batch_sharding(mesh), jax.process_count()

    def describe(x):
        return jax.ShapeDtypeStruct((processes * x.shape[0], *x.shape[1:]), x.dtype, sharding=sharding)

    return jax.tree.map(describe, tree)


def put_rows(tree, mesh):
    """Makes global arrays, split over the batch, from numpy that every process holds whole (leading B)."""
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def put_replicated(tree, mesh):
    """Makes global arrays that every device holds whole, from numpy that is equal on every process."""
    sharding = replicated(mesh)

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def to_numpy(x):
    """Returns an array as numpy. Every process must call it."""
    if not x.is_fully_addressable and not x.is_fully_replicated:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def gather(x):
    """Returns an array as numpy on process 0, None on the others. Every process must call it."""
    x = to_numpy(x)
    return x if jax.process_index() == 0 else None
