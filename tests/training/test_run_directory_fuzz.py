"""Mutated files of run directories and results give one sentence, and never hang.

RADIANCE_FUZZ is the number of mutations, and RADIANCE_FUZZ_SEED their seed.
"""

import io
import json
import os
import shutil
import time
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import numpy as np
import pytest

from radiance import config
from radiance.ablation.results import read_result
from radiance.base.errors import RadianceError
from radiance.base.locks import hold_lock
from radiance.evaluation import report
from radiance.evaluation.run_curves import ReportRun
from radiance.loading import restore_run_weights
from radiance.training import trajectories
from radiance.training.resumption import check_resumable
from radiance.training.run_directory import RunDirectory, is_run_directory
from radiance.training.trajectories import TrajectoryMetadata, resolve_segments
from tests.helpers.toy_runs import PLAIN, toy_run, train

MUTATIONS = int(os.environ.get("RADIANCE_FUZZ", 400))
SEED = int(os.environ.get("RADIANCE_FUZZ_SEED", 0))
MAX_SECONDS = 20.0  # of one mutation, of which none should take one
RESULT = Path(__file__).parents[2] / "experiments/ablations/results/masking/smoke/off.json"
HUGE = (2**70, 10**400, 1e999, float("nan"), "x" * 9999)
ODD = (None, True, -1, 0, 1.5, "", "\0", "\ud800", "../..", [], {}, [[]], {"a": {}}, ["a"])
VALUES = (*HUGE, *ODD)

pytestmark = pytest.mark.slow


# --- mutations ------------------------------------------------------------------------------------


def mutate_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    start, end = sorted(rng.integers(0, len(content) + 1, 2))
    match rng.integers(0, 8):
        case 0:
            return content[:start]
        case 1:
            return content[:start] + content[end:]
        case 2:
            return content[:start] + bytes(end - start) + content[end:]
        case 3:
            return content[:start] + rng.bytes(int(rng.integers(1, 9))) + content[start:]
        case 4:
            return content[:start] + content[start:end] * 3 + content[end:]
        case 5:
            return b"[" * 100_000 + content
        case 6:
            return rng.bytes(int(rng.integers(0, 99)))
    flipped = bytearray(content)
    for position in rng.integers(0, max(len(content), 1), 3) if content else ():
        flipped[position] ^= 1 << int(rng.integers(0, 8))
    return bytes(flipped)


def mutate_value(value, rng: np.random.Generator):
    """Replace, remove or add a value somewhere in a tree of JSON."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = sorted(value)[rng.integers(0, len(value))]
        if rng.random() < 0.15:
            return {key: x for key, x in value.items() if key != name}
        return value | {name: mutate_value(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        i = int(rng.integers(0, len(value)))
        return [*value[:i], mutate_value(value[i], rng), *value[i + 1 :]]
    return VALUES[rng.integers(0, len(VALUES))]


def mutate_file(path: Path, rng: np.random.Generator):
    content = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and rng.random() < 0.6:
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        i = int(rng.integers(0, len(lines)))
        lines[i] = json.dumps(mutate_value(json.loads(lines[i]), rng)).encode()
        path.write_bytes(b"\n".join(lines) + b"\n")
    else:
        path.write_bytes(mutate_bytes(content, rng))


# --- readers --------------------------------------------------------------------------------------


def read_run(folder: Path, run: config.Config):
    """Call all readers of small files; a damaged file may stop each of them with one sentence."""
    directory = RunDirectory(folder)
    for read in (
        lambda: is_run_directory(folder),
        directory.read_config,
        directory.read_data,
        directory.read_metrics,
        directory.read_last_validation_loss,
        directory.read_base_identity,
        lambda: check_resumable(directory, run, json.loads((folder / "expected.json").read_text())),
        lambda: directory.truncate_metrics(4),
        lambda: directory.write_metadata(run, {}, 4),
        lambda: read_result(folder / "result.json"),
        lambda: resolve_segments(folder, METADATA),
        lambda: format_report(directory, run),
        lambda: lock(folder),
    ):
        try:
            read()
        except RadianceError as error:
            message = str(error)
            assert "\n" not in message, message
            assert 20 < len(message) < 2000, message


def lock(folder: Path):
    with hold_lock(folder / ".lock", "The run", "Wait."):
        pass


def format_report(directory: RunDirectory, run: config.Config):
    """Format all of a report but the curves, which take a second."""
    report_run = ReportRun("run", directory, run, directory.read_metrics(), "#000000")
    report._format_overview([report_run])
    report._format_validation_bins([report_run])
    report._format_samples([report_run])
    report._format_skipped([report_run])
    report._format_provenance(report_run)


METADATA = TrajectoryMetadata("teacher", {}, 2, 8, 1.0, {}, {}, "hash", 8, {})


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data_directory):
    run = toy_run(
        tmp_path_factory.mktemp("trained"), data_directory, "train.steps=4",
        "train.checkpoint_every=2", **PLAIN,
    )  # fmt: skip
    assert train(run) == 4
    folder = run.run_dir
    shutil.copy(folder / "data.json", folder / "expected.json")
    shutil.copy(RESULT, folder / "result.json")
    (folder / trajectories.METADATA_FILE).write_text(json.dumps(METADATA._asdict()))
    lock_fields = {"host": "h", "pid": 1, "start": "2026", "command": "radiance"}
    (folder / ".lock").write_text(json.dumps(lock_fields))
    os.utime(folder / ".lock", (0, 0))
    from PIL import Image, PngImagePlugin

    (folder / "samples").mkdir(exist_ok=True)
    info = PngImagePlugin.PngInfo()
    info.add_text("prompts", '["one", "two"]')
    Image.new("RGB", (16, 8)).save(folder / "samples" / "00000004.png", pnginfo=info)
    return run


def test_small_files(trained, tmp_path, monkeypatch):
    from radiance.base import locks

    monkeypatch.setattr(locks, "OBSERVATION_SECONDS", 0.01)
    monkeypatch.setattr("radiance.training.run_directory.describe_environment", dict)
    files = sorted(
        path.relative_to(trained.run_dir)
        for path in trained.run_dir.rglob("*")
        if path.is_file() and "checkpoints" not in path.parts and path.name != "expected.json"
    )
    for number in range(MUTATIONS):
        rng = np.random.default_rng((SEED, number))
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(
            trained.run_dir, folder, ignore=shutil.ignore_patterns("checkpoints", "report.html")
        )
        for file in rng.choice(
            [str(file) for file in files], int(rng.integers(1, 3)), replace=False
        ):
            if (folder / file).is_file():
                mutate_file(folder / file, rng)
        start = time.monotonic()
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            try:
                read_run(folder, trained)
            except Exception as error:
                raise AssertionError(f"mutation {number} of seed {SEED}") from error
        assert time.monotonic() - start < MAX_SECONDS, number


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_files_of_checkpoints(trained, tmp_path):
    run = config.override(trained, ["sample.weights=params"])
    for number in range(max(MUTATIONS // 20, 5)):
        rng = np.random.default_rng((SEED, number))
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(trained.run_dir, folder)
        files = sorted(path for path in (folder / "checkpoints").rglob("*") if path.is_file())
        for file in rng.choice([str(file) for file in files], 2, replace=False):
            if rng.random() < 0.2:
                Path(file).unlink(missing_ok=True)
            elif Path(file).is_file():
                mutate_file(Path(file), rng)
        start = time.monotonic()
        with redirect_stdout(io.StringIO()), suppress(RadianceError):
            restore_run_weights(folder, run)
        assert time.monotonic() - start < MAX_SECONDS, number
