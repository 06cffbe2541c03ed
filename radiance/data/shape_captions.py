"""Captions of `shapes` of exactly as many tokens as a law draws, which knows nothing of the picture.

A caption says how many objects there are, then as many of them as there is room for, each with all its attributes, and in half of
the captions the background. What room is left goes to longer words for the same, and to filler. A token is a word or a
mark, as `text/` counts them, and the end of the sequence is one.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from radiance.data.draws import Of, draws, shuffled
from radiance.data.shapes import BACKGROUNDS, COLOURS, GRID, MOST, SHAPES, SIZES, SPLITS, Facts, Object, Scene
from radiance.sections import require

Law = Literal["short", "mixed", "full"]

SHORTEST, SHORT = 10, 20  # tokens: room for one object and the background; the longest of the short law
NUMBERS = ("one", "two", "three", "four", "five")
CELLS = tuple(f"{'abcd'[column]}{row + 1}" for row in range(GRID) for column in range(GRID))  # as in a spreadsheet

# The first of each list is the shortest.
COUNTS = (
    "{count}",
    "{count} {noun}",
    "{count} {noun} in all",
    "a picture of {count} {noun}",
    "{count} {noun} in four rows and four columns",
    "this picture shows exactly {count} {noun} and nothing else",
)
MENTIONS = (
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
SETTINGS = (
    "on {background}",
    "on a {background} background",
    "the background is {background}",
    "all of this lies on a background of plain {background}",
)
# Nothing that a picture shows. Of the shortest, one word and a mark, so many can be added that at most one token is left, for a full stop.
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
    facts: Facts  # what it says


def caption(scene: Scene, law: Law = "mixed", limit: int = 256) -> Caption:
    """The caption of a scene: the same each time.

    law: of how many tokens it has, the end of the sequence included. mixed: 10 to `limit`, dense at the short end; short: the same
    up to 20, with median 12; full: `limit`, so that there is no padding. limit: at least 20, or ConfigError.
    """
    require(limit >= SHORT, f"Captions of shapes need room for {SHORT} tokens, and the limit is {limit}: raise it (data.shapes.limit).")
    draw = draws(scene.seed, Of.SAID, scene.index, SPLITS.index(scene.split))
    length, named = draw.random(2)
    longest = SHORT if law == "short" else limit
    # Every part has a mark behind it, the last one the end of the sequence.
    spare = longest if law == "full" else SHORTEST + int((longest - SHORTEST + 1) * length * length)
    count = len(scene.objects)
    parts = [(COUNTS, {"count": NUMBERS[count - 1], "noun": "shape" if count == 1 else "shapes"})]
    if named < 0.5:
        parts.append((SETTINGS, {"background": scene.background}))
    room = (spare - sum(_cost(forms[0]) for forms, _ in parts)) // _cost(MENTIONS[0])
    told = tuple(scene.objects[i] for i in shuffled(draw, count)[:room])
    parts += [(MENTIONS, _words(thing)) for thing in told]
    (head, *rest), spare = _filled(parts, spare, draw)
    facts = Facts(count, told, scene.background if named < 0.5 else None)
    return Caption(f"{head}: {', '.join(rest[i] for i in shuffled(draw, len(rest)))}{'.' * spare}", facts)


def _filled(parts: Sequence[tuple[Sequence[str], dict[str, str]]], spare: int, draw: np.random.Generator) -> tuple[list[str], int]:
    """The parts in forms drawn from theirs, and filler; of the tokens that there are to spare at most one is left."""
    spare -= sum(_cost(forms[0]) for forms, _ in parts)
    texts = []
    for forms, words in parts:
        form = forms[int(draw.random() * len(forms))]
        if _cost(form) - _cost(forms[0]) > spare:
            form = forms[0]
        spare -= _cost(form) - _cost(forms[0])
        texts.append(form.format(**words))
    while spare >= _cost(FILLERS[0]):
        fitting = [text for text in FILLERS if _cost(text) <= spare]
        texts.append(fitting[int(draw.random() * len(fitting))])
        spare -= _cost(texts[-1])
    return texts, spare


def tokens(text: str) -> list[str]:
    """Words and marks, without the end of the sequence."""
    return re.findall(r"\w+|[^\w\s]", text)


def _cost(text: str) -> int:
    """Tokens of a part, and the mark after it. What stands in braces is one word."""
    return len(text.split()) + 1


def _words(thing: Object) -> dict[str, str]:
    cell = CELLS[thing.row * GRID + thing.column]
    words = {"row": NUMBERS[thing.row], "column": NUMBERS[thing.column], "cell": cell}
    return {"size": thing.size, "colour": thing.colour, "shape": thing.shape} | words


def _vocabulary() -> Iterator[str]:
    for text in (*COUNTS, *MENTIONS, *SETTINGS, *FILLERS):
        yield from (word for word in text.split() if not word.startswith("{"))
    for words in (SIZES, COLOURS, SHAPES, BACKGROUNDS, NUMBERS[:MOST], CELLS, ("shape", "shapes"), ":,."):
        yield from words


VOCABULARY = tuple(sorted(set(_vocabulary())))  # every token of a caption
