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
from radiance.data.batches import padded_text_length
from radiance.data.buckets import upscale_factor
from radiance.data.sampler import BatchSampler
from radiance.data.source import Source

# What images are called by; each counts for the nearest.
ASPECT_RATIOS = tuple(
    Fraction(ratio)
    for ratio in (
        "1/3",
        "1/2",
        "9/16",
        "2/3",
        "3/4",
        "4/5",
        "1",
        "5/4",
        "4/3",
        "3/2",
        "16/9",
        "2",
        "3",
    )
)
NUM_LENGTH_BINS = 16  # of a histogram of lengths within the limit
PERCENTS = (50, 90, 99, 100)  # percent of the captions


class Histogram(NamedTuple):
    """Whole numbers."""

    edges: tuple[int, ...]  # a bar holds what is at least its edge and less than the next
    counts: tuple[int, ...]  # one fewer


class SourceUsage(NamedTuple):
    """A part of the data in an epoch."""

    num_images: int  # that it has
    fraction: float  # of those that are seen
    num_sampled: int  # in an epoch


class BucketUsage(NamedTuple):
    """What images are cut to, in the first epoch."""

    width: int  # pixels
    height: int
    num_images: int
    num_batches: int  # whole ones
    num_leftover: int  # images that fill no batch


class CaptionStatistics(NamedTuple):
    """Captions in tokens, as they are written, with data.caption_prefix and data.caption_suffix."""

    num_captions: int
    min_per_image: int  # of an image
    max_per_image: int
    length_histogram: Histogram  # the last bar holds what is over the limit
    length_percentiles: Mapping[int, int]  # the length that so many percent of them do not exceed
    num_truncated: int  # over the limit
    num_tagged_images: int  # images whose captions are lists of tags
    tags_per_caption: tuple[
        int, int
    ]  # the median and the largest number of tags of a caption; 0 without


@dataclass(frozen=True)
class DatasetSurvey:
    """Of the images that a run trains on."""

    num_images: int
    sources: Sequence[SourceUsage]
    resolution_histogram: Histogram  # pixels; of the square of as many pixels as the image has
    aspect_ratios: Mapping[Fraction, int]  # width to height
    buckets: Sequence[BucketUsage]  # those that some image may have
    num_upscaled: int  # images scaled up in the first epoch
    max_upscale: float  # by as much as this, at most
    captions: CaptionStatistics
    weight_range: tuple[float, float, float]  # of the losses: smallest, mean and largest
    text_lengths: Sequence[int]  # that texts may be cut to

    @property
    def num_programs(self) -> int:
        """That may have to be compiled for a training step: one for each shape of images and texts."""
        return len(self.buckets) * len(self.text_lengths)


def survey_dataset(
    source: Source,
    run: config.Config,
    count_tokens: Callable[[str], int],
    progress: Callable[[int], Any] = lambda image_indices: None,
) -> DatasetSurvey:
    """tokens: counts those of a caption. progress: is called with the number of images whose captions were just read."""
    # What is left of a shape does not change what is drawn, and must not end a survey.
    sampler = BatchSampler(source, config.override(run.data, ["remainder=carry"]), run.train.seed)
    image_indices, bucket_indices = sampler.sample_epoch(0)
    sizes = source.sizes.astype(np.float64)
    scales = upscale_factor(
        *sizes[image_indices].T, *np.array(sampler.assignment.bucket_sizes)[bucket_indices].T
    )
    captions, lengths = _caption_statistics(source, run, count_tokens, progress)
    return DatasetSurvey(
        num_images=len(source),
        sources=_source_usage(source, image_indices),
        resolution_histogram=_resolution_histogram(np.sqrt(sizes.prod(axis=1))),
        aspect_ratios=_count_aspect_ratios(*sizes.T),
        buckets=_bucket_usage(sampler, bucket_indices, run.data.batch_size),
        num_upscaled=int((scales > 1).sum()),
        max_upscale=float(scales.max()),
        captions=captions,
        weight_range=_weight_range(source.loss_weights),
        text_lengths=sorted(
            {
                padded_text_length(length, run.text.max_length, run.model.masking)
                for length in lengths
            }
        ),
    )


def _source_usage(source: Source, image_indices: Int64[np.ndarray, " seen"]) -> list[SourceUsage]:
    """images: of an epoch."""
    ends = [span.start + span.num_images for span in source.spans]
    counts = np.bincount(np.searchsorted(ends, image_indices, side="right"), minlength=len(ends))
    return [
        SourceUsage(span.num_images, span.fraction, int(count))
        for span, count in zip(source.spans, counts)
    ]


