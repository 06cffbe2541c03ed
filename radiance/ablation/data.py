"""What the arms of a suite are shown: images of `shapes`, rendered once and drawn from with replacement, and their captions.

All arms and all seeds share the images. Which of them a step shows, and which captions it leaves out, follows from (seed, step) alone, so it
is the same in every arm; two seeds see the same images in two orders.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, UInt8

from radiance import config
from radiance.base.random import RandomStream, make_rng
from radiance.shapes.captions import CaptionLengths, make_caption
from radiance.shapes.scenes import SceneDescription, Split, render_scene, sample_scene
from radiance.text.factory import make_encoder

SCENE_SEED = 0  # the seed of all scenes


class ImageSet(NamedTuple):
    image: UInt8[np.ndarray, "n side side 3"]
    captions: tuple[str, ...]
    facts: tuple[SceneDescription, ...]  # that the captions say


class TextSet(NamedTuple):
    embeddings: Float[np.ndarray, "n+1 l e"]  # the last is the empty prompt's
    lengths: Int32[np.ndarray, " n+1"]
    identity: str


@lru_cache(maxsize=4)
def render_image_set(
    split: Split, num_images: int, resolution: int, caption_lengths: CaptionLengths
) -> ImageSet:
    """The first so many of `shapes`."""
    scenes = [sample_scene(SCENE_SEED, i, split) for i in range(num_images)]
    captions_and_facts = [make_caption(scene_spec, caption_lengths) for scene_spec in scenes]
    image = np.stack([np.asarray(render_scene(scene_spec, resolution)) for scene_spec in scenes])
    return ImageSet(
        image,
        tuple(text for text, _ in captions_and_facts),
        tuple(facts for _, facts in captions_and_facts),
    )


@lru_cache(maxsize=4)
def encode_captions(captions: tuple[str, ...], text: config.Text, dim: int) -> TextSet:
    """The captions, and behind them the empty prompt, padded to the limit. Raises TextError for one over it."""
    encoder = make_encoder(text, dim)
    return TextSet(
        *encoder([*captions, ""]), f"{encoder.kind} {encoder.identity} {encoder.max_length}"
    )


def sample_indices(
    seed: int, step: int, num_images: int, data: config.Data
) -> tuple[Int32[np.ndarray, " b"], Int32[np.ndarray, " b"]]:
    """The images of a seed's step, and the rows of `Texts` beside them."""
    image_index = (
        make_rng(seed, RandomStream.IMAGE_ORDER, step).random(data.batch_size) * num_images
    ).astype(np.int32)
    is_dropped = (
        make_rng(seed, RandomStream.CAPTION, step).random(data.batch_size) < data.caption_dropout
    )
    return image_index, np.where(is_dropped, np.int32(num_images), image_index)


def hash_parts(image_sets: Sequence[ImageSet], text_sets: Sequence[TextSet]) -> str:
    """What tells this data from any other."""
    hasher = hashlib.blake2b(digest_size=16)
    for image_set in image_sets:
        hasher.update(
            repr(image_set.image.shape).encode()
            + image_set.image.tobytes()
            + "\n".join(image_set.captions).encode()
        )
    hasher.update("\n".join(text_set.identity for text_set in text_sets).encode())
    return hasher.hexdigest()
