"""The Muon optimizer (Jordan et al. 2024) for the matrices of the blocks."""

from typing import Any

import jax
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, MuonState, scale_by_muon

from radiance import config
from radiance.base.trees import leaf_path
from radiance.model.paths import is_in_blocks
from radiance.model.transformer import Params
from radiance.training.adam import scale_by_adam
from radiance.training.stochastic_rounding import stochastic_round


def muon_axes(path: str) -> MuonDimensionNumbers | None:
    """Return the axes of a stacked leaf that are its matrices' inputs and outputs.

    The other axes, such as that of the blocks, count matrices, and each matrix is orthogonalized by
    itself. So are queries, keys and values, which share a leaf.

    Args:
        path: Path in the parameter tree.

    Returns:
        The axes; None if it is not a matrix of a block.
    """
    if not is_in_blocks(path):
        return None
    if path.endswith("attention/qkv/kernel"):
        return MuonDimensionNumbers(1, (3, 4))
    if path.endswith("attention/proj/kernel"):
        return MuonDimensionNumbers((1, 2), 3)
    return MuonDimensionNumbers(1, 2) if path.endswith(("/kernel", "/down", "/up")) else None


def scale_by_muon_and_adam(optimizer: config.Optimizer) -> optax.GradientTransformation:
    """Make Muon for the blocks' matrices, and Adam for the rest.

    Muon's updates are scaled to the mean size of Adam's: 0.2 √max(in, out) (arXiv 2502.16982,
    eq. 4).

    Args:
        optimizer: Settings.

    Returns:
        The transformation from gradients to updates.
    """

    def label_leaves(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: "muon" if muon_axes(leaf_path(keys)) else "adam", params
        )

    def find_axes(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, _: muon_axes(leaf_path(keys)), params)

    def scale_update(keys: tuple, update: jax.Array) -> jax.Array:
        axis_groups = muon_axes(leaf_path(keys))
        assert axis_groups is not None
        sizes = (
            np.prod([update.shape[axis] for axis in np.atleast_1d(axis_group)])
            for axis_group in axis_groups
        )
        return 0.2 * np.sqrt(max(sizes)) * update

    scale_updates = optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(scale_update, updates)
    )
    orthogonalize = scale_by_muon(
        beta=optimizer.muon_beta, mu_dtype="float32", weight_dimension_numbers=find_axes
    )
    return optax.partition(
        {
            "muon": optax.chain(
                _store_momentum_as(optimizer.mu_dtype, orthogonalize), scale_updates
            ),
            "adam": scale_by_adam(optimizer),
        },
        label_leaves,
    )


def _store_momentum_as(
    dtype: str, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Store the momentum in another type, rounded stochastically."""

    def cast(state: MuonState, target_dtype: str) -> MuonState:
        return state._replace(mu=jax.tree.map(lambda m: m.astype(target_dtype), state.mu))

    def init(params: Any) -> Any:
        state: Any = inner.init(params)
        return cast(state, dtype)

    def update(gradients: Any, state: Any, params: Any = None, **_: Any) -> tuple[Any, Any]:
        new_state: Any
        updates, new_state = inner.update(gradients, cast(state, "float32"), params)
        key = jax.random.fold_in(jax.random.key(1), new_state.count)
        return updates, new_state._replace(mu=stochastic_round(key, new_state.mu, state.mu))

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
