"""What a data set holds and what a run will make of it, counted before anything is decoded."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, Real

from radiance import config
from radiance.data.buckets import enlargement
from radiance.data.datasets import Source
from radiance.data.order import Order
from radiance.data.pipeline import width_for

# What pictures are called by; each counts for the nearest.
PROPORTIONS = tuple(Fraction(ratio) for ratio in ("1/3", "1/2", "9/16", "2/3", "3/4", "4/5", "1", "5/4", "4/3", "3/2", "16/9", "2", "3"))
BARS = 16  # of a histogram of lengths within the limit
SHARES = (50, 90, 99, 100)  # percent of the captions


class Histogram(NamedTuple):
    """Whole numbers."""

    edges: tuple[int, ...]  # a bar holds what is at least its edge and less than the next
    counts: tuple[int, ...]  # one fewer


class Seen(NamedTuple):
    """A part of the data in an epoch."""

    pictures: int  # that it has
    share: float  # of those that are seen
    seen: int  # in an epoch


class Shape(NamedTuple):
    """What pictures are cut to, in the first epoch."""

    width: int  # pixels
    height: int
    pictures: int
    batches: int  # whole ones
    rest: int  # pictures that fill no batch


class Captions(NamedTuple):
    """Captions in tokens, as they are written, with data.prefix and data.suffix."""

    count: int
    fewest: int  # of a picture
    most: int
    lengths: Histogram  # the last bar holds what is over the limit
    shares: Mapping[int, int]  # the length that so many percent of them do not exceed
    cut: int  # over the limit
    tagged: int  # pictures whose captions are lists of tags
    tags: tuple[int, int]  # the median and the largest number of tags of a caption; 0 without


@dataclass(frozen=True)
class Survey:
    """Of the pictures that a run trains on."""

    pictures: int
    parts: Sequence[Seen]
    sides: Histogram  # pixels; of the square of as many pixels as the picture has
    proportions: Mapping[Fraction, int]  # width to height
    shapes: Sequence[Shape]  # those that some picture may have
    enlarged: int  # pictures scaled up in the first epoch
    largest: float  # by as much as this, at most
    captions: Captions
    weights: tuple[float, float, float]  # of the losses: smallest, mean and largest
    widths: Sequence[int]  # that texts may be cut to

    @property
    def programs(self) -> int:
        """That may have to be compiled for a training step: one for each shape of pictures and texts."""
        return len(self.shapes) * len(self.widths)


def survey(
    source: Source, run: config.Config, tokens: Callable[[str], int], progress: Callable[[int], Any] = lambda pictures: None
) -> Survey:
    """tokens: counts those of a caption. progress: is called with the number of pictures whose captions were just read."""
    # What is left of a shape does not change what is drawn, and must not end a survey.
    order = Order(source, config.override(run.data, ["remainder=carry"]), run.train.seed)
    pictures, shape = order.drawn(0)
    sizes = source.sizes.astype(np.float64)
    scale = enlargement(*sizes[pictures].T, *np.array(order.shapes.sizes)[shape].T)
    captions, lengths = _captions(source, run, tokens, progress)
    return Survey(
        pictures=len(source),
        parts=_parts(source, pictures),
        sides=_sides(np.sqrt(sizes.prod(axis=1))),
        proportions=_proportions(*sizes.T),
        shapes=_shapes(order, shape, run.data.batch),
        enlarged=int((scale > 1).sum()),
        largest=float(scale.max()),
        captions=captions,
        weights=_range(source.weights),
        widths=sorted({width_for(length, run.text.length, run.model.masking) for length in lengths}),
    )


def _parts(source: Source, pictures: Int64[np.ndarray, " seen"]) -> list[Seen]:
    """pictures: of an epoch."""
    ends = [span.first + span.count for span in source.spans]
    seen = np.bincount(np.searchsorted(ends, pictures, side="right"), minlength=len(ends))
    return [Seen(span.count, span.share, int(count)) for span, count in zip(source.spans, seen)]


def _shapes(order: Order, drawn: Int64[np.ndarray, " seen"], batch: int) -> list[Shape]:
    """drawn: the shapes of an epoch's pictures."""
    possible = np.unique(order.shapes.at[order.shapes.at >= 0])
    counts = np.bincount(drawn, minlength=len(order.shapes.sizes))
    return [Shape(*order.shapes.sizes[i], int(counts[i]), *(int(x) for x in divmod(counts[i], batch))) for i in possible]


def _sides(sides: Real[np.ndarray, " n"]) -> Histogram:
    """In halves of octaves: 256, 384, 512, 768, 1024, …"""
    octaves = range(int(np.log2(max(sides.min(), 1))), int(np.log2(sides.max())) + 2)
    return _histogram(sides, sorted({edge for k in octaves for edge in (2**k, 3 * 2**k // 2)}))


def _histogram(values: Real[np.ndarray, " n"], edges: Sequence[int]) -> Histogram:
    """From the first bar that holds something to the last. What is below the first edge, or above the last, is not counted."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)[1:-1]
    first, last = np.flatnonzero(counts)[[0, -1]]
    return Histogram(tuple(int(edge) for edge in edges[first : last + 2]), tuple(counts[first : last + 1].tolist()))


def _proportions(widths: Real[np.ndarray, " n"], heights: Real[np.ndarray, " n"]) -> dict[Fraction, int]:
    """The nearest one, by factors."""
    names = np.log([float(ratio) for ratio in PROPORTIONS])
    nearest = np.searchsorted((names[1:] + names[:-1]) / 2, np.log(widths / heights))
    counts = np.bincount(nearest, minlength=len(names))
    return {ratio: int(count) for ratio, count in zip(PROPORTIONS, counts) if count}


def _captions(
    source: Source, run: config.Config, tokens: Callable[[str], int], progress: Callable[[int], Any]
) -> tuple[Captions, Sequence[int]]:
    """And which lengths there are."""
    lengths: Counter[int] = Counter()
    each, tags = Counter(), Counter()
    tagged = 0
    for index in range(len(source)):
        captions = source.captions(index)
        each[len(captions)] += 1
        lengths.update(tokens(f"{run.data.prefix}{caption}{run.data.suffix}") for caption in captions)
        if source.tags(index):
            tagged += 1
            tags.update(sum(bool(tag.strip()) for tag in caption.split(",")) for caption in captions)
        progress(1)
    limit = run.text.length
    step = math.ceil(limit / BARS)
    edges = [*range(1, limit + 1, step), limit + 1, max(limit, *lengths) + 2]
    known, counts = np.array(sorted(lengths.items())).T
    bars = _histogram(np.repeat(known, counts), edges)
    shares = {share: _quantile(lengths, share) for share in SHARES}
    cut = sum(count for length, count in lengths.items() if length > limit)
    of_tags = (_quantile(tags, 50), max(tags)) if tags else (0, 0)
    return Captions(lengths.total(), min(each), max(each), bars, shares, cut, tagged, of_tags), sorted(lengths)


def _quantile(counts: Mapping[int, int], percent: int) -> int:
    """The least number that so many percent do not exceed."""
    numbers, frequency = np.array(sorted(counts.items())).T
    reached = np.cumsum(frequency)
    return int(numbers[np.searchsorted(reached, math.ceil(reached[-1] * percent / 100))])


def _range(weights: Float32[np.ndarray, " n"]) -> tuple[float, float, float]:
    return float(weights.min()), float(weights.mean(dtype=np.float64)), float(weights.max())
