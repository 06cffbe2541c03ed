"""Averages of the weights: exponential ones, and those of EDM2 (Karras et al., arXiv 2312.02696).

The latter weight the weights after step k by k to the power γ: at step t they average over a
fraction of the run that does not depend on t, their relative width. Snapshots of two widths, saved
through the run, span the averages of all other widths (section 3.2 and appendix C there).
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
    """Update the averages with the weights after a step.

    Args:
        ema: Averages by name: a decay, or width=WIDTH.
        params: Float32 weights.
        step: Index of the step; the first is 0.
        key: Random key for the rounding of bfloat16 averages.

    Returns:
        The new averages.
    """

    def update_average(name: str, old_average: Params, key: PRNGKeyArray) -> Params:
        fraction = compute_update_fraction(name, step)
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


def compute_update_fraction(name: str, step: Int32[Array, ""]) -> Float32[Array, ""]:
    """Compute the fraction of the newest weights in an average.

    A decay is at most (1 + step) / (10 + step), so that the average of a short run does not hold
    its first weights. For a width the fraction after t steps is 1 − (1 − 1/t)^(γ + 1) (arXiv
    2312.02696, eq. 127).

    Args:
        name: A decay, or width=WIDTH.
        step: Index of the step; the first is 0.

    Returns:
        The fraction.
    """
    kind, _, width = name.partition("=")
    if kind == "width":
        # Late in a run 1 − 1/t has few digits in float32; its logarithm has all of them.
        exponent = width_to_exponent(float(width)) + 1
        return -jnp.expm1(exponent * jnp.log1p(-1 / (step + 1).astype(jnp.float32)))
    return 1 - jnp.minimum(float(kind), (1 + step) / (10 + step)).astype(jnp.float32)


def width_to_exponent(width: float) -> float:
    """Convert a relative width σ to the exponent γ of σ² = (γ + 1) / ((γ + 2)² (γ + 3)).

    With x = γ + 1 it is the largest root of x³ + 4x² + (5 − σ⁻²)x + 2.

    Args:
        width: Relative width between 0 (the newest weights) and 1 / √12 (their plain mean, γ = 0).

    Returns:
        The exponent γ.
    """
    return float(np.roots([1, 4, 5 - width**-2, 2]).real.max()) - 1


def solve_posthoc_coefficients(
    snapshots: Sequence[tuple[int, float]], target_average: tuple[int, float]
) -> tuple[np.ndarray, float]:
    """Find the combination of saved averages that is nearest to another average.

    Least squares over the run, as in arXiv 2312.02696, appendix C.3, with the constraint that the
    coefficients add up to 1: without it an average that is not reached would also be too small.

    Args:
        snapshots: Step and width of each saved average.
        target_average: Step and width of the wanted average.

    Returns:
        Coefficients of the snapshots, and the error of the weighting of steps, relative to its
        norm.
    """
    profiles = np.array([(step, width_to_exponent(width)) for step, width in snapshots])
    target_profile = np.array([[target_average[0], width_to_exponent(target_average[1])]])
    gram = _inner_products(profiles, profiles)
    cross_products = _inner_products(profiles, target_profile)[:, 0]
    target_square = _inner_products(target_profile, target_profile)[0, 0]

    # Normal equations of normalized profiles, with a Lagrange multiplier for the sum
    norms = np.sqrt(np.diag(gram))
    system = np.block(
        [[gram / np.outer(norms, norms), 1 / norms[:, None]], [1 / norms[None], np.zeros((1, 1))]]
    )
    solution = np.linalg.lstsq(system, np.append(cross_products / norms, 1), rcond=1e-13)[0]
    coefficients = solution[:-1] / norms

    squared_error = (
        target_square - 2 * coefficients @ cross_products + coefficients @ gram @ coefficients
    )
    return coefficients, float(np.sqrt(max(squared_error, 0) / target_square))


def _inner_products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Compute inner products of profiles (t, γ), which are (γ + 1) τ^γ / t^(γ + 1) up to t."""
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
