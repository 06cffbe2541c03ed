"""Batches of images from JPEG files: `radiance` beside grain and PyTorch's DataLoader, and beside what decoding alone takes.

    python -m benchmarks.reading --processes 0 2
    python -m benchmarks.reading --size 1024x768 --side 512          # images that are scaled down

The files are made for the occasion: photograph-like, of one size. Every row reads the same files in a random order, decodes them, scales
them to cover a square (Lanczos) and cuts it, and gives batches of bytes. What differs: `radiance` also minds turns, profiles, transparency
and broken files, reads captions from its dataset index and encodes them (with the hash encoder), and lets JPEG's decoder do part of the scaling. Each
row starts anew in every round, and the clock begins when all its processes have. The limit is decoding, scaling and cutting in as many
processes as there are cores, with nothing around it.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import measure
from benchmarks.measure import Report
from radiance import config
from radiance.base.images import resize_and_crop
from radiance.data.batches import Batches
from radiance.data.datasets import open_source
from radiance.text.hash_encoder import HashEncoder


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="files; default: %(default)s")
    parser.add_argument("--size", default="640x480", help="of the files; default: %(default)s")
    parser.add_argument(
        "--side", type=int, default=256, help="of the squares; default: %(default)s"
    )
    parser.add_argument("--batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--batches", type=int, default=12, help="that are timed; default: %(default)s"
    )
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[0, os.cpu_count() or 1],
        help="beside the reader's; default: 0 and the cores",
    )
    options = parser.parse_args(arguments)

    report = Report("reading", arguments)
    report.say(
        f"{options.pictures} JPEG files of {options.size}, squares of {options.side}, batches of {options.batch}; {options.batches} of them are timed."
    )
    with tempfile.TemporaryDirectory() as folder:
        files = write(Path(folder), options.pictures, *map(int, options.size.split("x")))
        rows: dict[str, Callable[[], Any]] = {}
        for count in options.processes:
            rows |= {
                f"radiance, {told(count)}": partial(ours, folder, options, count),
                f"grain, {told(count)}": partial(of_grain, files, options, count),
                f"PyTorch DataLoader, {told(count)}": partial(of_torch, files, options, count),
            }
        rates, reasons = race(rows, options)
        report.say(
            f"Decoding alone, {os.cpu_count()} processes: {(limit := alone(files, options)):.1f} images a second."
        )
    first = statistics.median(rates[next(iter(rows))])
    table = [
        [name, f"{statistics.median(r):.1f}", f"{min(r):.1f} – {max(r):.1f}", f"{statistics.median(r) / first:.2f}", f"{statistics.median(r) / limit:.0%}"]
        if (r := rates.get(name)) else [f"{name}: {reasons[name]}"]
        for name in rows
    ]  # fmt: skip
    report.say(measure.table(["", "images/s", "spread", "× first row", "of decoding alone"], table))
    if options.record:
        report.record()
    return report


def told(processes: int) -> str:
    return f"{processes} processes" if processes else "one process"


def race(
    rows: dict[str, Callable[[], Any]], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Images a second of each row in every round, all rows in turn; and why a peer has none."""
    rates: dict[str, list[float]] = {}
    reasons: dict[str, str] = {}
    for _ in range(options.repeats):
        for name, make in rows.items():
            if name in reasons:
                continue
            try:
                with make() as batches:
                    for _ in range(2 + 2 * max(options.processes)):  # until every process has begun
                        next(batches)
                    began = time.perf_counter()
                    for _ in range(options.batches):
                        next(batches)
                    rates.setdefault(name, []).append(
                        options.batches * options.batch / (time.perf_counter() - began)
                    )
            except Exception as error:  # whatever a peer comes up with
                if name.startswith("radiance"):
                    raise
                reasons[name] = measure.told(error)
    return rates, reasons


def write(folder: Path, count: int, width: int, height: int) -> list[str]:
    """Files of smooth colors with some grain, which compress about as photographs do."""
    draw = np.random.default_rng(0)
    files = []
    for i in range(count):
        coarse = Image.fromarray(
            draw.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        ).resize((width, height), Image.Resampling.BICUBIC)
        grain = draw.normal(0, 6, (height, width, 3))
        path = folder / f"{i:05d}.jpg"
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(
            path, quality=90
        )
        path.with_suffix(".txt").write_text(f"a photograph of number {i}")
        files.append(str(path))
    return files


def plain(side: int, file: str) -> np.ndarray:
    """An image as most loaders read it."""
    with Image.open(file) as opened:
        return resize_and_crop(opened.convert("RGB"), side, side)


@contextmanager
def ours(folder: str, options: argparse.Namespace, processes: int) -> Iterator[Iterator[Any]]:
    data = config.Data(
        source="folder", path=folder, cache_dir=f"{folder}/.dataset indexes", validation_fraction=1e-9, resolution=options.side, batch_size=options.batch,
        num_workers=processes, num_threads=1 if processes else os.cpu_count() or 1,
    )  # fmt: skip
    feed = Batches(
        open_source(data, "train"), data, HashEncoder(64, 64), 0, 1 << 30, "one_pad"
    ).start(0)
    try:
        yield feed
    finally:
        feed.close()


@contextmanager
def of_grain(
    files: list[str], options: argparse.Namespace, processes: int
) -> Iterator[Iterator[Any]]:
    import absl.flags
    import grain

    absl.flags.FLAGS.mark_as_parsed()
    images = (
        grain.MapDataset.source(files)
        .seed(0)
        .shuffle()
        .repeat()
        .map(partial(plain, options.side))
        .batch(options.batch)
    )
    threads = 1 if processes else os.cpu_count() or 1
    feed: Any = images.to_iter_dataset(
        grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    )
    if processes:
        feed = feed.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=processes, per_worker_buffer_size=2)
        )
    feed = iter(feed)
    try:
        yield feed
    finally:
        feed.close()


class Files:
    """A PyTorch data set."""

    def __init__(self, files: list[str], side: int):
        self.files, self.side = files, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        return plain(self.side, self.files[index])


@contextmanager
def of_torch(
    files: list[str], options: argparse.Namespace, processes: int
) -> Iterator[Iterator[Any]]:
    import torch

    repeated = files * (
        1 + (options.batches + 2 + 2 * max(options.processes)) * options.batch // len(files)
    )
    loader = torch.utils.data.DataLoader(
        Files(repeated, options.side), options.batch, shuffle=True, num_workers=processes, collate_fn=np.stack, multiprocessing_context="spawn" if processes else None
    )  # fmt: skip
    yield iter(loader)  # whose processes end with it


def alone(files: Iterable[str], options: argparse.Namespace) -> float:
    """Images a second that all cores decode, scale and cut when that is all they do."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(partial(_through, options.side), list(files), chunksize=8)
        began = time.perf_counter()
        count = sum(pool.map(partial(_through, options.side), list(files) * 2, chunksize=8))
        return count / (time.perf_counter() - began)


def _through(side: int, file: str) -> int:
    return len(plain(side, file)) // side


if __name__ == "__main__":
    main()
