"""Sampling that starts from images: image-to-image, and inpainting with a mask."""

import hashlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, UInt8

from radiance.base.images import to_signed
from radiance.base.settings import require
from radiance.flow.objective import Images, mix
from radiance.flow.solvers import Velocity


class InitImageBatch(NamedTuple):
    """A batch of images to start from, and masks: 1 where pixels are generated, 0 where kept."""

    image: Float32[Array | np.ndarray, "b height width c"]
    mask: Float32[Array | np.ndarray, "b height width 1"]


@dataclass(frozen=True, eq=False)
class InitImage:
    """One image that sampling starts from, in 8 bits.

    Attributes:
        image: The pixels.
        mask: 1 where pixels are sampled anew, 0 where they remain unchanged, and between where the
            two are blended. None: all pixels are sampled anew.
        strength: The time in (0, 1] that sampling starts at. Near 0 little changes; at 1 the
            sampled pixels do not depend on the image.

    Raises:
        ConfigError: For a mask of another size, or an impossible strength.
    """

    image: UInt8[np.ndarray, "height width 3"]
    mask: Float32[np.ndarray, "mask_height mask_width"] | None = None
    strength: float = 1.0

    def __post_init__(self):
        require(
            0 < self.strength <= 1,
            f"strength={self.strength} must be more than 0 and at most 1: it is the time that "
            "sampling starts at.",
        )
        if self.mask is not None:
            mask_size, image_size = (
                "×".join(map(str, x.shape[1::-1])) for x in (self.mask, self.image)
            )
            require(
                mask_size == image_size,
                f"The mask has {mask_size} pixels, and the image {image_size}: give them the same "
                "size.",
            )

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        height, width = self.image.shape[:2]
        return width, height

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of a PNG file: the strength, and hashes of the pixels of image and mask."""
        arrays = {"image": self.image, "mask": self.mask}
        hashes = {
            name: hashlib.blake2b(x.tobytes(), digest_size=8).hexdigest()
            for name, x in arrays.items()
            if x is not None
        }
        return {"start": {"strength": self.strength, **hashes}}

    def to_batch(self, height: int, width: int, batch_size: int) -> InitImageBatch:
        """Repeat the image and its mask for a batch of samples.

        Args:
            height: Height of the samples; the last row is repeated to reach it.
            width: Width of the samples; the last column is repeated to reach it.
            batch_size: Number of samples.
        """
        mask = np.ones(self.image.shape[:2], np.float32) if self.mask is None else self.mask
        image_width, image_height = self.size
        padding = [(0, height - image_height), (0, width - image_width), (0, 0)]

        def make_batch(x: np.ndarray) -> np.ndarray:
            return np.repeat(np.pad(x, padding, "edge")[None], batch_size, axis=0)

        return InitImageBatch(make_batch(to_signed(self.image)), make_batch(mask[..., None]))


def start_from_image(
    velocity: Velocity,
    noise: Images,
    times: Float32[np.ndarray, " times"],
    init_images: InitImageBatch,
) -> tuple[Velocity, Images]:
    """Mix the images with the noise at the first time, and keep the pixels whose mask is 0.

    These pixels follow the line from noise to image, whose velocity is constant: every solver ends
    at the image, and the other pixels see them at their own noise level.

    Args:
        velocity: Velocity of the model.
        noise: Scaled noise.
        times: Times of the schedule.
        init_images: Images and masks.

    Returns:
        The velocity with masks, and the images at the first time.
    """
    image, mask = map(jnp.asarray, init_images)

    def masked_velocity(*args):
        line_velocity = noise - image
        return mask * velocity(*args) + (1 - mask) * line_velocity

    return masked_velocity, mix(image, noise, jnp.full(len(noise), times[0]))
