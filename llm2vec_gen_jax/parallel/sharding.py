"""The device mesh, and the mesh axis of each logical axis. The only module that names mesh axes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding

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


def make_mesh(config: Any, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the (data, fsdp, tensor) mesh of a MeshConfig; one device is the mesh (1, 1, 1).

    devices: default the devices of all processes. Raises InputError if the sizes do not match.
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
        raise InputError(f"{named}: does not match the number of devices, {len(devices)}")
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns NamedShardings for a tree of boxed parameters (see backbone.abstract_params).

    Raises InputError naming the parameter and sizes if a dimension does not divide over its mesh axis.
    """

    def shard(path, box):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        spec = []
        for size, logical in zip(box.value.shape, box.names, strict=True):
            axis = RULES[logical]
            if axis is not None and size % mesh.shape[axis]:
                raise InputError(
                    f"{name}: its {logical} dimension of {size} is not divisible by mesh.{axis}={mesh.shape[axis]}"
                )
            spec.append(axis)
        return NamedSharding(mesh, jax.P(*spec))

    return jax.tree_util.tree_map_with_path(shard, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a replicated array."""
    return NamedSharding(mesh, jax.P())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Returns the sharding of an array whose dimension `axis` is the batch."""
    return NamedSharding(mesh, jax.P(*[None] * axis, BATCH_AXES))


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of cached keys and values (L, B, G, S, H)."""
    return NamedSharding(mesh, jax.P(None, BATCH_AXES, "tensor"))


def batch_shards(mesh: Mesh) -> int:
    """Returns the number of shards of a batch."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """Returns (index, count): which of `count` equal parts of every batch the devices of this process hold.

    Processes whose devices hold the same rows, those of one tensor-parallel group, have the same part. Raises
    InputError if the rows of two processes overlap only in part.
    """
    places: Mapping[Any, Any] = batch_sharding(mesh).devices_indices_map((batch_shards(mesh),))
    shards: dict[int, set[int]] = {}
    for device, (rows,) in places.items():
        shards.setdefault(device.process_index, set()).add(rows.start or 0)
    parts = sorted({tuple(sorted(own)) for own in shards.values()})
    held = sorted(shard for part in parts for shard in part)  # of a part, not always neighbors
    if held != list(range(batch_shards(mesh))) or len({*map(len, parts)}) > 1:
        sizes = ", ".join(f"mesh.{name}={size}" for name, size in mesh.shape.items())
        raise InputError(f"{sizes}: {len(shards)} processes cannot have parts of a batch. Choose other mesh sizes")
    return parts.index(tuple(sorted(shards[jax.process_index()]))), len(parts)


def constrain_batch(x: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Constrains an array inside jit to be sharded over the batch only. No effect without a mesh or on one device.

    Otherwise the compiler may shard activations like the weights: with fsdp, each device would compute all rows, and
    activations would be communicated instead of weights.
    """
    if mesh is None or mesh.size == 1 or x.shape[0] % batch_shards(mesh):
        return x
    return jax.lax.with_sharding_constraint(x, batch_sharding(mesh))


def constrain_vocab(head_VD: jax.Array, mesh: Mesh | None) -> jax.Array:
    """Gathers the output matrix over fsdp inside jit: once instead of for every chunk of logits."""
    if mesh is None or mesh.size == 1 or head_VD.shape[0] % mesh.shape["tensor"]:
        return head_VD
    return jax.lax.with_sharding_constraint(head_VD, NamedSharding(mesh, jax.P("tensor")))


def on_shards(
    function: Callable[..., jax.Array], mesh: Mesh | None, first: jax.Array, *others: jax.Array | None
) -> jax.Array:
    """Calls `function` inside jit on each device's rows and heads of arrays (B, T, heads, size), (B, T) or None.

    For kernels that the compiler cannot partition. The result has the shape of the first array.
    """
    if mesh is None or mesh.size == 1:
        return function(first, *others)
    rows = BATCH_AXES if first.shape[0] % batch_shards(mesh) == 0 else None
    specs = [jax.P(rows, None, "tensor") if x is not None and x.ndim == 4 else jax.P(rows) for x in (first, *others)]
    # check_vma: kernels do not declare over which axes their results vary.
    return jax.shard_map(function, mesh=mesh, in_specs=tuple(specs), out_specs=specs[0], check_vma=False)(
        first, *others
    )


def put_batch(tree: Any, mesh: Mesh) -> Any:
    """Returns global arrays, sharded over the batch, from this process's rows (batch_part; numpy, leading B)."""
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(batch_sharding(mesh), x), tree)


def abstract_batch(tree: Any, mesh: Mesh) -> Any:
    """Returns the ShapeDtypeStructs of `put_batch(tree, mesh)`."""
    sharding, (_, parts) = batch_sharding(mesh), batch_part(mesh)

    def describe(x):
        return jax.ShapeDtypeStruct((parts * x.shape[0], *x.shape[1:]), x.dtype, sharding=sharding)

    return jax.tree.map(describe, tree)


def put_rows(tree: Any, mesh: Mesh) -> Any:
    """Returns global arrays, sharded over the batch, from numpy arrays with all rows (leading B) on every process."""
    sharding = batch_sharding(mesh)
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)


def put_replicated(tree: Any, mesh: Mesh) -> Any:
    """Returns replicated global arrays from numpy arrays that are equal on every process."""
    sharding = replicated(mesh)

    def put(x):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def to_numpy(x: jax.Array | np.ndarray) -> np.ndarray:
    """Returns a global array as numpy. Every process must call it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable and not x.is_fully_replicated:
        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def gather(x: jax.Array) -> np.ndarray | None:
    """Returns a global array as numpy on process 0, None on the others. Every process must call it."""
    array = to_numpy(x)
    return array if jax.process_index() == 0 else None
