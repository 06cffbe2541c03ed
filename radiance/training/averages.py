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
from radiance.training.optimizer import rounded


def average(ema: dict[str, Params], params: Params, step: Int32[Array, ""], key: PRNGKeyArray) -> dict[str, Params]:
    """The averages, by decay or as width=WIDTH, with float32 `params` after `step` (the first is 0)."""

    def update(name: str, old: Params, key: PRNGKeyArray) -> Params:
        share = new_share(name, step)
        new = jax.tree.map(lambda o, p: o.astype(jnp.float32) + share * (p - o.astype(jnp.float32)), old, params)
        return rounded(key, new, old)

    keys = jax.random.split(key, max(len(ema), 1))
    return {name: update(name, old, key) for (name, old), key in zip(ema.items(), keys)}


def new_share(name: str, step: Int32[Array, ""]) -> Float32[Array, ""]:
    """What part of an average the newest weights are. A decay is ramped up as (1 + step) / (10 + step), so that a short run's average does
    not remember its first weights; of a width it is 1 − (1 − 1/t)^(γ + 1) after t steps (arXiv 2312.02696, eq. 127)."""
    kind, _, width = name.partition("=")
    if kind == "width":
        # Late in a run 1 − 1/t has few digits left in float32: its logarithm has all.
        return -jnp.expm1((power_of(float(width)) + 1) * jnp.log1p(-1 / (step + 1).astype(jnp.float32)))
    return 1 - jnp.minimum(float(kind), (1 + step) / (10 + step)).astype(jnp.float32)


def power_of(width: float) -> float:
    """γ of a relative width σ, for σ² = (γ + 1) / ((γ + 2)² (γ + 3)): with x = γ + 1 a root of x³ + 4x² + (5 − σ⁻²)x + 2, of which the largest
    is meant. σ lies between 0 (the newest weights) and 1 / √12 (γ = 0, their plain mean)."""
    return float(np.roots([1, 4, 5 - width**-2, 2]).real.max()) - 1


def combination(averages: Sequence[tuple[int, float]], wanted: tuple[int, float]) -> tuple[np.ndarray, float]:
    """Factors, with the sum 1, of `averages` (step and width) that come nearest to the `wanted` one; and how far its weighting of the steps
    is missed, as a share of its norm.

    Least squares over the run as in arXiv 2312.02696, appendix C.3. Only the sum is held here: without it an average that is missed
    would be too short as well.
    """
    profiles = np.array([(step, power_of(width)) for step, width in averages])
    target = np.array([[wanted[0], power_of(wanted[1])]])
    gram, seen, whole = _products(profiles, profiles), _products(profiles, target)[:, 0], _products(target, target)[0, 0]
    lengths = np.sqrt(np.diag(gram))
    system = np.block([[gram / np.outer(lengths, lengths), 1 / lengths[:, None]], [1 / lengths[None], np.zeros((1, 1))]])
    factors = np.linalg.lstsq(system, np.append(seen / lengths, 1), rcond=1e-13)[0][:-1] / lengths
    missed = whole - 2 * factors @ seen + factors @ gram @ factors
    return factors, float(np.sqrt(max(missed, 0) / whole))


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Inner products over the run of profiles (t, γ), whose weight is (γ + 1) τ^γ / t^(γ + 1) up to t."""
    (t, p), (u, q) = a.T[:, :, None], b.T[:, None]
    both = np.minimum(t, u)
    return (p + 1) * (q + 1) / (p + q + 1) * (both / t) ** p * (both / u) ** q * both / (t * u)
