"""A survey of data in words, tables and bars."""

import textwrap
from collections.abc import Mapping, Sequence
from fractions import Fraction

from radiance import config
from radiance.data.datasets import EXAMPLES, Source, title
from radiance.data.duplicates import Group, Hashed
from radiance.data.survey import PROPORTIONS, Histogram, Survey
from radiance.weights.convert import table

COLUMNS = 100
BAR = 50  # of them
EIGHTHS = " ▏▎▍▌▋▊▉"
NAMES = 24  # characters of a name
SHOWN = 5  # groups of duplicates


def told_data(run: config.Config, splits: Mapping[str, Source | str], survey: Survey) -> str:
    """splits: what is in them, or why nothing is."""
    return "\n\n".join(
        [
            _settings(run),
            _splits(splits),
            *([_parts(run, survey)] if len(survey.parts) > 1 else []),
            "Sides in pixels, of a square of as many\n" + _bars(_labels(survey.sides), survey.sides.counts),
            "Width to height\n" + _bars([_ratio(ratio) for ratio in survey.proportions], list(survey.proportions.values())),
            _shapes(run, survey),
            _captions(run, survey),
            _programs(survey),
        ]
    )


def _settings(run: config.Config) -> str:
    data = run.data
    sides = " and ".join(map(str, data.sides))
    shapes = f"buckets in steps of {data.bucket_step}" if data.bucket_step else "squares alone"
    told = f"{run.data.source} {run.data.path}".strip()
    return f"{told}\nside {sides}, {shapes}, {data.batch} pictures a batch; text {run.text.encoder}, {run.text.length} tokens"


def _splits(splits: Mapping[str, Source | str]) -> str:
    opened = {name: split for name, split in splits.items() if not isinstance(split, str)}
    rows, names = [("", *(f"{name:>10}" for name in opened)), ("pictures", *(f"{len(split):,}" for split in opened.values()))], []
    for kind in sorted(set().union(*(split.skipped for split in opened.values()))):
        rows.append((f"left out: {kind}", *(f"{split.skipped.get(kind, 0):,}" for split in opened.values())))
        names.append([name for split in opened.values() for name in split.examples.get(kind, ())][:EXAMPLES])
    first, second, *others = table(rows, left=1).split("\n")
    told = [f"{line}\n  {', '.join(map(_short, some))}" for line, some in zip(others, names)]
    return "\n".join([first, second, *told, *(_wrapped(split) for split in splits.values() if isinstance(split, str))])


def _wrapped(sentence: str) -> str:
    return textwrap.fill(sentence, COLUMNS, break_long_words=False, break_on_hyphens=False)


def _parts(run: config.Config, survey: Survey) -> str:
    rows = [("Parts of the mixture", "pictures", "share", "seen in an epoch", "turns")]
    for part, (pictures, share, seen) in zip(run.data.parts, survey.parts):
        rows.append((_short(title(part)), f"{pictures:,}", f"{share:.1%}", f"{seen:,}", f"{seen / pictures:.2f}"))
    return table(rows, left=1)


def _shapes(run: config.Config, survey: Survey) -> str:
    rest = {"carry": "carried over", "fill": "in a filled one", "drop": "dropped"}[run.data.remainder]
    rows = [("Shapes of an epoch", "pictures", "batches", rest)]
    rows += [(f"{shape.width} × {shape.height}", *(f"{number:,}" for number in shape[2:])) for shape in survey.shapes]
    if len(survey.shapes) > 1:
        rows.append(("together", *(f"{sum(numbers):,}" for numbers in list(zip(*survey.shapes))[2:])))
    lines = [table(rows, left=1)]
    if survey.enlarged:
        lines.append(f"Enlarged: {_many(survey.enlarged, 'picture')}, {survey.largest:.2f} times at most")
    if run.data.remainder == "drop" and not any(shape.batches for shape in survey.shapes):
        lines.append(f"No shape fills a batch of {run.data.batch}, so nothing is left to train on: use data.remainder=carry or fill.")
    return "\n".join(lines)


