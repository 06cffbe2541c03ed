"""What is said of a picture at one step: one of its captions, and tags in a new order each time."""

import math
import re
from collections.abc import Sequence

import numpy as np

from radiance import config
from radiance.data.datasets import Source
from radiance.data.draws import Of, draws

# Letters alone end a word, for tags are also written like looking_left.
SIDES = re.compile(r"(?<![^\W\d_])(left|right)(most|wards?|hand(ed)?|side)?(?![^\W\d_])", re.IGNORECASE)


def caption_of(captions: Sequence[str], tags: bool, rules: config.Data, draw: np.random.Generator) -> str | None:
    """One of the captions, of which there is at least one. None for one that is dropped: how "nothing" is said is the caller's affair.

    tags: whether they are lists of tags with commas between. Of n tags ceil(n u) are kept, u uniform in (1 - tag_drop, 1], and
    they are shuffled, or stay in their order; without either rule they stay as they are written. The prefix and the suffix
    stand as they are written too, around what is left: they are neither shuffled, dropped nor put in lower case, and bring their own
    spaces and commas.

    Four numbers are drawn, and then one for each tag; all with Generator.random, whose stream no version of NumPy has changed.
    """
    chosen, dropped, lowered, share = draw.random(4)
    text = captions[int(chosen * len(captions))]
    if dropped < rules.caption_dropout:
        return None
    if tags and (rules.tag_shuffle or rules.tag_drop):
        names = [name.strip() for name in text.split(",") if name.strip()]
        kept = np.argsort(draw.random(len(names)), kind="stable")[: math.ceil(len(names) * (1 - rules.tag_drop * share))]
        text = ", ".join(names[i] for i in (kept if rules.tag_shuffle else np.sort(kept)))
    if lowered < rules.lower:
        text = text.lower()
    return framed(text, rules)


def framed(caption: str, rules: config.Data) -> str:
    """With what every caption of the run begins and ends with."""
    return f"{rules.prefix}{caption}{rules.suffix}"


def first_caption(source: Source, index: int, rules: config.Data) -> str:
    """What a picture is validated with and painted from: nothing is left to chance."""
    return framed(source.captions(index)[0], rules)


def drawn_caption(source: Source, index: int, rules: config.Data, seed: int, position: int) -> str | None:
    """The caption of the picture that stands at a position of the run: step × batch + row."""
    return caption_of(source.captions(index), source.tags(index), rules, draws(seed, Of.CAPTION, position))


def mentions_sides(caption: str) -> bool:
    """Whether it says left or right in English, so that the mirrored picture would make it wrong. "All right", "she has left" and
    "a right angle" count too: a picture too many that is never mirrored costs nothing."""
    return SIDES.search(caption) is not None
