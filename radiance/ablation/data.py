"""Data of a suite: images of a source in memory, sampled with replacement, and their captions.

All variants and seeds share the images. The images of a step and its dropped captions follow from
(seed, step) alone, so they are the same in every variant. Seeds see the images in different orders.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8

from radiance import config
from radiance.base.random import RandomStream, make_rng
from radiance.data.batches import Batch, share_longest
from radiance.data.captions import first_caption
from radiance.data.datasets import open_source
from radiance.data.images import Augmentation, load_images
from radiance.text.factory import make_encoder


class ImageSet(NamedTuple):
    """Images of one size with their captions.

    Attributes:
        image: The images.
        captions: Caption of each image.
        descriptions: What each caption says of the scene; None where the source does not know.
    """

    image: UInt8[np.ndarray, "n height width 3"]
    captions: tuple[str, ...]
    descriptions: tuple[Any, ...]


class TextSet(NamedTuple):
    """Encoded captions.

    Attributes:
        embeddings: Embeddings of the captions; the last are those of the empty prompt.
        lengths: Tokens of each text.
        identity: Identity of the encoder and its limit.
    """

    embeddings: Float[np.ndarray, "n+1 l e"]
    lengths: Int32[np.ndarray, " n+1"]
    identity: str


@lru_cache(maxsize=4)
def load_image_set(data: config.Data, split: str, num_images: int) -> ImageSet:
    """Return the first images of a split, cropped to squares from their centers.

    Args:
        data: Source and resolution of the images.
        split: train or validation.
        num_images: Number of images.
    """
    source = open_source(data, split)
    if len(source) < num_images:
        setting = "num_images of its scale" if split == "train" else "train.validation_images"
        raise config.ConfigError(
            f"The {split} split of {data.path or data.source} has {len(source)} images, and the "
            f"suite needs {num_images}: lower {setting}, or change data.validation_fraction."
        )
    size, indices = (data.resolution, data.resolution), range(num_images)
    batch = load_images(source, indices, size, [Augmentation()] * num_images)
    if batch.broken:
        index, reason = next(iter(batch.broken.items()))
        raise config.ConfigError(
            f"{source.name(index)!r} of {data.source} cannot be used ({reason}): remove it."
        )
    return ImageSet(
        batch.image,
        tuple(first_caption(source, i, data) for i in indices),
        tuple(source.attributes(i).get("described") for i in indices),
    )


@lru_cache(maxsize=4)
def encode_captions(captions: tuple[str, ...], text: config.Text, dim: int) -> TextSet:
    """Return the encoded captions and the empty prompt, padded to the encoder's limit.

    Args:
        captions: Texts, each within the limit.
        text: Encoder.
        dim: Size of the embeddings.

    Raises:
        TextError: A caption is over the limit.
    """
    encoder = make_encoder(text, dim)
    embeddings, lengths = encoder([*captions, ""])
    identity = f"{encoder.kind} {encoder.identity} {encoder.max_length}"
    return TextSet(embeddings, lengths, identity)


def exchange_captions(text_set: TextSet) -> TextSet:
    """Return encoded captions that belong to the next image; the last belong to the first."""
    last = len(text_set.lengths) - 1
    rows = np.r_[1:last, 0, last]
    return text_set._replace(embeddings=text_set.embeddings[rows], lengths=text_set.lengths[rows])


def sample_indices(
    seed: int, step: int, num_images: int, data: config.Data
) -> tuple[Int32[np.ndarray, " b"], Int32[np.ndarray, " b"]]:
    """Return the images of a step, and the rows of a `TextSet` that belong to them.

    Args:
        seed: Seed of the run.
        step: Number of the step, from 0.
        num_images: Number of images to sample from.
        data: Batch size and caption dropout.
    """
    image_indices = (
        make_rng(seed, RandomStream.IMAGE_ORDER, step).random(data.batch_size) * num_images
    ).astype(np.int32)
    is_dropped = (
        make_rng(seed, RandomStream.CAPTION, step).random(data.batch_size) < data.caption_dropout
    )
    return image_indices, np.where(is_dropped, np.int32(num_images), image_indices)


class PoolBatches:
    """Training batches of one seed, sampled with replacement from images in memory.

    Batches have no weights: all images count equally.

    Args:
        run: Config of the run.
        image_set: Images to sample from.
        text_set: Their encoded captions.
    """

    def __init__(self, run: config.Config, image_set: ImageSet, text_set: TextSet):
        self._run, self._image_set, self._text_set = run, image_set, text_set

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of a step."""
        run, images = self._run, self._image_set.image
        image_indices, text_indices = sample_indices(run.train.seed, step, len(images), run.data)
        return {
            "image": images[image_indices],
            "text": self._text_set.embeddings[text_indices],
            "lengths": share_longest(
                self._text_set.lengths[text_indices], run.data.mask_group_size
            ),
            "cut": np.int32(0),
            "skipped": np.int32(0),
        }

    def start(self, step: int) -> Iterator[Batch]:
        """Return an iterator over the batches from `step` on."""
        return (self[i] for i in range(step, self._run.train.steps))


def hash_data(image_sets: Sequence[ImageSet], text_sets: Sequence[TextSet]) -> str:
    """Return a hash that distinguishes this data from any other."""
    hasher = hashlib.blake2b(digest_size=16)
    for image_set in image_sets:
        hasher.update(
            repr(image_set.image.shape).encode()
            + image_set.image.tobytes()
            + "\n".join(image_set.captions).encode()
        )
    hasher.update("\n".join(text_set.identity for text_set in text_sets).encode())
    return hasher.hexdigest()
