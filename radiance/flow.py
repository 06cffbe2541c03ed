"""The method: rectified flow between a picture (time 0) and noise (time 1). Pure functions on arrays; all float32.

x_t = (1 − t)·picture + t·s·noise with noise scale s (1 for Chroma), velocity = s·noise − picture.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import optax
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, Float32, Int, PRNGKeyArray

from radiance.config import Flow

# --- time laws --------------------------------------------------------------------------------------------------------

PEAK, CURVE = 2.0, 7.7  # Chroma draws t with weight 2 − 7.7·(t − ½)²
AREA = PEAK - CURVE / 12


def resolution_shift(tokens: int) -> float:
    """FLUX's μ, linear in the number of image tokens: 0.5 at 256, 1.15 at 4096."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def shift_time(t: Float32[Array, "*b"], mu: float, sigma: float = 1.0) -> Float32[Array, "*b"]:
    """e^μ / (e^μ + (1/t − 1)^σ): moves times towards noise for μ > 0, and keeps 0 and 1."""
    return 1 / (1 + math.exp(-mu) * (1 / t - 1) ** sigma)


def time_density(flow: Flow, t: Float32[Array, "*b"], tokens: int) -> Float32[Array, "*b"]:
    """Probability density of `flow.time_law` on (0, 1) for pictures of that many tokens."""
    if flow.time_law == "uniform":
        return jnp.ones_like(t)
    if flow.time_law == "parabola":
        return (PEAK - CURVE * (t - 0.5) ** 2) / AREA
    z = (jnp.log(t / (1 - t)) - _mean(flow, tokens)) / flow.time_scale
    pdf = jax.scipy.stats.logistic.pdf(z) if flow.time_law == "logistic" else jax.scipy.stats.norm.pdf(z)
    return pdf / (flow.time_scale * t * (1 - t))


def time_quantile(flow: Flow, u: Float32[Array, "*b"], tokens: int) -> Float32[Array, "*b"]:
    """The inverse of the law's distribution function: uniform numbers in, times out."""
    if flow.time_law == "uniform":
        return u
    if flow.time_law == "noise":
        return jnp.ones_like(u)
    if flow.time_law == "parabola":
        # The distribution function is a cubic in t − ½ with three real roots; this is the middle one.
        p, q = 3 * PEAK / CURVE, 3 * AREA * (u - 0.5) / CURVE
        amplitude = 2 * math.sqrt(p / 3)
        t = 0.5 + amplitude * jnp.sin(jnp.arcsin(3 * q / (p * amplitude)) / 3)
        return jnp.clip(t, 0, 1)  # rounding may step over the ends
    if flow.time_law == "logistic":
        return shift_time(u, _mean(flow, tokens), flow.time_scale)
    return jax.nn.sigmoid(_mean(flow, tokens) + flow.time_scale * ndtri(u))


def draw_times(key: PRNGKeyArray, flow: Flow, count: int, tokens: int) -> Float32[Array, " count"]:
    return time_quantile(flow, jax.random.uniform(key, (count,)), tokens)


def time_weights(flow: Flow, t: Float32[Array, "*b"], tokens: int) -> Float32[Array, "*b"]:
    """Density of `flow.time_weight` over that of the law that times are drawn from: losses so weighted are expected to be the other law's."""
    if flow.time_weight == "none":
        return jnp.ones_like(t)
    return time_density(replace(flow, time_law=flow.time_weight), t, tokens) / time_density(flow, t, tokens)


def _mean(flow: Flow, tokens: int) -> float:
    if flow.time_mean is not None:
        return flow.time_mean
    return resolution_shift(tokens) if flow.time_law == "logistic" else 0.0


# --- interpolation and loss -------------------------------------------------------------------------------------------


def mix(
    image: Float32[Array, "b height width c"], noise: Float32[Array, "b height width c"], time: Float32[Array, " b"]
) -> Float32[Array, "b height width c"]:
    """The point at `time` on the line from the picture to the (already scaled) noise."""
    t = time[:, None, None, None]
    return (1 - t) * image + t * noise


