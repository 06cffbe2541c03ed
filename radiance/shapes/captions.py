"""Captions of `shapes`, whose length in tokens is drawn from a distribution that ignores the image.

A caption gives the number of objects, then describes as many of them as fit, each with all its
attributes. Half of the captions name the background, or another fraction. The remaining length is
used by longer phrases for the same content, and by filler. A token is a word or a punctuation mark,
as in `text/`, and the end of the sequence is one token.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from radiance.base.random import RandomStream, make_rng, random_permutation
from radiance.base.settings import require
from radiance.shapes.attributes import (
    BACKGROUNDS,
    COLORS,
    GRID_SIZE,
    MAX_OBJECTS,
    SIZES,
    SPLITS,
    CaptionLengths,
)
from radiance.shapes.scenes import SHAPES, Scene, SceneDescription, SceneObject

MIN_TOKENS = 10  # room for one object and the background
SHORT_MAX_TOKENS = 20  # longest caption of the distribution "short"
NUMBER_WORDS = ("one", "two", "three", "four", "five")
CELL_NAMES = tuple(  # as in a spreadsheet
    f"{'abcd'[column]}{row + 1}" for row in range(GRID_SIZE) for column in range(GRID_SIZE)
)

# The first template of each list is the shortest.
COUNT_TEMPLATES = (
    "{count}",
    "{count} {noun}",
    "{count} {noun} in all",
    "a picture of {count} {noun}",  # codespell:ignore picture
    "{count} {noun} in four rows and four columns",
    "this picture shows exactly {count} {noun} and nothing else",  # codespell:ignore picture
)
OBJECT_TEMPLATES = (
    "{size} {color} {shape} {cell}",
    "{size} {color} {shape} at {cell}",
    "a {size} {color} {shape} at {cell}",
    "at {cell} a {size} {shape} in {color}",
    "the {shape} at {cell} is {color} and {size}",
    "the {color} {shape} of {size} size stands at {cell}",
    "there is a {size} {color} {shape} in row {row} and column {column}",
    "column {column} of row {row} holds a {size} {shape} that is {color}",
    "where column {column} meets row {row} one sees a {shape} which is {size} in size "
    "and {color} in colour",  # codespell:ignore colour
)
BACKGROUND_TEMPLATES = (
    "on {background}",
    "on a {background} background",
    "the background is {background}",
    "all of this lies on a background of plain {background}",
)
# Fillers describe nothing that an image shows. The shortest has two tokens, a word and a mark, so
# fillers can be added until at most one token is left, for a full stop.
FILLERS = (
    "simply",
    "as drawn",
    "nothing to add",
    "calm and tidy work",
    "drawn for a quiet study",
    "there is little else to say",
    "the artist took some time for it",
    "such pictures are easy to like at first sight",  # codespell:ignore pictures
    "nobody remembers when or why it was made",
    "it could hang in a school or in an office",
    "some people find this kind of picture restful to look at",  # codespell:ignore picture
    "a friend of ours once asked what the whole thing was about",
    "each of them keeps to its own place and leaves the others alone",
    "the edges are clean and the hand that made them was in no hurry",
)


class Caption(NamedTuple):
    """A caption and the attributes that it describes."""

    text: str
    description: SceneDescription


class Phrase(NamedTuple):
    """A part of a caption before its wording is chosen."""

    templates: Sequence[str]  # the shortest first
    values: dict[str, str]  # of the templates' placeholders


def make_caption(
    scene: Scene,
    caption_lengths: CaptionLengths,
    max_tokens: int,
    named_backgrounds: float = 0.5,
) -> Caption:
    """Write the caption of a scene. It is a function of the arguments.

    Args:
        scene: The scene.
        caption_lengths: Distribution of the number of tokens. "mixed": 10 to `max_tokens`, mostly
            few; "short": the same up to 20, with median 12; "full": always `max_tokens`, so that
            there is no padding.
        max_tokens: Longest caption in tokens, end of sequence included; at least 20.
        named_backgrounds: Probability that the caption names the background.

    Raises:
        ConfigError: `max_tokens` is too small.
    """
    require(
        max_tokens >= SHORT_MAX_TOKENS,
        f"data.shapes.max_tokens={max_tokens} is too small for captions of shapes: "
        f"use at least {SHORT_MAX_TOKENS}.",
    )
    rng = make_rng(scene.seed, RandomStream.SCENE_CAPTION, scene.index, SPLITS.index(scene.split))
    u_length, u_background = rng.random(2)
    num_tokens = _choose_length(caption_lengths, max_tokens, u_length)
    background = scene.background if u_background < named_backgrounds else None
    description = _choose_description(scene, background, num_tokens, rng)

    phrases = _list_phrases(description)
    (count_text, *other_texts), num_spare_tokens = _write_phrases(phrases, num_tokens, rng)
    order = random_permutation(rng, len(other_texts))
    text = f"{count_text}: {', '.join(other_texts[i] for i in order)}{'.' * num_spare_tokens}"
    return Caption(text, description)


def _choose_length(caption_lengths: CaptionLengths, max_tokens: int, u_length: float) -> int:
    """Choose a number of tokens by a number in [0, 1)."""
    if caption_lengths == "full":
        return max_tokens
    longest = SHORT_MAX_TOKENS if caption_lengths == "short" else max_tokens
    return MIN_TOKENS + int((longest - MIN_TOKENS + 1) * u_length * u_length)


def _choose_description(
    scene: Scene, background: str | None, num_tokens: int, rng: np.random.Generator
) -> SceneDescription:
    """Choose as many random objects as fit when every phrase has its shortest form."""
    num_tokens -= _count_tokens(COUNT_TEMPLATES[0])
    if background is not None:
        num_tokens -= _count_tokens(BACKGROUND_TEMPLATES[0])
    num_described = num_tokens // _count_tokens(OBJECT_TEMPLATES[0])
    order = random_permutation(rng, len(scene.objects))
    described_objects = tuple(scene.objects[i] for i in order[:num_described])
    return SceneDescription(len(scene.objects), described_objects, background)


def _list_phrases(description: SceneDescription) -> list[Phrase]:
    """List the phrases of a caption, the number of objects first."""
    noun = "shape" if description.num_objects == 1 else "shapes"
    count = NUMBER_WORDS[description.num_objects - 1]
    phrases = [Phrase(COUNT_TEMPLATES, {"count": count, "noun": noun})]
    if description.background is not None:
        phrases.append(Phrase(BACKGROUND_TEMPLATES, {"background": description.background}))
    phrases += [
        Phrase(OBJECT_TEMPLATES, _object_values(scene_object))
        for scene_object in description.objects
    ]
    return phrases


def _object_values(scene_object: SceneObject) -> dict[str, str]:
    return {
        "size": scene_object.size,
        "color": scene_object.color,
        "shape": scene_object.shape,
        "row": NUMBER_WORDS[scene_object.row],
        "column": NUMBER_WORDS[scene_object.column],
        "cell": CELL_NAMES[scene_object.row * GRID_SIZE + scene_object.column],
    }


def _write_phrases(
    phrases: Sequence[Phrase], num_tokens: int, rng: np.random.Generator
) -> tuple[list[str], int]:
    """Word each phrase at random and add fillers.

    Returns:
        The texts, and the number of tokens that are left: 0 or 1.
    """
    num_spare = num_tokens - sum(_count_tokens(phrase.templates[0]) for phrase in phrases)
    texts = []
    for phrase in phrases:
        shortest = phrase.templates[0]
        template = _choose(phrase.templates, rng)
        if _count_tokens(template) - _count_tokens(shortest) > num_spare:
            template = shortest
        num_spare -= _count_tokens(template) - _count_tokens(shortest)
        texts.append(template.format(**phrase.values))
    while num_spare >= _count_tokens(FILLERS[0]):
        texts.append(_choose([text for text in FILLERS if _count_tokens(text) <= num_spare], rng))
        num_spare -= _count_tokens(texts[-1])
    return texts, num_spare


def _choose(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.random() * len(texts))]


def split_tokens(text: str) -> list[str]:
    """Split a caption into words and punctuation marks, without the end of the sequence."""
    return re.findall(r"\w+|[^\w\s]", text)


def _count_tokens(text: str) -> int:
    """Count the tokens of a phrase and the mark after it. A placeholder is one word."""
    return len(text.split()) + 1


def _iterate_vocabulary() -> Iterator[str]:
    for text in (*COUNT_TEMPLATES, *OBJECT_TEMPLATES, *BACKGROUND_TEMPLATES, *FILLERS):
        yield from (word for word in text.split() if not word.startswith("{"))
    for words in (SIZES, COLORS, SHAPES, BACKGROUNDS, NUMBER_WORDS[:MAX_OBJECTS], CELL_NAMES):
        yield from words
    yield from ("shape", "shapes", *":,.")


VOCABULARY = tuple(sorted(set(_iterate_vocabulary())))  # every token of a caption
