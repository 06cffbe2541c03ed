"""Rank the true drawing of each held-out emoji by its distance from a sample of the model.

    python -m experiments.emoji.rank runs/emoji

Each held-out drawing whose concept is in the training split, in the other style, is drawn once from
its first caption, which names the style. All drawings of that style are then ordered by their
distance from the sample. "top 1" counts the samples that are closest to the true drawing. Beside it
are the same numbers for samples of exchanged captions, which are at chance, for the drawing in the
other style, which a model that copies would give, and for the true drawing itself.

RUN/rank.png has samples, true drawings and the drawings in the other style, in rows. Not timed.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int
from PIL import Image

import radiance
from radiance.base.errors import DataError, RadianceError
from radiance.base.images import make_contact_sheet, save_png, to_array, to_image, to_signed
from radiance.base.tables import format_table
from radiance.data.datasets import open_source
from radiance.data.source import Source
from radiance.evaluation.features import Extractor, PixelExtractor, RandomNetworkExtractor

SHEET_COLUMNS, SHEET_SCALE = 16, 3


class Drawing(NamedTuple):
    """An emoji in one style."""

    code: str  # code points in hexadecimal: the same for both styles
    style: str
    caption: str  # the first one, which names the style
    pixels: np.ndarray


def read_drawings(source: Source, resolution: int) -> list[Drawing]:
    """Read all drawings of a split."""
    drawings = []
    for index in range(len(source)):
        address = source.address(index)
        assert address is not None
        path = Path(address)
        pixels = to_array(source.load_image(index), resolution, resolution)
        drawings.append(Drawing(path.stem, path.parent.name, source.captions(index)[0], pixels))
    return drawings


def rank_true_drawings(
    queries: Float32[np.ndarray, "n d"],
    references: Float32[np.ndarray, "m d"],
    true_indices: Int[np.ndarray, " n"],
) -> Int[np.ndarray, " n"]:
    """Return how many references are closer to each query than the true one.

    Args:
        queries: Features of the images that are compared.
        references: Features of all drawings of a style.
        true_indices: Index of the true drawing among the references.
    """
    squared = np.square(queries[:, None] - references).sum(axis=-1, dtype=np.float64)
    return (squared < np.take_along_axis(squared, true_indices[:, None], axis=1)).sum(axis=1)


def measure_ranks(
    images: Float[np.ndarray, "n height width 3"],
    targets: list[Drawing],
    drawings: list[Drawing],
    extractor: Extractor,
) -> Int[np.ndarray, " n"]:
    """Return the rank of each target's drawing among all drawings of its style; 0 is the best.

    Args:
        images: The images that are compared, in [-1, 1].
        targets: The true drawing of each image.
        drawings: All drawings of both styles.
        extractor: The function from images to features.
    """
    ranks = np.zeros(len(targets), int)
    for style in sorted({target.style for target in targets}):
        candidates = [drawing for drawing in drawings if drawing.style == style]
        indices = {drawing.code: i for i, drawing in enumerate(candidates)}
        rows = [i for i, target in enumerate(targets) if target.style == style]
        ranks[rows] = rank_true_drawings(
            extractor(images[rows]),
            extractor(_to_batch(candidates)),
            np.array([indices[targets[i].code] for i in rows]),
        )
    return ranks


def _to_batch(drawings: list[Drawing]) -> Float32[np.ndarray, "n height width 3"]:
    return to_signed(np.stack([drawing.pixels for drawing in drawings]))


def compare(run_dir: Path, num_images: int) -> str:
    """Sample the held-out drawings, write rank.png and rank.json, and return the table.

    Args:
        run_dir: A run of experiments/emoji/experiment.py.
        num_images: Maximum number of held-out drawings.

    Raises:
        DataError: No held-out drawing has its concept in the training split.
    """
    pipeline = radiance.load(run_dir)
    data = pipeline.run.data
    training = read_drawings(open_source(data, "train", verbose=False), data.resolution)
    held_out = read_drawings(open_source(data, "validation", verbose=False), data.resolution)
    seen = {drawing.code: drawing for drawing in training}
    targets = [drawing for drawing in held_out if drawing.code in seen][:num_images]
    if len(targets) < 2:
        raise DataError(f"{data.path} has fewer than two held-out drawings of known concepts.")

    captions = [target.caption for target in targets]
    exchanged = [*captions[1:], captions[0]]
    sheets = {
        "sample": _sample(pipeline, captions),
        "sample of an exchanged caption": _sample(pipeline, exchanged),
        "drawing in the other style": [to_image(seen[t.code].pixels) for t in targets],
        "true drawing": [to_image(target.pixels) for target in targets],
    }
    _write_sheet(run_dir / "rank.png", sheets, captions)

    drawings = [*training, *held_out]
    chance = float(np.mean([1 / sum(d.style == t.style for d in drawings) for t in targets]))
    rows, results = [["image", "features", "top 1", "top 5", "median rank"]], []
    for name, images in sheets.items():
        batch = to_signed(np.stack([np.asarray(image) for image in images]))
        for extractor in (PixelExtractor(), RandomNetworkExtractor()):
            ranks = measure_ranks(batch, targets, drawings, extractor)
            top_1, top_5 = float((ranks < 1).mean()), float((ranks < 5).mean())
            median = float(np.median(ranks))
            rows.append([name, extractor.name, f"{top_1:.1%}", f"{top_5:.1%}", f"{median:g}"])
            results.append(
                {
                    "image": name,
                    "features": extractor.name,
                    "top_1": top_1,
                    "top_5": top_5,
                    "median_rank": median,
                }
            )
    rows.append(["chance", "", f"{chance:.1%}", f"{5 * chance:.1%}", f"{0.5 / chance:.0f}"])
    summary = {"images": len(targets), "chance": chance, "results": results}
    (run_dir / "rank.json").write_text(json.dumps(summary, indent=2), "utf-8")
    return f"{len(targets)} held-out drawings\n{format_table(rows, num_text_columns=2)}"


def _sample(pipeline: radiance.Pipeline, captions: list[str]) -> list[Image.Image]:
    return [generated.image for generated in pipeline(captions, seeds=range(len(captions)))]


def _write_sheet(path: Path, sheets: dict[str, list[Image.Image]], captions: list[str]):
    """Write samples, true drawings and drawings in the other style, in rows below each other."""
    names = ("sample", "true drawing", "drawing in the other style")
    cells = []
    for start in range(0, len(captions), SHEET_COLUMNS):
        for name in names:
            row = sheets[name][start : start + SHEET_COLUMNS]
            blank = Image.new("RGB", row[0].size, "white")
            cells += [*row, *[blank] * (SHEET_COLUMNS - len(row))]
    size = tuple(SHEET_SCALE * side for side in cells[0].size)
    scaled = [cell.resize(size, Image.Resampling.NEAREST) for cell in cells]
    save_png(path, make_contact_sheet(scaled, SHEET_COLUMNS), {"captions": captions})


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--images", type=int, default=256, help="maximum number (default: 256)")
    options = parser.parse_args(arguments)
    try:
        print(compare(options.run, options.images))
    except RadianceError as e:
        print(f"rank: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
