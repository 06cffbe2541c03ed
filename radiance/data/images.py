"""The pixels of each step's batch. Worker processes run this, so it uses no device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from radiance import config
from radiance.base.images import resize_and_crop
from radiance.base.random import RandomStream, make_rng
from radiance.data.captions import has_direction_words, sample_caption
from radiance.data.decode import UnusableError
from radiance.data.sampler import NO_IMAGE, BatchSampler
from radiance.data.source import Source


class Augmentation(NamedTuple):
    """What is seen of an image at one step."""

    crop_x: float = 0.5  # where it is cut, from 0 to 1
    crop_y: float = 0.5
    is_flipped: bool = False


class ImageBatch(NamedTuple):
    """Images of one shape."""

    image: UInt8[np.ndarray, "b height width 3"]  # grey where there is none
    weight: Float32[np.ndarray, " b"]  # of the losses; 0 where there is no image
    broken: Mapping[int, str]  # why images cannot be used, by their numbers


class ImageLoader:
    """`pixels[step]` is what `rows` of that step's batch show."""

    def __init__(
        self,
        source: Source,
        sampler: BatchSampler,
        data: config.Data,
        seed: int,
        rows: Sequence[int],
    ):
        self.source, self.sampler, self.data, self.seed, self.rows = (
            source,
            sampler,
            data,
            seed,
            rows,
        )

    def __getitem__(self, step: int) -> dict[str, Any]:
        spec = self.sampler[step]
        indices = spec.indices[list(self.rows)]
        augmentations = [
            self._sample_augmentation(step * self.data.batch_size + row, int(index))
            for row, index in zip(self.rows, indices)
        ]
        return load_images(self.source, indices, (spec.width, spec.height), augmentations)._asdict()

    def _sample_augmentation(self, position: int, index: int) -> Augmentation:
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
    indices: Sequence[int],
    size: tuple[int, int],
    augmentations: Sequence[Augmentation],
) -> ImageBatch:
    """Images of a source at (width, height)."""
    image = np.full((len(indices), size[1], size[0], 3), 128, np.uint8)
    weight, broken = np.zeros(len(indices), np.float32), {}
    for row, (index, augmentation) in enumerate(zip(indices, augmentations)):
        if index == NO_IMAGE:
            continue
        try:
            pixels = resize_and_crop(
                source.load_image(index, size), *size, augmentation.crop_x, augmentation.crop_y
            )
        except UnusableError as reason:
            broken[int(index)] = str(reason)
        else:
            image[row] = pixels[:, ::-1] if augmentation.is_flipped else pixels
            weight[row] = source.loss_weights[index]
    return ImageBatch(image, weight, broken)
