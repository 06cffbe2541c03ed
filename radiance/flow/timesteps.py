"""Timestep distributions: densities, quantiles, sampling, and the shift by resolution."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtri
from jaxtyping import Array, Float32, PRNGKeyArray

from radiance.config import Flow

# --- time laws --------------------------------------------------------------------------------------------------------

PARABOLA_PEAK, PARABOLA_CURVATURE = 2.0, 7.7  # Chroma draws t with weight 2 − 7.7·(t − ½)²


PARABOLA_AREA = PARABOLA_PEAK - PARABOLA_CURVATURE / 12


def resolution_shift(num_tokens: int) -> float:
    """FLUX's μ, linear in the number of image tokens: 0.5 at 256, 1.15 at 4096."""
    return 0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256)


def shift_times(t: Float32[Array, "*b"], mu: float, sigma: float = 1.0) -> Float32[Array, "*b"]:
    """e^μ / (e^μ + (1/t − 1)^σ): moves times towards noise for μ > 0, and keeps 0 and 1."""
    return 1 / (1 + math.exp(-mu) * (1 / t - 1) ** sigma)


def timestep_density(flow: Flow, t: Float32[Array, "*b"], num_tokens: int) -> Float32[Array, "*b"]:
    """Probability density of `flow.timestep_distribution` on (0, 1) for images of that many tokens."""
    if flow.timestep_distribution == "uniform":
        return jnp.ones_like(t)
    if flow.timestep_distribution == "parabola":
        return (PARABOLA_PEAK - PARABOLA_CURVATURE * (t - 0.5) ** 2) / PARABOLA_AREA
    z = (jnp.log(t / (1 - t)) - _logit_mean(flow, num_tokens)) / flow.logit_std
    density = (
        jax.scipy.stats.logistic.pdf(z)
        if flow.timestep_distribution == "logistic"
        else jax.scipy.stats.norm.pdf(z)
    )
    return density / (flow.logit_std * t * (1 - t))


def timestep_quantile(flow: Flow, u: Float32[Array, "*b"], num_tokens: int) -> Float32[Array, "*b"]:
    """The inverse of the law's distribution function: uniform numbers in, times out."""
    if flow.timestep_distribution == "uniform":
        return u
    if flow.timestep_distribution == "pure_noise":
        return jnp.ones_like(u)
    if flow.timestep_distribution == "parabola":
        # The distribution function is a cubic in t − ½ with three real roots; this is the middle one.
        p, q = (
            3 * PARABOLA_PEAK / PARABOLA_CURVATURE,
            3 * PARABOLA_AREA * (u - 0.5) / PARABOLA_CURVATURE,
        )
        amplitude = 2 * math.sqrt(p / 3)
        t = 0.5 + amplitude * jnp.sin(jnp.arcsin(3 * q / (p * amplitude)) / 3)
        return jnp.clip(t, 0, 1)  # rounding may step over the ends
    if flow.timestep_distribution == "logistic":
        return shift_times(u, _logit_mean(flow, num_tokens), flow.logit_std)
    return jax.nn.sigmoid(_logit_mean(flow, num_tokens) + flow.logit_std * ndtri(u))


def sample_timesteps(
    key: PRNGKeyArray, flow: Flow, num_samples: int, num_tokens: int
) -> Float32[Array, " count"]:
    return timestep_quantile(flow, jax.random.uniform(key, (num_samples,)), num_tokens)


def timestep_weights(flow: Flow, t: Float32[Array, "*b"], num_tokens: int) -> Float32[Array, "*b"]:
    """Density of `flow.timestep_weighting` over that of the law that times are drawn from: losses so weighted are expected to be the other law's."""
    if flow.timestep_weighting == "none":
        return jnp.ones_like(t)
    return timestep_density(
        replace(flow, timestep_distribution=flow.timestep_weighting), t, num_tokens
    ) / timestep_density(flow, t, num_tokens)


def _logit_mean(flow: Flow, num_tokens: int) -> float:
    if flow.logit_mean is not None:
        return flow.logit_mean
    return resolution_shift(num_tokens) if flow.timestep_distribution == "logistic" else 0.0
