"""Caption augmentation: choice of a caption, dropout, shuffled tags, lower case."""

import math
import re
from collections.abc import Sequence

import numpy as np

from radiance import config
from radiance.base.random import RandomStream, make_rng
from radiance.data.source import Source

# A word ends at anything but a letter, since tags are also written as looking_left.
DIRECTION_WORDS = re.compile(
    r"(?<![^\W\d_])(left|right)(most|wards?|hand(ed)?|side)?(?![^\W\d_])", re.IGNORECASE
)


def augment_caption(
    captions: Sequence[str], has_tags: bool, data: config.Data, rng: np.random.Generator
) -> str | None:
    """Sample one of an image's captions and augment it.

    Of n tags, ceil(n u) are kept, with u uniform in (1 − tag_dropout, 1]. Captions whose tags are
    neither shuffled nor dropped keep their spelling. Prefix and suffix are never augmented, and
    they are added without spaces or commas.

    Four random numbers are used, and one more for each tag if tags are shuffled or dropped.

    Args:
        captions: The captions of the image, at least one.
        has_tags: True if the captions are comma-separated lists of tags.
        data: Settings of the augmentation.
        rng: Random generator, of which only `Generator.random` is used.

    Returns:
        The caption, or None if it is dropped.
    """
    u_caption, u_dropout, u_lowercase, u_tags = rng.random(4)
    text = captions[int(u_caption * len(captions))]
    if u_dropout < data.caption_dropout:
        return None
    if has_tags and (data.shuffle_tags or data.tag_dropout):
        tags = [tag.strip() for tag in text.split(",") if tag.strip()]
        num_kept = math.ceil(len(tags) * (1 - data.tag_dropout * u_tags))
        kept_indices = np.argsort(rng.random(len(tags)), kind="stable")[:num_kept]
        if not data.shuffle_tags:
            kept_indices = np.sort(kept_indices)
        text = ", ".join(tags[i] for i in kept_indices)
    if u_lowercase < data.lowercase_probability:
        text = text.lower()
    return wrap_caption(text, data)


def wrap_caption(caption: str, data: config.Data) -> str:
    """Add the prefix and suffix of the settings to a caption."""
    return f"{data.caption_prefix}{caption}{data.caption_suffix}"


def first_caption(source: Source, index: int, data: config.Data) -> str:
    """Return an image's first caption with prefix and suffix, for validation and sampling."""
    return wrap_caption(source.captions(index)[0], data)


def sample_caption(
    source: Source, index: int, data: config.Data, seed: int, position: int
) -> str | None:
    """Return the augmented caption of an image at one position of the run.

    Args:
        source: Source of the image.
        index: Index of the image.
        data: Settings of the augmentation.
        seed: Seed of the run.
        position: Position in the run: step · batch size + row.

    Returns:
        The caption, or None if it is dropped.
    """
    return augment_caption(
        source.captions(index),
        source.has_tags(index),
        data,
        make_rng(seed, RandomStream.CAPTION, position),
    )


def has_direction_words(caption: str) -> bool:
    """Return True if a caption has the English words left or right.

    A flipped image would contradict such a caption. Phrases such as "all right" count too: it does
    no harm if their images are never flipped.
    """
    return DIRECTION_WORDS.search(caption) is not None
