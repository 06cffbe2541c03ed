"""Averages of the weights: exponential ones, and those of Karras et al. (arXiv 2312.02696), from which others are made after the run.

The latter weigh the weights after step k by k to the power γ: at step t they look back over a share of the run that does not depend on t,
their relative width. Snapshots of two widths, taken through the run, span the averages of all others (§3.2 and appendix C there).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, PRNGKeyArray

from radiance.model.transformer import Params
from radiance.training.stochastic_rounding import stochastic_round


def update_averages(
    ema: dict[str, Params], params: Params, step: Int32[Array, ""], key: PRNGKeyArray
) -> dict[str, Params]:
    """The averages, by decay or as width=WIDTH, with float32 `params` after `step` (the first is 0)."""

    def update_average(name: str, old_average: Params, key: PRNGKeyArray) -> Params:
        fraction = update_fraction(name, step)
        new_average = jax.tree.map(
            lambda old_leaf, param_leaf: (
                old_leaf.astype(jnp.float32)
                + fraction * (param_leaf - old_leaf.astype(jnp.float32))
            ),
            old_average,
            params,
        )
        return stochastic_round(key, new_average, old_average)

    keys = jax.random.split(key, max(len(ema), 1))
    return {
        name: update_average(name, old_average, key)
        for (name, old_average), key in zip(ema.items(), keys)
    }


def update_fraction(name: str, step: Int32[Array, ""]) -> Float32[Array, ""]:
    """What part of an average the newest weights are. A decay is ramped up as (1 + step) / (10 + step), so that a short run's average does
    not remember its first weights; of a width it is 1 − (1 − 1/t)^(γ + 1) after t steps (arXiv 2312.02696, eq. 127).
    """
    kind, _, width = name.partition("=")
    if kind == "width":
        # Late in a run 1 − 1/t has few digits left in float32: its logarithm has all.
        return -jnp.expm1(
            (width_to_exponent(float(width)) + 1) * jnp.log1p(-1 / (step + 1).astype(jnp.float32))
        )
    return 1 - jnp.minimum(float(kind), (1 + step) / (10 + step)).astype(jnp.float32)


def width_to_exponent(width: float) -> float:
    """γ of a relative width σ, for σ² = (γ + 1) / ((γ + 2)² (γ + 3)): with x = γ + 1 a root of x³ + 4x² + (5 − σ⁻²)x + 2, of which the largest
    is meant. σ lies between 0 (the newest weights) and 1 / √12 (γ = 0, their plain mean).
    """
    return float(np.roots([1, 4, 5 - width**-2, 2]).real.max()) - 1


def solve_posthoc_coefficients(
    snapshots: Sequence[tuple[int, float]], target_average: tuple[int, float]
) -> tuple[np.ndarray, float]:
    """Factors, with the sum 1, of `averages` (step and width) that come nearest to the `wanted` one; and how far its weighting of the steps
    is missed, as a share of its norm.

    Least squares over the run as in arXiv 2312.02696, appendix C.3. Only the sum is held here: without it an average that is missed
    would be too short as well.
    """
    profiles = np.array([(step, width_to_exponent(width)) for step, width in snapshots])
    target_profile = np.array([[target_average[0], width_to_exponent(target_average[1])]])
    gram, cross_products, target_square = (
        _inner_products(profiles, profiles),
        _inner_products(profiles, target_profile)[:, 0],
        _inner_products(target_profile, target_profile)[0, 0],
    )
    norms = np.sqrt(np.diag(gram))
    system = np.block(
        [[gram / np.outer(norms, norms), 1 / norms[:, None]], [1 / norms[None], np.zeros((1, 1))]]
    )
    coefficients = (
        np.linalg.lstsq(system, np.append(cross_products / norms, 1), rcond=1e-13)[0][:-1] / norms
    )
    squared_error = (
        target_square - 2 * coefficients @ cross_products + coefficients @ gram @ coefficients
    )
    return coefficients, float(np.sqrt(max(squared_error, 0) / target_square))


def _inner_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products over the run of profiles (t, γ), whose weight is (γ + 1) τ^γ / t^(γ + 1) up to t."""
    (t, p), (u, q) = a.T[:, :, None], b.T[:, None]
    shared_steps = np.minimum(t, u)
    return (
        (p + 1)
        * (q + 1)
        / (p + q + 1)
        * (shared_steps / t) ** p
        * (shared_steps / u) ** q
        * shared_steps
        / (t * u)
    )
