"""Format the survey of a data set as text: tables, bar charts and sentences."""

import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction

from radiance import config
from radiance.base.tables import format_table
from radiance.data.datasets import dataset_title
from radiance.data.inspection.duplicates import DuplicateGroup, ImageHashes
from radiance.data.inspection.survey import ASPECT_RATIOS, DatasetSurvey, Histogram
from radiance.data.source import MAX_EXAMPLES, Source

LINE_WIDTH = 100
BAR_WIDTH = 50  # characters of the longest bar
BAR_EIGHTHS = " ▏▎▍▌▋▊▉"
MAX_NAME_LENGTH = 24  # characters of a name
MAX_GROUPS = 5  # groups of duplicates


def format_data_report(
    run: config.Config, splits: Mapping[str, Source | str], survey: DatasetSurvey
) -> str:
    """Format all sections of the report.

    Args:
        run: Settings of data and text.
        splits: Sources by split, or the reason why a split is empty.
        survey: Statistics of the training split.
    """
    return "\n\n".join(
        [
            _format_settings(run),
            _format_splits(splits),
            *([_format_sources(run, survey)] if len(survey.sources) > 1 else []),
            "Resolutions: side in pixels of a square of the same area\n"
            + _format_bars(
                _bin_labels(survey.resolution_histogram), survey.resolution_histogram.counts
            ),
            "Aspect ratios: width to height\n"
            + _format_bars(
                [_format_ratio(ratio) for ratio in survey.aspect_ratios],
                list(survey.aspect_ratios.values()),
            ),
            _format_buckets(run, survey),
            _format_captions(run, survey),
            _format_programs(survey),
        ]
    )


def _format_settings(run: config.Config) -> str:
    data = run.data
    resolutions = " and ".join(map(str, data.resolutions))
    shapes = f"buckets in steps of {data.bucket_step}" if data.bucket_step else "squares only"
    location = f"{run.data.source} {run.data.path}".strip()
    return (
        f"{location}\nresolution {resolutions}, {shapes}, {data.batch_size} images per batch; "
        f"text encoder {run.text.encoder}, {run.text.max_length} tokens"
    )


def _format_splits(splits: Mapping[str, Source | str]) -> str:
    sources = {name: split for name, split in splits.items() if not isinstance(split, str)}
    rows, examples = (
        [
            ("", *(f"{name:>10}" for name in sources)),
            ("images", *(f"{len(split):,}" for split in sources.values())),
        ],
        [],
    )
    for kind in sorted(set().union(*(split.skip_counts for split in sources.values()))):
        rows.append(
            (
                f"skipped: {kind}",
                *(f"{split.skip_counts.get(kind, 0):,}" for split in sources.values()),
            )
        )
        examples.append(
            [name for split in sources.values() for name in split.skip_examples.get(kind, ())][
                :MAX_EXAMPLES
            ]
        )
    header, totals, *skipped_lines = format_table(rows).split("\n")
    example_lines = [
        f"{line}\n  {', '.join(map(_shorten, line_examples))}"
        for line, line_examples in zip(skipped_lines, examples)
    ]
    return "\n".join(
        [
            header,
            totals,
            *example_lines,
            *(_wrap(split) for split in splits.values() if isinstance(split, str)),
        ]
    )


def _wrap(sentence: str) -> str:
    return textwrap.fill(sentence, LINE_WIDTH, break_long_words=False, break_on_hyphens=False)


def _format_sources(run: config.Config, survey: DatasetSurvey) -> str:
    rows = [("Sources of the mixture", "images", "weight", "seen per epoch", "repeats")]
    for source, (num_images, fraction, num_seen) in zip(run.data.sources, survey.sources):
        rows.append(
            (
                _shorten(dataset_title(source)),
                f"{num_images:,}",
                f"{fraction:.1%}",
                f"{num_seen:,}",
                f"{num_seen / num_images:.2f}",
            )
        )
    return format_table(rows)