def bounded(flow: Flow, time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """What x_t − x̂ is divided by in training: t + ε (Radiance) or max(t, ε) (JiT, arXiv 2511.13720). Sampling divides by t."""
    return time + flow.epsilon if flow.bound == "add" else jnp.maximum(time, flow.epsilon)


def velocity_target(
    flow: Flow,
    prediction: str,
    image: Float32[Array, "b height width c"],
    noise: Float32[Array, "b height width c"],
    time: Float32[Array, " b"],
) -> Float32[Array, "b height width c"]:
    """What the model's velocity is compared with. For x0 models target and prediction are divided alike, so that the loss is
    the error of x̂ with weight 1 / divisor²."""
    if prediction == "velocity":
        return noise - image
    return (mix(image, noise, time) - image) / bounded(flow, time)[:, None, None, None]


def loss_weights(flow: Flow, prediction: str, time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """What squared errors of the velocity are multiplied by. An error of a velocity is one of x̂ over t: weighted by t² / divisor² it is over
    the divisor of x0 models, which have it there already."""
    if prediction == "velocity" and flow.velocity_weight == "x0":
        return jnp.square(time / bounded(flow, time))
    return jnp.ones_like(time)


def squared_error(velocity: Float32[Array, "b height width c"], target: Float32[Array, "b height width c"]) -> Float32[Array, " b"]:
    """Mean over the values of each picture."""
    return jnp.square(velocity.astype(jnp.float32) - target).mean(axis=(1, 2, 3))


def weighted_mean(losses: Float32[Array, " b"], weights: Float32[Array, " b"]) -> Float32[Array, ""]:
    """Σ wᵢ·lossᵢ / b: a picture of weight 2 pulls like two pictures, whatever else is in its batch."""
    return (weights * losses).mean()


# --- coupling ---------------------------------------------------------------------------------------------------------


def coupling_costs(
    image: Float32[Array, "b height width c"], noise: Float32[Array, "b height width c"], cost: str
) -> Float32[Array, "b b"]:
    """Cost of every (picture, noise) pair: minus the cosine, or the squared Euclidean distance."""
    x, y = image.reshape(len(image), -1), noise.reshape(len(noise), -1)
    if cost == "cosine":
        x, y = (z / jnp.maximum(jnp.linalg.norm(z, axis=1, keepdims=True), 1e-12) for z in (x, y))
        return -jnp.matmul(x, y.T, precision="highest")
    squares = jnp.square(x).sum(axis=1)[:, None] + jnp.square(y).sum(axis=1)
    return squares - 2 * jnp.matmul(x, y.T, precision="highest")


def caption_distances(text: Float[Array, "b l e"], lengths: Int[Array, " b"]) -> Float32[Array, "b b"]:
    """Squared distance between the directions of captions' mean embeddings, from 0 for captions that are the same to 4."""
    there = jnp.arange(text.shape[1]) < lengths[:, None]
    sums = jnp.where(there[..., None], text.astype(jnp.float32), 0).sum(axis=1)
    means = sums / jnp.maximum(jnp.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    return jnp.square(means[:, None] - means).sum(axis=-1)  # not by products, whose rounding tells equal captions apart


def forbidding(costs: Float32[Array, "b b"], forbidden: Bool[Array, "b b"]) -> Float32[Array, "b b"]:
    """Costs so that no assignment has a forbidden pair unless every one has."""
    most = len(costs) * (costs.max() - costs.min())  # that all allowed pairs together can save
    return costs + jnp.where(forbidden, most + 1e-3, 0)


def transport(costs: Float32[Array, "b b"]) -> Int[Array, " b"]:
    """Which noise each picture gets so that the sum of costs is least (minibatch optimal transport, arXiv 2302.00482).

    Exact (Hungarian algorithm), and over the whole batch it is given: under a mesh that is the global batch, alike on every host.
    """
    rows, columns = optax.assignment.hungarian_algorithm(costs)
    return jnp.zeros_like(columns).at[rows].set(columns)


def coupled(
    flow: Flow,
    image: Float32[Array, "b height width c"],
    noise: Float32[Array, "b height width c"],
    text: Float[Array, "b l e"],
    lengths: Int[Array, " b"],
) -> Int[Array, " b"]:
    """Which noise each picture gets by `flow.coupling`. Noise has the caption of the picture that it was drawn with.

    Raises ValueError when the batch does not divide into groups of `flow.coupling_group`.
    """

    def within(image, noise, text, lengths):
        costs = coupling_costs(image, noise, flow.coupling_cost)
        if flow.coupling == "within_caption":
            costs = forbidding(costs, caption_distances(text, lengths) > 0)
        elif flow.coupling_captions:
            costs = costs + flow.coupling_captions * caption_distances(text, lengths)
        return transport(costs)

    count, size = len(image), flow.coupling_group
    if flow.coupling == "independent":
        return jnp.arange(count)
    if not size:
        return within(image, noise, text, lengths)
    if count % size:
        raise ValueError(f"A batch of {count} does not divide into groups of {size} (flow.coupling_group).")
    grouped = (x.reshape(-1, size, *x.shape[1:]) for x in (image, noise, text, lengths))
    return (jax.vmap(within)(*grouped) + size * jnp.arange(count // size)[:, None]).reshape(-1)