def _bucket_usage(
    sampler: BatchSampler, bucket_indices: Int64[np.ndarray, " seen"], batch_size: int
) -> list[BucketUsage]:
    """drawn: the shapes of an epoch's images."""
    reachable_buckets = np.unique(sampler.assignment.bucket_indices[sampler.assignment.bucket_indices >= 0])
    counts = np.bincount(bucket_indices, minlength=len(sampler.assignment.bucket_sizes))
    return [
        BucketUsage(
            *sampler.assignment.bucket_sizes[i],
            int(counts[i]),
            *(int(x) for x in divmod(counts[i], batch_size)),
        )
        for i in reachable_buckets
    ]


def _resolution_histogram(resolutions: Real[np.ndarray, " n"]) -> Histogram:
    """In halves of octaves: 256, 384, 512, 768, 1024, …"""
    octaves = range(int(np.log2(max(resolutions.min(), 1))), int(np.log2(resolutions.max())) + 2)
    return _histogram(
        resolutions, sorted({edge for k in octaves for edge in (2**k, 3 * 2**k // 2)})
    )


def _histogram(values: Real[np.ndarray, " n"], edges: Sequence[int]) -> Histogram:
    """From the first bar that holds something to the last. What is below the first edge, or above the last, is not counted."""
    counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=len(edges) + 1)[
        1:-1
    ]
    first, last = np.flatnonzero(counts)[[0, -1]]
    return Histogram(
        tuple(int(edge) for edge in edges[first : last + 2]),
        tuple(counts[first : last + 1].tolist()),
    )


def _count_aspect_ratios(
    widths: Real[np.ndarray, " n"], heights: Real[np.ndarray, " n"]
) -> dict[Fraction, int]:
    """The nearest one, by factors."""
    log_ratios = np.log([float(ratio) for ratio in ASPECT_RATIOS])
    nearest = np.searchsorted((log_ratios[1:] + log_ratios[:-1]) / 2, np.log(widths / heights))
    counts = np.bincount(nearest, minlength=len(log_ratios))
    return {ratio: int(count) for ratio, count in zip(ASPECT_RATIOS, counts) if count}


def _caption_statistics(
    source: Source,
    run: config.Config,
    count_tokens: Callable[[str], int],
    progress: Callable[[int], Any],
) -> tuple[CaptionStatistics, Sequence[int]]:
    """And which lengths there are."""
    lengths: Counter[int] = Counter()
    captions_per_image, tag_counts = Counter(), Counter()
    num_tagged_images = 0
    for index in range(len(source)):
        captions = source.captions(index)
        captions_per_image[len(captions)] += 1
        lengths.update(
            count_tokens(f"{run.data.caption_prefix}{caption}{run.data.caption_suffix}")
            for caption in captions
        )
        if source.has_tags(index):
            num_tagged_images += 1
            tag_counts.update(
                sum(bool(tag.strip()) for tag in caption.split(",")) for caption in captions
            )
        progress(1)
    max_length = run.text.max_length
    bin_width = math.ceil(max_length / NUM_LENGTH_BINS)
    edges = [*range(1, max_length + 1, bin_width), max_length + 1, max(max_length, *lengths) + 2]
    distinct_lengths, counts = np.array(sorted(lengths.items())).T
    histogram = _histogram(np.repeat(distinct_lengths, counts), edges)
    percentiles = {percent: _percentile(lengths, percent) for percent in PERCENTS}
    num_truncated = sum(count for length, count in lengths.items() if length > max_length)
    tags_per_caption = (_percentile(tag_counts, 50), max(tag_counts)) if tag_counts else (0, 0)
    return CaptionStatistics(
        lengths.total(),
        min(captions_per_image),
        max(captions_per_image),
        histogram,
        percentiles,
        num_truncated,
        num_tagged_images,
        tags_per_caption,
    ), sorted(lengths)


def _percentile(counts: Mapping[int, int], percent: int) -> int:
    """The least number that so many percent do not exceed."""
    values, frequencies = np.array(sorted(counts.items())).T
    cumulative = np.cumsum(frequencies)
    return int(values[np.searchsorted(cumulative, math.ceil(cumulative[-1] * percent / 100))])


def _weight_range(weights: Float32[np.ndarray, " n"]) -> tuple[float, float, float]:
    return float(weights.min()), float(weights.mean(dtype=np.float64)), float(weights.max())