def _captions(run: config.Config, survey: Survey) -> str:
    found, limit = survey.captions, run.text.length
    several = f"{found.fewest}" if found.fewest == found.most else f"{found.fewest} to {found.most}"
    labels = _labels(found.lengths)
    if found.cut:
        labels[-1] = f"over {limit}"
    lengths = ", ".join(f"{share} % have up to {length}" for share, length in found.shares.items() if share < 100)
    lines = [
        f"Tokens of {found.count:,} captions, {several} a picture, with the end of the sequence",
        _bars(labels, found.lengths.counts),
        f"{lengths}; the longest has {found.shares[100]}",
    ]
    if found.cut:
        lines.append(f"Longer than text.length={limit}, and cut: {_many(found.cut, 'caption')} ({found.cut / found.count:.1%})")
    if found.tagged:
        median, most = found.tags
        lines.append(f"With tags: {_many(found.tagged, 'picture')}, {median} tags in the median caption and {most} at most")
    low, mean, high = survey.weights
    if (low, high) != (1.0, 1.0):
        lines.append(f"Weights of losses: {low:g} to {high:g}, {mean:.3g} on average")
    return "\n".join(lines)


def _programs(survey: Survey) -> str:
    shapes, widths = _many(len(survey.shapes), "shape"), _many(len(survey.widths), "text width")
    return f"Programs to compile, at most: {survey.programs} = {shapes} × {widths} ({', '.join(map(str, survey.widths))} tokens)"


def told_duplicates(whole: Source, held_out_from: int, found: Hashed, groups: Sequence[Group], distance: int) -> str:
    """held_out_from: the number of the first picture of the validation split."""
    more = sum(len(group.others) for group in groups)
    across = sum(min(group.kept, *group.others) < held_out_from <= max(group.kept, *group.others) for group in groups)
    lines = [
        f"Near-duplicates, at most {distance} of 64 bits apart: {_many(more, 'picture')} like a larger one, of {_many(len(groups), 'group')}"
    ]
    for group in groups[:SHOWN]:
        members = [f"{_short(whole.name(i))} {'×'.join(map(str, whole.sizes[i]))}" for i in (group.kept, *group.others)]
        lines.append("  " + ", ".join(members[:2]) + (f" and {len(members) - 2:,} more" if len(members) > 2 else ""))
    if len(groups) > SHOWN:
        lines.append(f"  and {_many(len(groups) - SHOWN, 'group')} more")
    if across:
        lines.append(f"Of {_many(across, 'group')} some pictures are held out and others trained on.")
    if plain := int((~found.told).sum()) - len(found.broken):
        lines.append(f"Too plain to be compared: {_many(plain, 'picture')}")
    if found.broken:
        lines.append(f"Cannot be decoded: {_many(len(found.broken), 'picture')}")
        lines += [f"  {_short(whole.name(i))}: {reason}" for i, reason in list(found.broken.items())[:EXAMPLES]]
    return "\n".join(lines)


def _many(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


# --- bars ---------------------------------------------------------------------------------------------------------------


def _labels(histogram: Histogram) -> list[str]:
    return [f"{a}" if a == b - 1 else f"{a} – {b - 1}" for a, b in zip(histogram.edges, histogram.edges[1:])]


def _ratio(ratio: Fraction) -> str:
    told = f"{ratio.numerator}:{ratio.denominator}"
    return f"≤ {told}" if ratio == PROPORTIONS[0] else f"≥ {told}" if ratio == PROPORTIONS[-1] else told


def _bars(labels: Sequence[str], counts: Sequence[int]) -> str:
    """A line each: the label, the count, its share, and a bar in proportion to it; any count that is not 0 has something of a bar."""
    total, longest = sum(counts), max(counts)
    rows = [(f"  {label}", f"{count:,}", f"{count / total:.1%}") for label, count in zip(labels, counts)]
    bars = [_bar(max(round(8 * BAR * count / longest), count > 0)) for count in counts]
    width = max(len(label) for label in labels) + 2
    return table([(f"{label:>{width}}", *numbers, bar) for (label, *numbers), bar in zip(_right(rows), bars)], left=4)


def _right(rows: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [tuple(f"{cell:>{width}}" for cell, width in zip(row, widths)) for row in rows]


def _bar(eighths: int) -> str:
    whole, rest = divmod(int(eighths), 8)
    return "█" * whole + EIGHTHS[rest].strip()


def _short(name: str) -> str:
    """The end of a long name, which says more than its beginning."""
    return repr(name if len(name) <= NAMES else "…" + name[1 - NAMES :])
