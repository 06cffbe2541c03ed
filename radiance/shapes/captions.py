"""Captions of `shapes` of exactly as many tokens as a law draws, which knows nothing of the image.

A caption says how many objects there are, then as many of them as there is room for, each with all its attributes, and in half of
the captions the background. What room is left goes to longer words for the same, and to filler. A token is a word or a
mark, as `text/` counts them, and the end of the sequence is one.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from radiance.base.random import RandomStream, make_rng, random_permutation
from radiance.base.settings import require
from radiance.shapes.scenes import (
    BACKGROUNDS,
    COLORS,
    GRID_SIZE,
    MAX_OBJECTS,
    SHAPES,
    SIZES,
    SPLITS,
    Scene,
    SceneDescription,
    SceneObject,
)

CaptionLengths = Literal["short", "mixed", "full"]

MIN_TOKENS, SHORT_MAX_TOKENS = (
    10,
    20,
)  # tokens: room for one object and the background; the longest of the short law
NUMBER_WORDS = ("one", "two", "three", "four", "five")
CELL_NAMES = tuple(
    f"{'abcd'[column]}{row + 1}" for row in range(GRID_SIZE) for column in range(GRID_SIZE)
)  # as in a spreadsheet

# The first of each list is the shortest.
COUNT_TEMPLATES = (
    "{count}",
    "{count} {noun}",
    "{count} {noun} in all",
    "a picture of {count} {noun}",
    "{count} {noun} in four rows and four columns",
    "this picture shows exactly {count} {noun} and nothing else",
)
OBJECT_TEMPLATES = (
    "{size} {colour} {shape} {cell}",
    "{size} {colour} {shape} at {cell}",
    "a {size} {colour} {shape} at {cell}",
    "at {cell} a {size} {shape} in {colour}",
    "the {shape} at {cell} is {colour} and {size}",
    "the {colour} {shape} of {size} size stands at {cell}",
    "there is a {size} {colour} {shape} in row {row} and column {column}",
    "column {column} of row {row} holds a {size} {shape} that is {colour}",
    "where column {column} meets row {row} one sees a {shape} which is {size} in size and {colour} in colour",
)
BACKGROUND_TEMPLATES = (
    "on {background}",
    "on a {background} background",
    "the background is {background}",
    "all of this lies on a background of plain {background}",
)
# Nothing that an image shows. Of the shortest, one word and a mark, so many can be added that at most one token is left, for a full stop.
FILLERS = (
    "simply",
    "as drawn",
    "nothing to add",
    "calm and tidy work",
    "drawn for a quiet study",
    "there is little else to say",
    "the artist took some time for it",
    "such pictures are easy to like at first sight",
    "nobody remembers when or why it was made",
    "it could hang in a school or in an office",
    "some people find this kind of picture restful to look at",
    "a friend of ours once asked what the whole thing was about",
    "each of them keeps to its own place and leaves the others alone",
    "the edges are clean and the hand that made them was in no hurry",
)


class Caption(NamedTuple):
    text: str
    description: SceneDescription  # what it says


def make_caption(
    scene: Scene, caption_lengths: CaptionLengths = "mixed", max_tokens: int = 256
) -> Caption:
    """The caption of a scene: the same each time.

    law: of how many tokens it has, the end of the sequence included. mixed: 10 to `limit`, dense at the short end; short: the same
    up to 20, with median 12; full: `limit`, so that there is no padding. limit: at least 20, or ConfigError.
    """
    require(
        max_tokens >= SHORT_MAX_TOKENS,
        f"Captions of shapes need room for {SHORT_MAX_TOKENS} tokens, and the limit is {max_tokens}: raise it (data.shapes.max_tokens).",
    )
    rng = make_rng(scene.seed, RandomStream.SCENE_CAPTION, scene.index, SPLITS.index(scene.split))
    u_length, u_background = rng.random(2)
    max_length = SHORT_MAX_TOKENS if caption_lengths == "short" else max_tokens
    # Every part has a mark behind it, the last one the end of the sequence.
    token_budget = (
        max_length
        if caption_lengths == "full"
        else MIN_TOKENS + int((max_length - MIN_TOKENS + 1) * u_length * u_length)
    )
    num_objects = len(scene.objects)
    phrases = [
        (
            COUNT_TEMPLATES,
            {
                "count": NUMBER_WORDS[num_objects - 1],
                "noun": "shape" if num_objects == 1 else "shapes",
            },
        )
    ]
    if u_background < 0.5:
        phrases.append((BACKGROUND_TEMPLATES, {"background": scene.background}))
    num_described = (
        token_budget - sum(_count_tokens(templates[0]) for templates, _ in phrases)
    ) // _count_tokens(OBJECT_TEMPLATES[0])
    described_objects = tuple(
        scene.objects[i] for i in random_permutation(rng, num_objects)[:num_described]
    )
    phrases += [
        (OBJECT_TEMPLATES, _template_values(scene_object)) for scene_object in described_objects
    ]
    (count_phrase, *other_phrases), token_budget = _write_phrases(phrases, token_budget, rng)
    description = SceneDescription(
        num_objects, described_objects, scene.background if u_background < 0.5 else None
    )
    return Caption(
        f"{count_phrase}: {', '.join(other_phrases[i] for i in random_permutation(rng, len(other_phrases)))}{'.' * token_budget}",
        description,
    )


def _write_phrases(
    phrases: Sequence[tuple[Sequence[str], dict[str, str]]],
    token_budget: int,
    rng: np.random.Generator,
) -> tuple[list[str], int]:
    """The parts in forms drawn from theirs, and filler; of the tokens that there are to spare at most one is left."""
    token_budget -= sum(_count_tokens(templates[0]) for templates, _ in phrases)
    texts = []
    for templates, words in phrases:
        template = templates[int(rng.random() * len(templates))]
        if _count_tokens(template) - _count_tokens(templates[0]) > token_budget:
            template = templates[0]
        token_budget -= _count_tokens(template) - _count_tokens(templates[0])
        texts.append(template.format(**words))
    while token_budget >= _count_tokens(FILLERS[0]):
        candidates = [text for text in FILLERS if _count_tokens(text) <= token_budget]
        texts.append(candidates[int(rng.random() * len(candidates))])
        token_budget -= _count_tokens(texts[-1])
    return texts, token_budget


def split_tokens(text: str) -> list[str]:
    """Words and marks, without the end of the sequence."""
    return re.findall(r"\w+|[^\w\s]", text)


def _count_tokens(text: str) -> int:
    """Tokens of a part, and the mark after it. What stands in braces is one word."""
    return len(text.split()) + 1


def _template_values(scene_object: SceneObject) -> dict[str, str]:
    cell = CELL_NAMES[scene_object.row * GRID_SIZE + scene_object.column]
    values = {
        "row": NUMBER_WORDS[scene_object.row],
        "column": NUMBER_WORDS[scene_object.column],
        "cell": cell,
    }
    return {
        "size": scene_object.size,
        "colour": scene_object.color,
        "shape": scene_object.shape,
    } | values


def _iterate_vocabulary() -> Iterator[str]:
    for text in (*COUNT_TEMPLATES, *OBJECT_TEMPLATES, *BACKGROUND_TEMPLATES, *FILLERS):
        yield from (word for word in text.split() if not word.startswith("{"))
    for words in (
        SIZES,
        COLORS,
        SHAPES,
        BACKGROUNDS,
        NUMBER_WORDS[:MAX_OBJECTS],
        CELL_NAMES,
        ("shape", "shapes"),
        ":,.",
    ):
        yield from words


VOCABULARY = tuple(sorted(set(_iterate_vocabulary())))  # every token of a caption
