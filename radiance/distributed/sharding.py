"""Which device holds what: the mesh, one table of path rules for parameters, the batch, and what flows through the network.

Axes: `data` (replicas), `fsdp` (weights, optimizer and batch in parts), `tensor` (heads and MLP channels in parts). `jax.jit` with
such places is what was called pjit.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from radiance import config
from radiance.base.trees import leaf_path

MESH_AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # over which the images of a batch are spread
BATCH_SPEC = PartitionSpec(BATCH_AXES)

# The first rule whose pattern is found in a parameter's path says how its last axes lie; stacked layers have one axis more. T5 has
# rules of its own only where it has leaves of its own.
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


def make_mesh(mesh: config.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Devices (all of all hosts when None) along the axes of the config. Raises ConfigError when the sizes do not make up their number."""
    devices = jax.devices() if devices is None else devices
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    num_devices = len(devices)
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(num_devices // -int(np.prod(sizes)), 1)
    if int(np.prod(sizes)) != num_devices:
        raise config.ConfigError(
            f"mesh={tuple(sizes)} makes {int(np.prod(sizes))} devices, but there are {num_devices}: change the sizes, or set one to -1."
        )
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def partition_spec(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Where the parameter of that path lies; an axis that does not divide is not split."""
    return PartitionSpec(
        *(
            name if name and size % mesh.shape[name] == 0 else None
            for name, size in zip(_match_rule(path, shape), shape)
        )
    )


def _match_rule(path: str, shape: tuple[int, ...]) -> tuple[str | None, ...]:
    axes = next((axes for pattern, axes in SHARDING_RULES if re.search(pattern, path)), ())
    return (None,) * (len(shape) - len(axes)) + axes


def check_divisible(params: Any, mesh: jax.sharding.Mesh):
    """Raises ConfigError that names the first parameter with an axis which the rules would split and the mesh does not divide."""
    for keys, leaf in jax.tree_util.tree_leaves_with_path(params):
        path = leaf_path(keys)
        for name, size in zip(_match_rule(path, leaf.shape), leaf.shape):
            if name and size % mesh.shape[name]:
                raise config.ConfigError(
                    f"{path} has {size} rows or columns to be split, which mesh.{name}={mesh.shape[name]} does not divide: change one of them, or "
                    "let it be whole on every device with mesh.uneven=replicate."
                )


def make_shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A tree like `tree` (of arrays or shapes) with their places. Works for parameters and for trees that hold them (optimizer
    states, averages), as the rules look at the end of the path.
    """

    def make_sharding(path, leaf):
        return NamedSharding(mesh, partition_spec(leaf_path(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(make_sharding, tree)


def host_shardings(tree: Any) -> Any:
    """A tree of places in this host's own memory: for what is read in full where an accelerator may have no room for it."""
    cpu_sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(lambda _: cpu_sharding, tree)


def constrain_sharding(x: jax.Array, *axes: str | tuple[str, ...] | None) -> jax.Array:
    """`x`, told the compiler to lie so over the mesh of `jax.set_mesh`; as it is where there is none.

    Without this the compiler may spread activations as the weights are, and talk more than it computes. An axis that does not
    divide is whole on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _divisible_spec(mesh, x.shape, axes))


def shard_map_batch_and_heads(f: Callable) -> Callable:
    """`f(*arrays [b, h, …], lengths [b]) -> [b, h, …]`, run on each device with its own rows and heads: for kernels that the
    compiler cannot split itself.
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
    mesh: Any, shape: tuple[int, ...], axes: tuple[str | tuple[str, ...] | None, ...]
) -> PartitionSpec:
    def axis_size(axis: str | tuple[str, ...]) -> int:
        return int(
            np.prod([mesh.shape[name] for name in (axis if isinstance(axis, tuple) else (axis,))])
        )

    return PartitionSpec(
        *(axis if axis and size % axis_size(axis) == 0 else None for size, axis in zip(shape, axes))
    )


def host_rows(mesh: jax.sharding.Mesh, batch_size: int) -> list[int]:
    """The rows of a global batch that this host's devices work on."""
    row_slices = (
        NamedSharding(mesh, BATCH_SPEC).addressable_devices_indices_map((batch_size,)).values()
    )
    return sorted({row for (row_slice,) in row_slices for row in range(batch_size)[row_slice]})


def put_batch(
    batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh, batch_size: int
) -> dict[str, jax.Array]:
    """Global arrays of `size` rows from this host's; what has no rows is the same everywhere."""

    def put(x):
        x = np.asarray(x)
        sharding, shape = (
            (NamedSharding(mesh, BATCH_SPEC), (batch_size, *x.shape[1:]))
            if x.ndim
            else (NamedSharding(mesh, PartitionSpec()), ())
        )
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return {name: put(x) for name, x in batch.items()}


def put_global(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Global arrays from arrays that every host has whole; rows are spread where they divide."""

    def put(x):
        x = np.asarray(x)
        sharding = NamedSharding(mesh, _divisible_spec(mesh, x.shape, (BATCH_AXES,)))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    return jax.tree.map(put, tree)


def gather_array(x: jax.Array) -> np.ndarray:
    """A global array, whole on every host."""
    if x.is_fully_addressable:
        return np.asarray(x)
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
