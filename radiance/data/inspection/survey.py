"""A survey of a dataset and of its use by a run, computed without decoding images."""

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
from radiance.data.buckets import assign_buckets, upscale_factor
from radiance.data.datasets import open_splits
from radiance.data.sampler import BatchSampler
from radiance.data.source import Source

# Common aspect ratios (width to height). Each image counts for the nearest one.
_TALL_RATIOS = [Fraction(w, h) for w, h in ((1, 3), (1, 2), (9, 16), (2, 3), (3, 4), (4, 5))]
ASPECT_RATIOS = (*_TALL_RATIOS, Fraction(1), *(1 / ratio for ratio in _TALL_RATIOS[::-1]))
NUM_LENGTH_BINS = 16  # of the histogram of caption lengths up to text.max_length
PERCENTS = (50, 90, 99, 100)  # percentiles of caption lengths


# From which a folder's resolution is chosen.
COMMON_RESOLUTIONS = (1024, 768, 512, 384, 256, 192, 128, 96, 64, 48, 32, 16)
MIN_KEPT_FRACTION = 0.95


class Histogram(NamedTuple):
    """Counts of integers."""

    edges: tuple[int, ...]  # bin i counts edges[i] <= value < edges[i + 1]
    counts: tuple[int, ...]  # one fewer than edges


class SourceUsage(NamedTuple):
    """How an epoch uses one part of the data."""

    num_images: int  # in the part
    fraction: float  # of an epoch's samples
    num_sampled: int  # in the first epoch


class BucketUsage(NamedTuple):
    """A size that images are cropped to, and how the first epoch uses it."""

    width: int  # pixels
    height: int
    num_images: int
    num_batches: int  # complete batches
    num_leftover: int  # images that do not complete a batch


class CaptionStatistics(NamedTuple):
    """Statistics of captions in tokens, with data.caption_prefix and data.caption_suffix."""

    num_captions: int
    min_per_image: int
    max_per_image: int
    length_histogram: Histogram  # the last bin counts all captions over text.max_length
    length_percentiles: Mapping[int, int]  # length that 50, 90, … percent of captions do not exceed
    num_truncated: int  # captions over text.max_length
    num_tagged_images: int  # images whose captions are lists of tags
    tags_per_caption: tuple[int, int]  # median and maximum; 0 without tags


@dataclass(frozen=True)
class DatasetSurvey:
    """Statistics of the images that a run trains on."""

    num_images: int
    sources: Sequence[SourceUsage]
    resolution_histogram: Histogram  # sides of squares with as many pixels as the images
    aspect_ratios: Mapping[Fraction, int]  # number of images by width to height
    buckets: Sequence[BucketUsage]  # those that some image can have
    num_upscaled: int  # images that are scaled up in the first epoch
    max_upscale: float  # the largest factor
    captions: CaptionStatistics
    weight_range: tuple[float, float, float]  # loss weights: minimum, mean and maximum
    text_lengths: Sequence[int]  # lengths that texts are padded to

    @property
    def num_programs(self) -> int:
        """Number of training steps that may be compiled, one for each image and text shape."""
        return len(self.buckets) * len(self.text_lengths)


def survey_dataset(
    source: Source,
    run: config.Config,
    count_tokens: Callable[[str], int],
    progress: Callable[[int], Any] = lambda count: None,
) -> DatasetSurvey:
    """Survey the training images of a run.

    Args:
        source: The images.
        run: Settings of the run.
        count_tokens: Returns the number of tokens of a caption.
        progress: Called with the number of images that are new since the last call.
    """
    # How incomplete batches are used does not change an epoch's images. An epoch that drops all of
    # them must not end the survey.
    data = config.override(run.data, ["incomplete_batches=carry"])
    sampler = BatchSampler(source, data, run.train.seed)
    image_indices, bucket_indices = sampler.sample_epoch(0)
    sizes = source.sizes.astype(np.float64)
    bucket_sizes = np.array(sampler.assignment.bucket_sizes)[bucket_indices]
    scales = upscale_factor(*sizes[image_indices].T, *bucket_sizes.T)
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


