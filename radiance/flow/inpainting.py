"""Sampling that starts from images: image-to-image, and inpainting with a mask."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

from radiance.flow.objective import Images, mix
from radiance.flow.solvers import Velocity


class StartImage(NamedTuple):
    """Images to start from, and masks: 1 where the image is generated, 0 where it is kept."""

    image: Images
    mask: Float32[Array, "b height width 1"]


def start_from_image(
    velocity: Velocity,
    noise: Images,
    times: Float32[np.ndarray, " times"],
    start_image: StartImage,
) -> tuple[Velocity, Images]:
    """Mix the images with the noise at the first time, and keep masked pixels on their line.

    Masked pixels follow the line from noise to image, whose velocity is constant: every solver ends
    at the image, and other pixels see them with their own noise level.

    Args:
        velocity: Velocity of the model.
        noise: Scaled noise.
        times: Times of the schedule.
        start_image: Images and masks.

    Returns:
        The velocity with masks, and the images at the first time.
    """

    def masked_velocity(*args):
        line_velocity = noise - start_image.image
        return start_image.mask * velocity(*args) + (1 - start_image.mask) * line_velocity

    return masked_velocity, mix(start_image.image, noise, jnp.full(len(noise), times[0]))
