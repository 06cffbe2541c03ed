"""Timestep distributions: densities, quantiles, sampling, and the shift by resolution."""

import math
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float, Float32, PRNGKeyArray

from radiance.config import Flow

# Chroma samples t with a density in proportion to 2 − 7.7·(t − ½)².
PARABOLA_PEAK, PARABOLA_CURVATURE = 2.0, 7.7
PARABOLA_AREA = PARABOLA_PEAK - PARABOLA_CURVATURE / 12

Times = Float[Any, "*b"]  # JAX or NumPy


def resolution_shift(num_tokens: int) -> float:
    """Return FLUX's shift μ, linear in the number of image tokens: 0.5 at 256, 1.15 at 4096."""
    return 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)


def shift_times(t: Times, mu: float, sigma: float = 1.0) -> Times:
    """Shift times towards noise, as FLUX does for higher resolutions (arXiv 2403.03206, 5.3.2).

    Computes e^μ / (e^μ + (1/t − 1)^σ).

    Args:
        t: Times in [0, 1]; 1 is noise.
        mu: Logarithm of the shift factor; positive values shift towards noise.
        sigma: Exponent of 1/t − 1.

    Returns:
        Shifted times; 0 and 1 do not change.
    """
    return 1 / (1 + math.exp(-mu) * (1 / t - 1) ** sigma)


def timestep_density(flow: Flow, t: Times, num_tokens: int) -> Times:
    """Compute the probability density of `flow.timestep_distribution`.

    Args:
        flow: Settings; the distribution must have a density, as all but "pure_noise" do.
        t: Times in (0, 1).
        num_tokens: Number of image tokens, for distributions that depend on the resolution.

    Returns:
        The density at `t`.
    """
    if flow.timestep_distribution == "uniform":
        return jnp.ones_like(t)
    if flow.timestep_distribution == "parabola":
        return (PARABOLA_PEAK - PARABOLA_CURVATURE * (t - 0.5) ** 2) / PARABOLA_AREA
    z = (jnp.log(t / (1 - t)) - _logit_mean(flow, num_tokens)) / flow.logit_std
    if flow.timestep_distribution == "logistic":
        density = jax.scipy.stats.logistic.pdf(z)
    else:
        density = jax.scipy.stats.norm.pdf(z)
    return density / (flow.logit_std * t * (1 - t))


def timestep_quantile(flow: Flow, u: Times, num_tokens: int) -> Times:
    """Compute quantiles of `flow.timestep_distribution`, which turn uniform numbers into times.

    Args:
        flow: Settings.
        u: Probabilities in [0, 1].
        num_tokens: Number of image tokens, for distributions that depend on the resolution.

    Returns:
        Times, at which the cumulative distribution function is `u`.
    """
    if flow.timestep_distribution == "uniform":
        return u
    if flow.timestep_distribution == "pure_noise":
        return jnp.ones_like(u)
    if flow.timestep_distribution == "parabola":
        # The cumulative distribution is a cubic in t − ½: take the middle one of its real roots.
        p = 3 * PARABOLA_PEAK / PARABOLA_CURVATURE
        q = 3 * PARABOLA_AREA * (u - 0.5) / PARABOLA_CURVATURE
        amplitude = 2 * math.sqrt(p / 3)
        t = 0.5 + amplitude * jnp.sin(jnp.arcsin(3 * q / (p * amplitude)) / 3)
        return jnp.clip(t, 0, 1)  # rounding may exceed the end points
    if flow.timestep_distribution == "logistic":
        return shift_times(u, _logit_mean(flow, num_tokens), flow.logit_std)
    return jax.nn.sigmoid(_logit_mean(flow, num_tokens) + flow.logit_std * ndtri(u))


def sample_timesteps(
    key: PRNGKeyArray, flow: Flow, num_samples: int, num_tokens: int
) -> Float32[Array, " {num_samples}"]:
    """Sample times from `flow.timestep_distribution`.

    Args:
        key: Random key.
        flow: Settings.
        num_samples: Number of times.
        num_tokens: Number of image tokens, for distributions that depend on the resolution.

    Returns:
        Independent times in [0, 1].
    """
    return timestep_quantile(flow, jax.random.uniform(key, (num_samples,)), num_tokens)


def timestep_weights(flow: Flow, t: Times, num_tokens: int) -> Times:
    """Compute importance weights for the losses at times from `flow.timestep_distribution`.

    Args:
        flow: Settings.
        t: Sampled times.
        num_tokens: Number of image tokens, for distributions that depend on the resolution.

    Returns:
        The density of `flow.timestep_weighting` over that of the distribution: the expected
        weighted loss is the expected loss under the former. 1 for the weighting "none".
    """
    if flow.timestep_weighting == "none":
        return jnp.ones_like(t)
    target = replace(flow, timestep_distribution=flow.timestep_weighting)
    return timestep_density(target, t, num_tokens) / timestep_density(flow, t, num_tokens)


def _logit_mean(flow: Flow, num_tokens: int) -> float:
    """Return the mean of logit(t): set, or by the resolution for "logistic", or 0."""
    if flow.logit_mean is not None:
        return flow.logit_mean
    return resolution_shift(num_tokens) if flow.timestep_distribution == "logistic" else 0.0