def count_kept_images(data: config.Data) -> tuple[int, dict[int, int]]:
    """Count the images that common resolutions, and those of the settings, keep.

    Args:
        data: Settings of the data. Steps of buckets, upscaling and aspect ratios apply.

    Returns:
        The number of all images, and the number of images kept by resolution, largest first.
    """
    everything = ["resolution=1", "extra_resolutions=[]", "bucket_step=0", "validation_fraction=0"]
    splits = open_splits(config.override(data, everything), verbose=False)
    widths, heights = np.concatenate([split.sizes for split in splits.values()]).T
    kept = {}
    for resolution in sorted({*COMMON_RESOLUTIONS, *data.resolutions}, reverse=True):
        if data.bucket_step and resolution % data.bucket_step:
            continue
        changes = [f"resolution={resolution}", "extra_resolutions=[]"]
        assignment = assign_buckets(widths, heights, config.override(data, changes))
        kept[resolution] = int((assignment.bucket_indices >= 0).sum())
    return len(widths), kept


def choose_resolution(kept: Mapping[int, int]) -> int:
    """Return the largest resolution that keeps nearly as many images as any other.

    Args:
        kept: Number of images kept, by resolution.
    """
    needed = MIN_KEPT_FRACTION * max(kept.values())
    return max(resolution for resolution, count in kept.items() if count >= needed)


def _source_usage(source: Source, image_indices: Int64[np.ndarray, " seen"]) -> list[SourceUsage]:
    """Count the samples of an epoch by part of the data."""
    ends = [span.start + span.num_images for span in source.spans]
    counts = np.bincount(np.searchsorted(ends, image_indices, side="right"), minlength=len(ends))
    return [
        SourceUsage(span.num_images, span.fraction, int(count))
        for span, count in zip(source.spans, counts)
    ]


def _bucket_usage(
    sampler: BatchSampler, bucket_indices: Int64[np.ndarray, " seen"], batch_size: int
) -> list[BucketUsage]:
    """Count the samples of an epoch by bucket."""
    assignment = sampler.assignment
    reachable_buckets = np.unique(assignment.bucket_indices[assignment.bucket_indices >= 0])
    counts = np.bincount(bucket_indices, minlength=len(assignment.bucket_sizes))
    usages = []
    for bucket in reachable_buckets:
        width, height = assignment.bucket_sizes[bucket]
        num_batches, num_leftover = divmod(int(counts[bucket]), batch_size)
        usages.append(BucketUsage(width, height, int(counts[bucket]), num_batches, num_leftover))
    return usages


def _resolution_histogram(resolutions: Real[np.ndarray, " n"]) -> Histogram:
    """Count resolutions in bins of half an octave, such as 256, 384, 512, 768, 1024."""
    octaves = range(int(np.log2(max(resolutions.min(), 1))), int(np.log2(resolutions.max())) + 2)
    return _histogram(
        resolutions, sorted({edge for k in octaves for edge in (2**k, 3 * 2**k // 2)})
    )


def _histogram(values: Real[np.ndarray, " n"], edges: Sequence[int]) -> Histogram:
    """Count values between the first and the last edge, without empty bins at either end."""
    bin_indices = np.searchsorted(edges, values, side="right")
    counts = np.bincount(bin_indices, minlength=len(edges) + 1)[1:-1]
    first, last = np.flatnonzero(counts)[[0, -1]]
    return Histogram(
        tuple(int(edge) for edge in edges[first : last + 2]),
        tuple(counts[first : last + 1].tolist()),
    )


def _count_aspect_ratios(
    widths: Real[np.ndarray, " n"], heights: Real[np.ndarray, " n"]
) -> dict[Fraction, int]:
    """Count images by the nearest common aspect ratio on a logarithmic scale."""
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
    """Count captions, and return the distinct lengths too."""
    lengths: Counter[int] = Counter()
    captions_per_image: Counter[int] = Counter()
    tag_counts: Counter[int] = Counter()
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
    """Return the smallest value that `percent` percent of the values do not exceed."""
    values, frequencies = np.array(sorted(counts.items())).T
    cumulative = np.cumsum(frequencies)
    return int(values[np.searchsorted(cumulative, math.ceil(cumulative[-1] * percent / 100))])


def _weight_range(weights: Float32[np.ndarray, " n"]) -> tuple[float, float, float]:
    return float(weights.min()), float(weights.mean(dtype=np.float64)), float(weights.max())
