"""Memory of the host through a run: does it grow with the steps?

    python -m benchmarks.host_memory                    # 2,000 steps of a toy, a few minutes on two cores
    python -m benchmarks.host_memory --steps 20000 --side 64

A folder of random JPEGs is trained on with the command that users type, and everything that a run does is done often: decoding, rows of
metrics, validation, images, checkpoints, and snapshots of averages. Beside it the resident memory of that process, and of those it
started, is read. *anonymous* is what no file stands behind: what leaks is there. The slope is that of a straight line through all
readings of the last three quarters of the steps.

Freed memory stays with the process (`radiance.distributed.environment.keep_memory`), so the curve is one of highest values: it climbs to a plateau.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from benchmarks import measure
from benchmarks.measure import Report
from radiance import config

READ_EVERY = 0.2  # seconds
LINES = 10  # of the table
WARM_UP = 0.25  # share of the steps that the slope leaves out
MB = 1e6


class Reading(NamedTuple):
    step: int
    resident: int  # bytes
    anonymous: int  # bytes


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.parser(__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="default: %(default)s")
    parser.add_argument(
        "--images", type=int, default=200, help="in the folder; default: %(default)s"
    )
    parser.add_argument(
        "--side",
        type=int,
        default=32,
        help="of the images that are trained on; default: %(default)s",
    )
    options = parser.parse_args(arguments)

    report = Report("host_memory", arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw_images(folder / "images", options.pictures, options.side)
        run = run_of(folder, options.steps, options.side)
        began = time.perf_counter()
        readings = watched(run, folder)
        seconds = time.perf_counter() - began
    warm = [reading for reading in readings if reading.step >= WARM_UP * options.steps]
    rows = [
        [str(r.step), f"{r.resident / MB:.1f}", f"{r.anonymous / MB:.1f}"]
        for r in spread(readings, options.steps)
    ]
    report.say(measure.table(("step", "resident MB", "anonymous MB"), rows))
    report.say(
        f"{options.steps} steps and {len(readings)} readings in {seconds:.0f} s. After step {warm[0].step} each 1,000 steps add "
        f"{slope(warm, 'resident') / MB:+.2f} MB resident, {slope(warm, 'anonymous') / MB:+.2f} MB anonymous."
    )
    if options.record:
        report.record()
    return report


def draw_images(folder: Path, count: int, side: int):
    """JPEGs of noise, of many sizes, with captions."""
    folder.mkdir()
    draw = np.random.default_rng(0)
    for i in range(count):
        height, width = draw.integers(side, 6 * side, 2)
        Image.fromarray(draw.integers(0, 256, (height, width, 3), np.uint8)).save(
            folder / f"{i}.jpg"
        )
        (folder / f"{i}.txt").write_text(f"noise number {i}\n")


def run_of(folder: Path, steps: int, side: int) -> config.Config:
    """All that a run does, twenty times or more."""
    often = max(1, steps // 20)
    model = replace(
        config.Model.from_name("nano"), hidden=64, heads=2, double_blocks=1, single_blocks=1, rope_axes=(4, 14, 14), text_dim=32,
        approximator_hidden=32,
    )  # fmt: skip
    return config.Config(
        name="run",
        output=str(folder),
        model=model,
        compute=config.Compute(dtype="float32"),
        text=config.Text(max_length=32),
        data=config.Data(source="folder", path=str(folder / "images"), validation_fraction=0.2, resolution=side, batch_size=4, crop="random", flip_probability=0.5, num_threads=2),
        optimizer=config.Optimizer(ema_widths=(0.05, 0.1)),
        train=config.Train(
            steps=steps, log_every=max(1, steps // 400), validate_every=often, validation_images=8, sample_every=often,
            sample_prompts=("noise",), checkpoint_every=often, snapshot_every=often, max_to_keep=1,
        ),
        sample=config.Sample(steps=2),
    )  # fmt: skip


def watched(run: config.Config, folder: Path) -> list[Reading]:
    """Readings from the first row of metrics to the end of the run, which is a process of its own."""
    experiment = folder / "experiment.py"
    experiment.write_text(
        f"from radiance import config as c\n\n\ndef config():\n    return c.from_json(c.Config, {config.to_json(run)!r})\n"
    )
    readings, command = [], [sys.executable, "-m", "radiance", "train", str(experiment)]
    with (
        (folder / "output.txt").open("w+") as output,
        subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        ) as process,
    ):
        try:
            while process.poll() is None:
                step = last_step(run.run_dir / "metrics.jsonl")
                resident, anonymous = (
                    sum(memory_of(p, field) for p in family(process.pid))
                    for field in ("VmRSS", "RssAnon")
                )
                if step and anonymous:
                    readings.append(Reading(step, resident, anonymous))
                time.sleep(READ_EVERY)
        finally:
            process.kill()
        output.seek(0)
        if process.returncode:
            raise SystemExit(f"The run failed:\n{output.read()}")
    return readings


def last_step(metrics: Path) -> int:
    """Of the last row that is whole; 0 before there is one."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 14)))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def family(process: int) -> list[int]:
    """A process and all that it started."""
    try:
        children = [
            int(word)
            for path in Path(f"/proc/{process}/task").glob("*/children")
            for word in path.read_text().split()
        ]
    except OSError:  # it has ended
        children = []
    return [process, *(found for child in children for found in family(child))]


def memory_of(process: int, field: str) -> int:
    """Bytes; 0 of a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        lines = []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def spread(readings: Sequence[Reading], steps: int) -> list[Reading]:
    """The first reading, and those nearest to equal parts of the steps."""
    wanted = [readings[0].step, *(steps * (i + 1) // LINES for i in range(LINES))]
    found = [min(readings, key=lambda reading: abs(reading.step - step)) for step in wanted]
    return sorted(set(found), key=found.index)


def slope(readings: Sequence[Reading], field: str) -> float:
    """Bytes that 1,000 steps add, by least squares."""
    steps, values = (
        np.array([getattr(reading, name) for reading in readings], float)
        for name in ("step", field)
    )
    steps -= steps.mean()
    return 1000 * float(steps @ values / max(steps @ steps, 1))


if __name__ == "__main__":
    main()