def _format_buckets(run: config.Config, survey: DatasetSurvey) -> str:
    incomplete_label = {"carry": "carried over", "pad": "in padded ones", "drop": "dropped"}[
        run.data.incomplete_batches
    ]
    rows = [("Buckets of an epoch", "images", "batches", incomplete_label)]
    rows += [
        (f"{bucket.width} × {bucket.height}", *(f"{count:,}" for count in bucket[2:]))
        for bucket in survey.buckets
    ]
    if len(survey.buckets) > 1:
        rows.append(("total", *(f"{sum(column):,}" for column in list(zip(*survey.buckets))[2:])))
    lines = [format_table(rows)]
    if survey.num_upscaled:
        lines.append(
            f"Upscaled: {_pluralize(survey.num_upscaled, 'image')}, by a factor of at most "
            f"{survey.max_upscale:.2f}"
        )
    if run.data.incomplete_batches == "drop" and not any(
        bucket.num_batches for bucket in survey.buckets
    ):
        lines.append(
            f"No bucket fills a batch of {run.data.batch_size}, so there is nothing to train on: "
            "use data.incomplete_batches=carry or pad."
        )
    return "\n".join(lines)


def _format_captions(run: config.Config, survey: DatasetSurvey) -> str:
    captions, max_length = survey.captions, run.text.max_length
    per_image = (
        f"{captions.min_per_image}"
        if captions.min_per_image == captions.max_per_image
        else f"{captions.min_per_image} to {captions.max_per_image}"
    )
    labels = _bin_labels(captions.length_histogram)
    if captions.num_truncated:
        labels[-1] = f"over {max_length}"
    lengths = ", ".join(
        f"{percent} % have up to {length}"
        for percent, length in captions.length_percentiles.items()
        if percent < 100
    )
    lines = [
        f"Tokens of {captions.num_captions:,} captions, {per_image} per image, including the end "
        "of the sequence",
        _format_bars(labels, captions.length_histogram.counts),
        f"{lengths}; the longest has {captions.length_percentiles[100]}",
    ]
    if captions.num_truncated:
        lines.append(
            f"Longer than text.max_length={max_length}, and truncated: "
            f"{_pluralize(captions.num_truncated, 'caption')} "
            f"({captions.num_truncated / captions.num_captions:.1%})"
        )
    if captions.num_tagged_images:
        median_tags, max_tags = captions.tags_per_caption
        lines.append(
            f"With tags: {_pluralize(captions.num_tagged_images, 'image')}, {median_tags} tags in "
            f"the median caption and {max_tags} at most"
        )
    low, mean, high = survey.weight_range
    if (low, high) != (1.0, 1.0):
        lines.append(f"Loss weights: {low:g} to {high:g}, {mean:.3g} on average")
    return "\n".join(lines)


def _format_programs(survey: DatasetSurvey) -> str:
    buckets = _pluralize(len(survey.buckets), "bucket")
    text_lengths = _pluralize(len(survey.text_lengths), "text length")
    return (
        f"Programs to compile, at most: {survey.num_programs} = {buckets} × {text_lengths} "
        f"({', '.join(map(str, survey.text_lengths))} tokens)"
    )


def format_resolutions(data: config.Data, num_images: int, kept: Mapping[int, int]) -> str:
    """Format how many images each resolution keeps.

    Args:
        data: Settings of the data; a mark shows its resolutions.
        num_images: Number of all images.
        kept: Number of images kept, by resolution, largest first.
    """
    rows = [("Images by data.resolution", "kept", "left out", "")]
    keeps_none = [resolution for resolution, count in kept.items() if count == 0]
    keeps_all = [resolution for resolution, count in kept.items() if count == num_images]
    largest, smallest = min(keeps_none, default=max(kept)), max(keeps_all, default=min(kept))
    for resolution, count in kept.items():
        is_used = resolution in data.resolutions
        if smallest <= resolution <= largest or is_used:
            mark = "used here" if is_used else ""
            rows.append((f"{resolution}", f"{count:,}", f"{num_images - count:,}", mark))
    return format_table(rows)


