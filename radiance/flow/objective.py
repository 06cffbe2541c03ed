"""The method: rectified flow between an image (time 0) and noise (time 1). Pure functions on arrays; all float32.

x_t = (1 − t)·image + t·s·noise with noise scale s (1 for Chroma), velocity = s·noise − image.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float32

from radiance.config import Flow

# --- interpolation and loss -------------------------------------------------------------------------------------------


def mix(
    image: Float32[Array, "b height width c"],
    noise: Float32[Array, "b height width c"],
    time: Float32[Array, " b"],
) -> Float32[Array, "b height width c"]:
    """The point at `time` on the line from the image to the (already scaled) noise."""
    t = time[:, None, None, None]
    return (1 - t) * image + t * noise


def velocity_divisor(flow: Flow, time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """What x_t − x̂ is divided by in training: t + ε (Radiance) or max(t, ε) (JiT, arXiv 2511.13720). Sampling divides by t."""
    return (
        time + flow.min_divisor
        if flow.min_divisor_mode == "add"
        else jnp.maximum(time, flow.min_divisor)
    )


def velocity_target(
    flow: Flow,
    prediction: str,
    image: Float32[Array, "b height width c"],
    noise: Float32[Array, "b height width c"],
    time: Float32[Array, " b"],
) -> Float32[Array, "b height width c"]:
    """What the model's velocity is compared with. For x0 models target and prediction are divided alike, so that the loss is
    the error of x̂ with weight 1 / divisor².
    """
    if prediction == "velocity":
        return noise - image
    return (mix(image, noise, time) - image) / velocity_divisor(flow, time)[:, None, None, None]


def loss_weights(flow: Flow, prediction: str, time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """What squared errors of the velocity are multiplied by. An error of a velocity is one of x̂ over t: weighted by t² / divisor² it is over
    the divisor of x0 models, which have it there already.
    """
    if prediction == "velocity" and flow.loss_weighting == "x0":
        return jnp.square(time / velocity_divisor(flow, time))
    return jnp.ones_like(time)


def mean_squared_errors(
    velocity: Float32[Array, "b height width c"], target: Float32[Array, "b height width c"]
) -> Float32[Array, " b"]:
    """Mean over the values of each image."""
    return jnp.square(velocity.astype(jnp.float32) - target).mean(axis=(1, 2, 3))


def weighted_mean(
    losses: Float32[Array, " b"], weights: Float32[Array, " b"]
) -> Float32[Array, ""]:
    """Σ wᵢ·lossᵢ / b: an image of weight 2 pulls like two images, whatever else is in its batch."""
    return (weights * losses).mean()
