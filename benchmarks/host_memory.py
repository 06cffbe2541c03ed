"""Does the memory of the host grow with the steps of a run?

    python -m benchmarks.host_memory                    (2,000 steps of a toy, minutes on two cores)
    python -m benchmarks.host_memory --steps 20000 --resolution 64

A folder of random JPEGs is trained on with the command that users type, and everything a run does
is done often: decoding, metrics, validation, samples, checkpoints, and EMA snapshots. Meanwhile
the resident memory of the process and its children is read. *anonymous* memory is backed by no
file: leaks are there. The slope is that of a straight line through all readings of the last three
quarters of the steps. Freed memory stays with the process
(`radiance.distributed.environment.retain_freed_memory`), so the curve climbs to a plateau.
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

READ_INTERVAL = 0.2  # seconds
NUM_TABLE_ROWS = 10  # rows of the table
WARM_UP_FRACTION = 0.25  # fraction of the steps that the slope ignores
MB = 1e6


class Reading(NamedTuple):
    step: int
    resident: int  # bytes
    anonymous: int  # bytes


def main(arguments: Sequence[str] | None = None) -> Report:
    parser = measure.make_parser(__doc__)
    parser.add_argument("--steps", type=int, default=2000, help="default: %(default)s")
    parser.add_argument(
        "--images", type=int, default=200, help="in the folder; default: %(default)s"
    )
    parser.add_argument(
        "--resolution",
        type=int,
        default=32,
        help="of the images that are trained on; default: %(default)s",
    )
    options = parser.parse_args(arguments)

    report = Report("host_memory", arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images", options.images, options.resolution)
        run = make_run(folder, options.steps, options.resolution)
        start = time.perf_counter()
        readings = watch_run(run, folder)
        seconds = time.perf_counter() - start
    warm = [reading for reading in readings if reading.step >= WARM_UP_FRACTION * options.steps]
    rows = [
        [str(r.step), f"{r.resident / MB:.1f}", f"{r.anonymous / MB:.1f}"]
        for r in select_readings(readings, options.steps)
    ]
    report.write(measure.format_table(("step", "resident MB", "anonymous MB"), rows))
    report.write(
        f"{options.steps} steps and {len(readings)} readings in {seconds:.0f} s. "
        f"After step {warm[0].step} each 1,000 steps add "
        f"{fit_slope(warm, 'resident') / MB:+.2f} MB resident, "
        f"{fit_slope(warm, 'anonymous') / MB:+.2f} MB anonymous."
    )
    if options.record:
        report.record()
    return report


def write_images(folder: Path, count: int, resolution: int):
    """Write JPEGs of noise in many sizes, with captions."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        height, width = rng.integers(resolution, 6 * resolution, 2)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(
            folder / f"{i}.jpg"
        )
        (folder / f"{i}.txt").write_text(f"noise number {i}\n")


def make_run(folder: Path, steps: int, resolution: int) -> config.Config:
    """Return a run that does everything twenty times or more."""
    often = max(1, steps // 20)
    model = replace(
        config.Model.from_name("nano"), hidden=64, heads=2, double_blocks=1, single_blocks=1,
        rope_axes=(4, 14, 14), text_dim=32,
        approximator_hidden=32,
    )  # fmt: skip
    return config.Config(
        name="run",
        output=str(folder),
        model=model,
        compute=config.Compute(dtype="float32"),
        text=config.Text(max_length=32),
        data=config.Data(
            source="folder", path=str(folder / "images"), validation_fraction=0.2, num_threads=2,
            resolution=resolution, batch_size=4, crop="random", flip_probability=0.5,
        ),
        optimizer=config.Optimizer(ema_widths=(0.05, 0.1)),
        train=config.Train(
            steps=steps, log_every=max(1, steps // 400), validate_every=often, validation_images=8,
            sample_every=often,
            sample_prompts=("noise",), checkpoint_every=often, snapshot_every=often, max_to_keep=1,
        ),
        sample=config.Sample(steps=2),
    )  # fmt: skip


def watch_run(run: config.Config, folder: Path) -> list[Reading]:
    """Run in a process of its own; read memory from the first row of metrics to the end."""
    experiment = folder / "experiment.py"
    experiment.write_text(
        "from radiance import config as c\n\n\ndef config():\n"
        f"    return c.from_json(c.Config, {config.to_json(run)!r})\n"
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
                step = read_last_step(run.run_dir / "metrics.jsonl")
                resident, anonymous = (
                    sum(read_memory(p, field) for p in list_processes(process.pid))
                    for field in ("VmRSS", "RssAnon")
                )
                if step and anonymous:
                    readings.append(Reading(step, resident, anonymous))
                time.sleep(READ_INTERVAL)
        finally:
            process.kill()
        output.seek(0)
        if process.returncode:
            raise SystemExit(f"The run failed:\n{output.read()}")
    return readings


def read_last_step(metrics: Path) -> int:
    """Return the step of the last complete row; 0 before there is one."""
    if not metrics.exists():
        return 0
    with metrics.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - (1 << 14)))
        lines = file.read().split(b"\n")[:-1]
    return json.loads(lines[-1])["step"] if lines else 0


def list_processes(process: int) -> list[int]:
    """List a process and all its descendants."""
    try:
        children = [
            int(word)
            for path in Path(f"/proc/{process}/task").glob("*/children")
            for word in path.read_text().split()
        ]
    except OSError:  # it has ended
        children = []
    return [process, *(pid for child in children for pid in list_processes(child))]


def read_memory(process: int, field: str) -> int:
    """Return bytes; 0 for a process that has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        lines = []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def select_readings(readings: Sequence[Reading], steps: int) -> list[Reading]:
    """Select the first reading, and those nearest to equal parts of the steps."""
    wanted = [readings[0].step, *(steps * (i + 1) // NUM_TABLE_ROWS for i in range(NUM_TABLE_ROWS))]
    nearest = [min(readings, key=lambda reading: abs(reading.step - step)) for step in wanted]
    return sorted(set(nearest), key=nearest.index)


def fit_slope(readings: Sequence[Reading], field: str) -> float:
    """Fit the bytes that 1,000 steps add, by least squares."""
    steps, values = (
        np.array([getattr(reading, name) for reading in readings], float)
        for name in ("step", field)
    )
    steps -= steps.mean()
    return 1000 * float(steps @ values / max(steps @ steps, 1))


if __name__ == "__main__":
    main()