def format_duplicates(
    source: Source,
    validation_start: int,
    hashes: ImageHashes,
    groups: Sequence[DuplicateGroup],
    distance: int,
) -> str:
    """Format the groups of near-duplicates.

    Args:
        source: All images, with those of the training split first.
        validation_start: Index of the first image of the validation split.
        hashes: Perceptual hashes of the images.
        groups: Groups of near-duplicates.
        distance: Number of bits in which they may differ.
    """
    num_duplicates = sum(len(group.duplicates) for group in groups)
    num_split_groups = sum(
        min(group.representative, *group.duplicates)
        < validation_start
        <= max(group.representative, *group.duplicates)
        for group in groups
    )
    lines = [
        f"Near-duplicates, which differ in at most {distance} of 64 bits: "
        f"{_pluralize(num_duplicates, 'image')} besides the largest of "
        f"{_pluralize(len(groups), 'group')}"
    ]
    for group in groups[:MAX_GROUPS]:
        members = [
            f"{_shorten(source.name(i))} {'×'.join(map(str, source.sizes[i]))}"
            for i in (group.representative, *group.duplicates)
        ]
        lines.append(
            "  "
            + ", ".join(members[:2])
            + (f" and {len(members) - 2:,} more" if len(members) > 2 else "")
        )
    if len(groups) > MAX_GROUPS:
        lines.append(f"  and {_pluralize(len(groups) - MAX_GROUPS, 'group')} more")
    if num_split_groups:
        lines.append(
            f"{_pluralize(num_split_groups, 'group')} with images of both splits, training and "
            "validation"
        )
    if num_plain := int((~hashes.has_hash).sum()) - len(hashes.errors):
        lines.append(f"Too uniform to compare: {_pluralize(num_plain, 'image')}")
    if hashes.errors:
        lines.append(f"Cannot be decoded: {_pluralize(len(hashes.errors), 'image')}")
        lines += [
            f"  {_shorten(source.name(i))}: {reason}"
            for i, reason in list(hashes.errors.items())[:MAX_EXAMPLES]
        ]
    return "\n".join(lines)


def _pluralize(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"


# --- bars -----------------------------------------------------------------------------------------


def _bin_labels(histogram: Histogram) -> list[str]:
    return [
        f"{low}" if low == high - 1 else f"{low} – {high - 1}"
        for low, high in zip(histogram.edges, histogram.edges[1:])
    ]


def _format_ratio(ratio: Fraction) -> str:
    text = f"{ratio.numerator}:{ratio.denominator}"
    return (
        f"≤ {text}"
        if ratio == ASPECT_RATIOS[0]
        else f"≥ {text}"
        if ratio == ASPECT_RATIOS[-1]
        else text
    )


def _format_bars(labels: Sequence[str], counts: Sequence[int]) -> str:
    """Format a line per count: its label, the count, its fraction, and a proportional bar.

    Every count above 0 has a visible bar.
    """
    total, max_count = sum(counts), max(counts)
    rows = [
        (f"  {label}", f"{count:,}", f"{count / total:.1%}") for label, count in zip(labels, counts)
    ]
    bars = [
        _format_bar(max(round(8 * BAR_WIDTH * count / max_count), count > 0)) for count in counts
    ]
    width = max(len(label) for label in labels) + 2
    return format_table(
        [
            (f"{label:>{width}}", *cells, bar)
            for (label, *cells), bar in zip(_align_right(rows), bars)
        ],
        num_text_columns=4,
    )


def _align_right(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [tuple(f"{cell:>{width}}" for cell, width in zip(row, widths)) for row in rows]


def _format_bar(eighths: int) -> str:
    full_blocks, remainder = divmod(int(eighths), 8)
    return "█" * full_blocks + BAR_EIGHTHS[remainder].strip()


def _shorten(name: str) -> str:
    """Return the end of a long name, which is more specific than its beginning."""
    return repr(name if len(name) <= MAX_NAME_LENGTH else "…" + name[1 - MAX_NAME_LENGTH :])
