"""What is said of an image at one step: one of its captions, and tags in a new order each time."""

import math
import re
from collections.abc import Sequence

import numpy as np

from radiance import config
from radiance.base.random import RandomStream, make_rng
from radiance.data.source import Source

# Letters alone end a word, for tags are also written like looking_left.
DIRECTION_WORDS = re.compile(
    r"(?<![^\W\d_])(left|right)(most|wards?|hand(ed)?|side)?(?![^\W\d_])", re.IGNORECASE
)


def augment_caption(
    captions: Sequence[str], has_tags: bool, data: config.Data, rng: np.random.Generator
) -> str | None:
    """One of the captions, of which there is at least one. None for one that is dropped: how "nothing" is said is the caller's affair.

    tags: whether they are lists of tags with commas between. Of n tags ceil(n u) are kept, u uniform in (1 - tag_drop, 1], and
    they are shuffled, or stay in their order; without either rule they stay as they are written. The prefix and the suffix
    stand as they are written too, around what is left: they are neither shuffled, dropped nor put in lower case, and bring their own
    spaces and commas.

    Four numbers are drawn, and then one for each tag; all with Generator.random, whose stream no version of NumPy has changed.
    """
    u_caption, u_dropout, u_lowercase, u_tags = rng.random(4)
    text = captions[int(u_caption * len(captions))]
    if u_dropout < data.caption_dropout:
        return None
    if has_tags and (data.shuffle_tags or data.tag_dropout):
        tag_names = [name.strip() for name in text.split(",") if name.strip()]
        tag_indices = np.argsort(rng.random(len(tag_names)), kind="stable")[
            : math.ceil(len(tag_names) * (1 - data.tag_dropout * u_tags))
        ]
        text = ", ".join(
            tag_names[i] for i in (tag_indices if data.shuffle_tags else np.sort(tag_indices))
        )
    if u_lowercase < data.lowercase_probability:
        text = text.lower()
    return wrap_caption(text, data)


def wrap_caption(caption: str, data: config.Data) -> str:
    """With what every caption of the run begins and ends with."""
    return f"{data.caption_prefix}{caption}{data.caption_suffix}"


def first_caption(source: Source, index: int, data: config.Data) -> str:
    """What an image is validated with and painted from: nothing is left to chance."""
    return wrap_caption(source.captions(index)[0], data)


def sample_caption(
    source: Source, index: int, data: config.Data, seed: int, position: int
) -> str | None:
    """The caption of the image that stands at a position of the run: step × batch + row."""
    return augment_caption(
        source.captions(index),
        source.has_tags(index),
        data,
        make_rng(seed, RandomStream.CAPTION, position),
    )


def has_direction_words(caption: str) -> bool:
    """Whether it says left or right in English, so that the mirrored image would make it wrong. "All right", "she has left" and
    "a right angle" count too: an image too many that is never mirrored costs nothing.
    """
    return DIRECTION_WORDS.search(caption) is not None
