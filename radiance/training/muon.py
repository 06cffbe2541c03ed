"""The Muon optimizer for the matrices of the blocks."""

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
    """Which axes of a stacked leaf are a matrix's inputs and outputs, if it is one of the blocks' matrices. The others, the block among them,
    count matrices, each orthogonalised by itself: so are queries, keys and values, which share a leaf.
    """
    if not is_in_blocks(path):
        return None
    if path.endswith("attention/qkv/kernel"):
        return MuonDimensionNumbers(1, (3, 4))
    if path.endswith("attention/proj/kernel"):
        return MuonDimensionNumbers((1, 2), 3)
    return MuonDimensionNumbers(1, 2) if path.endswith(("/kernel", "/down", "/up")) else None


def scale_by_muon_and_adam(optimizer: config.Optimizer) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) for the blocks' matrices, scaled to the mean size of Adam's steps: 0.2 √max(in, out) (arXiv 2502.16982, eq. 4);
    Adam for the rest.
    """

    def labels(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda keys, _: "muon" if muon_axes(leaf_path(keys)) else "adam", params
        )

    def axes(params: Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda keys, _: muon_axes(leaf_path(keys)), params)

    def scale_update(keys: tuple, update: jax.Array) -> jax.Array:
        dimension_numbers = muon_axes(leaf_path(keys))
        sizes = (
            np.prod([update.shape[axis] for axis in np.atleast_1d(axis_group)])
            for axis_group in dimension_numbers
        )
        return 0.2 * np.sqrt(max(sizes)) * update

    scale_updates = optax.stateless(
        lambda updates, _: jax.tree_util.tree_map_with_path(scale_update, updates)
    )
    orthogonalize = scale_by_muon(
        beta=optimizer.muon_beta, mu_dtype="float32", weight_dimension_numbers=axes
    )
    return optax.partition(
        {
            "muon": optax.chain(
                _with_momentum_dtype(optimizer.mu_dtype, orthogonalize), scale_updates
            ),
            "adam": scale_by_adam(optimizer),
        },
        labels,
    )


def _with_momentum_dtype(
    dtype: str, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    """The same with a momentum that is kept in another type, rounded at random as Adam's."""

    def cast(state: MuonState, target_dtype: str) -> MuonState:
        return state._replace(mu=jax.tree.map(lambda m: m.astype(target_dtype), state.mu))

    def update(
        gradients: Params, state: MuonState, params: Params | None = None
    ) -> tuple[Params, MuonState]:
        updates, new_state = inner.update(gradients, cast(state, "float32"), params)
        key = jax.random.fold_in(jax.random.key(1), new_state.count)
        return updates, new_state._replace(mu=stochastic_round(key, new_state.mu, state.mu))

    return optax.GradientTransformation(lambda params: cast(inner.init(params), dtype), update)
