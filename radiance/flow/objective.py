"""The training objective of rectified flow between images (time 0) and noise (time 1).

x_t = (1 − t)·image + t·s·noise with noise scale s (1 for Chroma); velocity = s·noise − image. Pure
functions on float32 arrays.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from radiance.config import Flow

Images = Float32[Any, "b height width c"]  # JAX or NumPy


def mix(image: Images, noise: Images, time: Float32[Array, " b"]) -> Images:
    """Interpolate between images and scaled noise: (1 − time)·image + time·noise."""
    t = time[:, None, None, None]
    return (1 - t) * image + t * noise


def velocity_divisor(flow: Flow, time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """Compute the divisor of x_t − x̂ in the training of x0 models.

    Args:
        flow: Settings; `min_divisor` is ε.
        time: Times in [0, 1].

    Returns:
        t + ε (Radiance, `min_divisor_mode` "add") or max(t, ε) (JiT, arXiv 2511.13720). Sampling
        divides by t.
    """
    if flow.min_divisor_mode == "add":
        return time + flow.min_divisor
    return jnp.maximum(time, flow.min_divisor)


def velocity_target(
    flow: Flow, prediction: str, image: Images, noise: Images, time: Float32[Array, " b"]
) -> Images:
    """Compute the target of the model's velocity.

    For x0 models target and prediction have the same divisor, so that the loss is the error of x̂
    with weight 1 / divisor².

    Args:
        flow: Settings.
        prediction: Output of the network's last layer, "velocity" or "x0".
        image: Images.
        noise: Scaled noise.
        time: Times in [0, 1].

    Returns:
        Velocities.
    """
    if prediction == "velocity":
        return noise - image
    return (mix(image, noise, time) - image) / velocity_divisor(flow, time)[:, None, None, None]


def loss_weights(flow: Flow, prediction: str, time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """Compute the weights of squared velocity errors.

    An error of the velocity is an error of x̂ over t. With the weight t² / divisor², for
    `flow.loss_weighting` "x0", it is one over the divisor of x0 models, whose targets have that
    divisor already.

    Args:
        flow: Settings.
        prediction: Output of the network's last layer, "velocity" or "x0".
        time: Times in [0, 1].

    Returns:
        Weights of the images' losses.
    """
    if prediction == "velocity" and flow.loss_weighting == "x0":
        return jnp.square(time / velocity_divisor(flow, time))
    return jnp.ones_like(time)


def mean_squared_errors(
    velocity: Float[Array, "b height width c"], target: Images
) -> Float32[Array, " b"]:
    """Compute the mean squared error of each image, in float32."""
    return jnp.square(velocity.astype(jnp.float32) - target).mean(axis=(1, 2, 3))


def weighted_mean(
    losses: Float32[Array, " b"], weights: Float32[Array, " b"]
) -> Float32[Array, ""]:
    """Compute Σ wᵢ·lossᵢ / b: an image of weight 2 counts as two images in any batch."""
    return (weights * losses).mean()
