"""Read batches of images from JPEG files: `radiance` beside grain and PyTorch's DataLoader.

    python -m benchmarks.reading --processes 0 2
    python -m benchmarks.reading --size 1024x768 --resolution 512          (images are downscaled)

The files are generated: photograph-like, of one size. Every row reads the same files in random
order, decodes them, resizes them to cover a square (Lanczos), crops, and returns batches of
bytes. `radiance` also handles orientation, profiles, transparency and broken files, reads
captions from its dataset index and encodes them (with the hash encoder), and lets the JPEG
decoder do part of the scaling. Each row starts anew in every round, and the clock starts when all
its processes run. The limit is decoding, resizing and cropping alone, in as many processes as
there are cores.
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
    parser = measure.make_parser(__doc__)
    parser.add_argument("--images", type=int, default=256, help="files; default: %(default)s")
    parser.add_argument("--size", default="640x480", help="of the files; default: %(default)s")
    parser.add_argument(
        "--resolution", type=int, default=256, help="of the squares; default: %(default)s"
    )
    parser.add_argument("--batch", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--batches", type=int, default=12, help="timed batches; default: %(default)s"
    )
    parser.add_argument(
        "--processes",
        type=int,
        nargs="+",
        default=[0, os.cpu_count() or 1],
        help="worker processes; default: 0 and the number of cores",
    )
    options = parser.parse_args(arguments)

    report = Report("reading", arguments)
    report.write(
        f"{options.images} JPEG files of {options.size}, squares of {options.resolution}, "
        f"batches of {options.batch}; {options.batches} of them are timed."
    )
    with tempfile.TemporaryDirectory() as folder:
        files = write_images(Path(folder), options.images, *map(int, options.size.split("x")))
        rows: dict[str, Callable[[], Any]] = {}
        for count in options.processes:
            rows |= {
                f"radiance, {describe_processes(count)}": partial(
                    read_with_radiance, folder, options, count
                ),
                f"grain, {describe_processes(count)}": partial(
                    read_with_grain, files, options, count
                ),
                f"PyTorch DataLoader, {describe_processes(count)}": partial(
                    read_with_torch, files, options, count
                ),
            }
        rates, reasons = time_in_turn(rows, options)
        limit = time_decoding(files, options)
        report.write(f"Decoding alone, {os.cpu_count()} processes: {limit:.1f} images per second.")
    first = statistics.median(rates[next(iter(rows))])
    table = []
    for name in rows:
        if name not in rates:
            table.append([f"{name}: {reasons[name]}"])
            continue
        values, median = rates[name], statistics.median(rates[name])
        spread = f"{min(values):.1f} – {max(values):.1f}"
        table.append(
            [name, f"{median:.1f}", spread, f"{median / first:.2f}", f"{median / limit:.0%}"]
        )
    report.write(
        measure.format_table(["", "images/s", "spread", "× first row", "of decoding alone"], table)
    )
    if options.record:
        report.record()
    return report


def describe_processes(processes: int) -> str:
    return f"{processes} processes" if processes else "one process"


def time_in_turn(
    rows: dict[str, Callable[[], Any]], options: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Return images per second of each row in every round, and why a peer has none."""
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
                    start = time.perf_counter()
                    for _ in range(options.batches):
                        next(batches)
                    rates.setdefault(name, []).append(
                        options.batches * options.batch / (time.perf_counter() - start)
                    )
            except Exception as error:  # whatever a peer comes up with
                if name.startswith("radiance"):
                    raise
                reasons[name] = measure.describe_error(error)
    return rates, reasons


def write_images(folder: Path, count: int, width: int, height: int) -> list[str]:
    """Write files of smooth colors with some grain, which compress like photographs."""
    rng = np.random.default_rng(0)
    files = []
    for i in range(count):
        coarse = Image.fromarray(
            rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8)
        ).resize((width, height), Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (height, width, 3))
        path = folder / f"{i:05d}.jpg"
        Image.fromarray(np.clip(np.asarray(coarse) + grain, 0, 255).astype(np.uint8)).save(
            path, quality=90
        )
        path.with_suffix(".txt").write_text(f"a photograph of number {i}")
        files.append(str(path))
    return files


def load_plain(resolution: int, file: str) -> np.ndarray:
    """Load an image as most loaders do."""
    with Image.open(file) as opened:
        return resize_and_crop(opened.convert("RGB"), resolution, resolution)


@contextmanager
def read_with_radiance(
    folder: str, options: argparse.Namespace, processes: int
) -> Iterator[Iterator[Any]]:
    data = config.Data(
        source="folder", path=folder, cache_dir=f"{folder}/.cache", validation_fraction=0.0,
        resolution=options.resolution, batch_size=options.batch,
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
def read_with_grain(
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
        .map(partial(load_plain, options.resolution))
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


class TorchFiles:
    """A PyTorch dataset."""

    def __init__(self, files: list[str], resolution: int):
        self.files, self.resolution = files, resolution

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        return load_plain(self.resolution, self.files[index])


@contextmanager
def read_with_torch(
    files: list[str], options: argparse.Namespace, processes: int
) -> Iterator[Iterator[Any]]:
    import torch

    repeated = files * (
        1 + (options.batches + 2 + 2 * max(options.processes)) * options.batch // len(files)
    )
    loader = torch.utils.data.DataLoader(
        TorchFiles(repeated, options.resolution),
        options.batch,
        shuffle=True,
        num_workers=processes,
        collate_fn=np.stack,
        multiprocessing_context="spawn" if processes else None,
    )
    yield iter(loader)  # its processes end with it


def time_decoding(files: Iterable[str], options: argparse.Namespace) -> float:
    """Return images per second that all cores decode, resize and crop, doing nothing else."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        pool.map(partial(_decode, options.resolution), list(files), chunksize=8)
        start = time.perf_counter()
        count = sum(pool.map(partial(_decode, options.resolution), list(files) * 2, chunksize=8))
        return count / (time.perf_counter() - start)


def _decode(resolution: int, file: str) -> int:
    return len(load_plain(resolution, file)) // resolution


if __name__ == "__main__":
    main()
