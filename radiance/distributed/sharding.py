"""Place arrays on devices: mesh, sharding rules for parameters, batches and activations.

The mesh has the axes `data` (replicas), `fsdp` (weights, optimizer state and batch are sharded) and
`tensor` (heads and MLP channels are sharded).
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from radiance import config
from radiance.base.trees import leaf_path

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # of the rows of a batch
BATCH_SPEC = PartitionSpec(BATCH_AXES)
AnyMesh = jax.sharding.Mesh | jax.sharding.AbstractMesh
AxisNames = str | tuple[str, ...] | None  # mesh axes that one axis of an array is sharded over

# The first rule whose pattern matches a parameter's path gives the mesh axes of its last axes.
# Stacked layers have one more axis in front. T5 has rules of its own only for leaves that other
# models lack.
SHARDING_RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"attention/qkv/kernel$", ("fsdp", None, "tensor", None)),
    (r"attention/qkv/bias$", (None, "tensor", None)),
    (r"attention/[qkv]/kernel$", ("fsdp", "tensor", None)),
    (r"attention/proj/kernel$", ("tensor", None, "fsdp")),
    (r"mlp/(linear_in|gate)/kernel$", ("fsdp", "tensor")),
    (r"mlp/linear_in/bias$", ("tensor",)),
    (r"mlp/linear_out/kernel$", ("tensor", "fsdp")),
    (r"head/blocks/param_generator/kernel$", ("fsdp", "tensor")),
    (r"head/blocks/param_generator/bias$", ("tensor",)),
    (r"^embedding$", (None, "fsdp")),
    (r"(modulation|patch_embed|text_embed|head/linear)\b.*/kernel$", (None, "fsdp")),
)


# --- mesh and rules ------------------------------------------------------------------------------


def make_mesh(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Return the devices along the axes of a config.

    Args:
        mesh: Sizes of the axes; one of them may be -1.
        devices: Devices; those of all hosts if None.

    Raises:
        ConfigError: The product of the sizes is not the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    num_devices = len(devices)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(num_devices // -int(np.prod(sizes)), 1)
    if int(np.prod(sizes)) != num_devices:
        raise config.ConfigError(
            f"mesh={tuple(sizes)} needs {int(np.prod(sizes))} devices, but there are "
            f"{num_devices}: change the sizes, or set one to -1."
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=axis_types, devices=devices)


def partition_spec(path: str, shape: tuple[int, ...], mesh: AnyMesh) -> PartitionSpec:
    """Return the sharding of the parameter with that path and shape.

    An axis that its mesh axis does not divide is replicated.
    """
    return PartitionSpec(
        *(
            name if name and size % mesh.shape[name] == 0 else None
            for name, size in zip(_match_rule(path, shape), shape)
        )
    )


def _match_rule(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    """Return the mesh axis of every axis of a parameter."""
    axes = next((axes for pattern, axes in SHARDING_RULES if re.search(pattern, path)), ())
    return (None,) * (len(shape) - len(axes)) + axes


def check_divisible(params: Any, mesh: AnyMesh):
    """Check that the mesh divides every axis that the rules shard.

    Raises:
        ConfigError: It does not; the message names the first such parameter.
    """
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = leaf_path(keys)
        for name, size in zip(_match_rule(path, leaf.shape), leaf.shape):
            if name and size % mesh.shape[name]:
                raise config.ConfigError(
                    f"{path} has {size} rows or columns, which mesh.{name}={mesh.shape[name]} does "
                    "not divide: change one of them, or set mesh.uneven=replicate to replicate it."
                )


def make_shardings(tree: Any, mesh: AnyMesh) -> Any:
    """Return the shardings of a tree of parameters.

    Trees that contain parameters, such as optimizer states and averages, work too: the rules match
    the end of a path.

    Args:
        tree: Arrays or abstract arrays.
        mesh: The mesh.
    """

    def make_sharding(keys: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition_spec(leaf_path(keys), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(make_sharding, tree)


def host_shardings(tree: Any) -> Any:
    """Return shardings that place a tree in this host's memory.

    They serve trees that are read completely and may not fit on an accelerator.
    """
    cpu_sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(lambda _: cpu_sharding, tree)


# --- activations ---------------------------------------------------------------------------------


def constrain_sharding(x: jax.Array, *axes: AxisNames) -> jax.Array:
    """Constrain the sharding of an activation over the mesh of `jax.set_mesh`.

    Without constraints the compiler may shard activations like the weights, and communicate more
    than it computes. An axis that does not divide is replicated. Without a mesh this does nothing.

    Args:
        x: The activation.
        *axes: Mesh axes of the first axes of x.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _divisible_spec(mesh, x.shape, axes))


def shard_map_batch_and_heads(f: Callable) -> Callable:
    """Run a function on every device with that device's rows and heads.

    This is for kernels that the compiler cannot partition. Without a mesh, `f` is returned.

    Args:
        f: A function of arrays [b, h, …] and lengths [b] that returns an array [b, h, …].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return f

    def run_sharded(*inputs: jax.Array) -> jax.Array:
        spec = _divisible_spec(mesh, inputs[0].shape, (BATCH_AXES, "tensor"))
        in_specs = (*(spec for _ in inputs[1:]), PartitionSpec(spec[0]))
        return jax.shard_map(f, in_specs=in_specs, out_specs=spec, check_vma=False)(*inputs)

    return run_sharded


def _divisible_spec(
    mesh: Any, shape: tuple[int, ...], axes: tuple[AxisNames, ...]
) -> PartitionSpec:
    """Return a sharding without the axes that do not divide."""

    def axis_size(axis: str | tuple[str, ...]) -> int:
        names = axis if isinstance(axis, tuple) else (axis,)
        return int(np.prod([mesh.shape[name] for name in names]))

    return PartitionSpec(
        *(axis if axis and size % axis_size(axis) == 0 else None for size, axis in zip(shape, axes))
    )


# --- batches and host arrays ---------------------------------------------------------------------


def host_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """Return the rows of a global batch that this host's devices compute."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    row_slices = sharding.addressable_devices_indices_map((batch_size,)).values()
    rows = range(batch_size)
    return sorted({row for index in row_slices if index for row in rows[index[0]]})


def put_batch(
    batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int
) -> dict[str, jax.Array]:
    """Return global arrays from this host's rows.

    Args:
        batch: Arrays of this host's rows; scalars are the same on every host.
        mesh: The mesh.
        batch_size: Number of rows on all hosts.
    """

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        spec = BATCH_SPEC if x.ndim else PartitionSpec()
        global_shape = (batch_size, *x.shape[1:]) if x.ndim else ()
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), x, global_shape)

    return {name: put(x) for name, x in batch.items()}


def put_global(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Return global arrays from arrays that every host has completely; rows are sharded."""

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        sharding = NamedSharding(mesh, _divisible_spec(mesh, x.shape, (BATCH_AXES,)))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def gather_array(x: jax.Array) -> np.ndarray:
    """Return a global array, complete on every host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
