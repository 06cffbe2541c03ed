"""The images of each step's batch. Worker processes run this module, so it uses no device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8

from radiance import config
from radiance.base.images import resize_and_crop
from radiance.base.random import RandomStream, make_rng
from radiance.data.captions import has_direction_words, sample_caption
from radiance.data.sampler import NO_IMAGE, BatchSampler
from radiance.data.source import Source
from radiance.data.unusable import UnusableError


class Augmentation(NamedTuple):
    """Crop and flip of an image at one step."""

    crop_x: float = 0.5  # position of the crop, from 0 (left) to 1 (right)
    crop_y: float = 0.5  # from 0 (top) to 1 (bottom)
    is_flipped: bool = False


class ImageBatch(NamedTuple):
    """Images of one size.

    Attributes:
        image: Pixels; gray in rows without an image.
        weight: Weight of each image's loss; 0 in rows without an image.
        broken: Reasons why images cannot be decoded, by image index.
    """

    image: UInt8[np.ndarray, "b height width 3"]
    weight: Float32[np.ndarray, " b"]
    broken: Mapping[int, str]


class ImageLoader:
    """Images of some rows of each step's batch: `loader[step]` is an `ImageBatch` as a dict.

    Args:
        source: Source of the images.
        sampler: Sampler of the global batches.
        data: Settings of the augmentation.
        seed: Seed of the run.
        rows: Rows of the global batch to load.
    """

    def __init__(
        self,
        source: Source,
        sampler: BatchSampler,
        data: config.Data,
        seed: int,
        rows: Sequence[int],
    ):
        self.source, self.sampler, self.rows = source, sampler, rows
        self.data, self.seed = data, seed

    def __getitem__(self, step: int) -> dict[str, Any]:
        spec = self.sampler[step]
        image_indices = spec.image_indices[list(self.rows)]
        augmentations = [
            self._sample_augmentation(step * self.data.batch_size + row, int(index))
            for row, index in zip(self.rows, image_indices)
        ]
        return load_images(
            self.source, image_indices, (spec.width, spec.height), augmentations
        )._asdict()

    def _sample_augmentation(self, position: int, index: int) -> Augmentation:
        """Sample the crop and flip of an image at one position of the run."""
        if index == NO_IMAGE:
            return Augmentation()
        crop_x, crop_y, u_flip = make_rng(self.seed, RandomStream.AUGMENTATION, position).random(3)
        if self.data.crop == "center":
            crop_x = crop_y = 0.5
        is_flipped = u_flip < self.data.flip_probability and not has_direction_words(
            sample_caption(self.source, index, self.data, self.seed, position) or ""
        )
        return Augmentation(crop_x, crop_y, is_flipped)


def load_images(
    source: Source,
    indices: Sequence[int] | Int64[np.ndarray, " b"],
    size: tuple[int, int],
    augmentations: Sequence[Augmentation],
) -> ImageBatch:
    """Decode images, resize them to cover a size and crop them to it.

    Args:
        source: Source of the images.
        indices: Index of each image, or NO_IMAGE.
        size: Width and height in pixels.
        augmentations: Crop and flip of each image.

    Returns:
        The images. Those that cannot be decoded have weight 0.
    """
    image = np.full((len(indices), size[1], size[0], 3), 128, np.uint8)
    weight, broken = np.zeros(len(indices), np.float32), {}
    for row, (index, augmentation) in enumerate(zip(indices, augmentations)):
        if index == NO_IMAGE:
            continue
        try:
            pixels = resize_and_crop(
                source.load_image(int(index), size), *size, augmentation.crop_x, augmentation.crop_y
            )
        except UnusableError as error:
            broken[int(index)] = str(error)
        else:
            image[row] = pixels[:, ::-1] if augmentation.is_flipped else pixels
            weight[row] = source.loss_weights[index]
    return ImageBatch(image, weight, broken)
