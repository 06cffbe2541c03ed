"""Adam with moments of reduced precision."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Int32

from radiance import config
from radiance.model.transformer import Params
from radiance.training.stochastic_rounding import stochastic_round


class AdamState(NamedTuple):
    """State of Adam: the number of steps, and the means of gradients and of their squares."""

    count: Int32[Array, ""]  # pyright: ignore[reportIncompatibleMethodOverride] (name of optax)
    mu: Params
    nu: Params


def scale_by_adam(optimizer: config.Optimizer) -> optax.GradientTransformation:
    """Make Adam (arXiv 1412.6980) with moments of given types, rounded stochastically.

    Optax rounds to nearest. A second moment in bfloat16 would then stop changing: at β₂ = 0.95 a
    twentieth of a change is often less than half of its last digit.

    Args:
        optimizer: Settings: `beta1`, `beta2`, `eps`, `mu_dtype`, `nu_dtype`.

    Returns:
        The transformation from gradients to updates.
    """
    dtypes = jnp.dtype(optimizer.mu_dtype), jnp.dtype(optimizer.nu_dtype)
    betas = optimizer.beta1, optimizer.beta2

    def init(params: Params) -> AdamState:
        mu, nu = (
            jax.tree.map(lambda p, dtype=dtype: jnp.zeros(p.shape, dtype), params)
            for dtype in dtypes
        )
        return AdamState(jnp.zeros((), jnp.int32), mu, nu)

    def update(
        gradients: Params, state: AdamState, params: Params | None = None
    ) -> tuple[Params, AdamState]:
        count = state.count + 1
        # Means of gradients (power 1) and of squared gradients (power 2)
        moments = [
            jax.tree.map(
                lambda m, g, b=beta, p=power: b * m.astype(jnp.float32) + (1 - b) * g**p,
                old_moment,
                gradients,
            )
            for old_moment, beta, power in zip(state[1:], betas, (1, 2))
        ]
        # Bias correction
        mean, square = (
            jax.tree.map(lambda m, b=beta: m / (1 - b**count), moment)
            for moment, beta in zip(moments, betas)
        )
        updates = jax.tree.map(lambda m, s: m / (jnp.sqrt(s) + optimizer.eps), mean, square)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count))
        return updates, AdamState(count, *map(stochastic_round, keys, moments, state[1:]))

    return optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
