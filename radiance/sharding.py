"""Which device holds what: the mesh, one table of path rules for parameters, and the batch.

Axes: `data` (replicas), `fsdp` (weights, optimizer and batch in parts), `tensor` (heads and MLP channels in parts).
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from radiance import config

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))

# The first rule whose pattern is found in a parameter's path says how its last axes lie; stacked layers have one axis more. T5 has
# rules of its own only where it has leaves of its own.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
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


def make_mesh(mesh: config.Mesh) -> jax.sharding.Mesh:
    """All devices along the axes of the config. Raises ConfigError when the sizes do not make up their number."""
    sizes = [mesh.data, mesh.fsdp, mesh.tensor]
    count = jax.device_count()
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(count // -int(np.prod(sizes)), 1)
    if int(np.prod(sizes)) != count:
        raise config.ConfigError(
            f"mesh={tuple(sizes)} makes {int(np.prod(sizes))} devices, but there are {count}: change the sizes, or set one to -1."
        )
    return jax.make_mesh(tuple(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> PartitionSpec:
    """Where the parameter of that path lies; an axis that does not divide is not split."""
    names = next((names for pattern, names in RULES if re.search(pattern, path)), ())
    names = (None,) * (len(shape) - len(names)) + names
    return PartitionSpec(*(name if name and size % mesh.shape[name] == 0 else None for name, size in zip(names, shape)))


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A tree like `tree` (of arrays or shapes) with their places. Works for parameters and for trees that hold them (optimizer
    states, averages), as the rules look at the end of the path."""

    def place(path, leaf):
        name = "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in path)
        return NamedSharding(mesh, spec_of(name, leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, tree)


def put_batch(batch: dict[str, np.ndarray], mesh: jax.sharding.Mesh) -> dict[str, jax.Array]:
    """Global arrays from this host's rows; what has no rows is the same everywhere."""

    def put(x):
        return jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH if np.ndim(x) else PartitionSpec()), np.asarray(x))

    return {name: put(x) for name, x in batch.items()}
