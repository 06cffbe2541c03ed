"""A run that is killed repeatedly at random moments resumes without loss.

RADIANCE_KILLS is the number of kills, and RADIANCE_KILLS_SEED the seed of their moments.
"""

import itertools
import os
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from radiance import config
from radiance.training.checkpoints import Checkpoints
from radiance.training.loop import train
from radiance.training.run_directory import RunDirectory
from tests.helpers.processes import Forks, Moment
from tests.helpers.toy_runs import PLAIN, metrics, read_samples, same, state_of, toy_run

KILLS = int(os.environ.get("RADIANCE_KILLS", 6))
SEED = int(os.environ.get("RADIANCE_KILLS_SEED", 0))

pytestmark = pytest.mark.slow


def make_run(output: Path, data_directory: str, *changes: str) -> config.Config:
    """Return a run that compiles fast and writes all kinds of files every few steps.

    Captions are truncated, and checkpoints are written between rows of metrics.
    """
    return toy_run(
        output,
        data_directory,
        "text.max_length=4",
        "optimizer.ema_decays=0.9",
        "optimizer.ema_widths=0.1,0.2",
        "train.validate_every=6",
        "train.sample_every=6",
        "train.snapshot_every=6",
        "train.max_to_keep=1",
        *changes,
        **PLAIN,
    )


def snapshots(run: config.Config) -> dict[str, dict]:
    return {
        path.name: ocp.load_checkpointables(path)["averages"]
        for path in RunDirectory(run.run_dir).average_dir.iterdir()
    }


def find_partial_files(run: config.Config) -> list[Path]:
    patterns = (".*.part", "*/.*.part", "*/*.orbax-checkpoint-tmp*")
    return [path for pattern in patterns for path in run.run_dir.glob(pattern)]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_directory, forks):
    """A run without kills that is long enough for all of them and keeps all its checkpoints."""
    run = make_run(
        tmp_path_factory.mktemp("uninterrupted"),
        data_directory,
        f"train.steps={12 + 6 * KILLS}",
        "train.max_to_keep=1000",
    )
    process = forks.train(run)
    assert process.code == 0, process.output
    assert any(row.get("captions_cut") for row in metrics(run))
    return run


def sample_moments(rng: np.random.Generator):
    """Yield in turn: moments during a checkpoint, during a snapshot, and at any time.

    The first are at a write itself, so that files remain that are only partially written. After a
    delay, a save may have ended.
    """
    parts = {"checkpoints": 45, "averages": 16, "": 90}  # number of writes of about one save
    for turn in itertools.count():
        for part, n in parts.items():
            write = int(rng.integers(1, n))
            delay = float(rng.choice([0.0, rng.uniform(0.001, 0.1)]))
            yield Moment(part, write, delay if turn else 0.0)


def test_a_run_killed_at_any_moment_resumes_bit_for_bit(
    uninterrupted, tmp_path, data_directory, forks
):
    run = config.override(uninterrupted, [f"output={tmp_path}", "train.max_to_keep=1"])
    latest_step, num_partial = 0, {"checkpoints": 0, "averages": 0}
    for number, moment in zip(range(KILLS), sample_moments(np.random.default_rng(SEED))):
        process = forks.train(run, kill=moment)
        assert process.code == -9, f"{moment}, kill {number}: {process.output}"
        for part in num_partial:
            num_partial[part] += any(part in path.parts for path in find_partial_files(run))
        latest = Checkpoints(run.run_dir / "checkpoints").latest_complete_step or 0
        print(f"kill {number}, {moment}: step {latest} is complete")
        assert latest >= latest_step
        assert not latest or same(state_of(run, latest), state_of(uninterrupted, latest))
        latest_step = latest
    print(
        f"{KILLS} kills, {num_partial['checkpoints']} during a checkpoint, "
        f"{num_partial['averages']} during a snapshot"
    )
    assert all(num_partial.values())
    process = forks.train(run)
    assert process.code == 0, process.output
    assert same(state_of(run, run.train.steps), state_of(uninterrupted, run.train.steps))
    assert metrics(run) == metrics(uninterrupted)
    assert same(snapshots(run), snapshots(uninterrupted))
    assert read_samples(run) == read_samples(uninterrupted)
    assert not find_partial_files(run)


def test_samples_that_a_kill_prevented_are_generated_by_the_next_start(uninterrupted):
    before, rows = read_samples(uninterrupted), metrics(uninterrupted)
    (uninterrupted.run_dir / "samples" / f"{uninterrupted.train.steps:08d}.png").unlink()
    assert train(uninterrupted) == uninterrupted.train.steps
    assert read_samples(uninterrupted) == before
    assert metrics(uninterrupted) == rows


def test_metrics_after_the_resumed_step_are_removed(tmp_path):
    directory = RunDirectory(tmp_path)
    rows = '{"step": 0, "loss": 1}\n{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"st'
    for step, expected in ((2, [0, 2]), (0, [])):
        directory.metrics_path.write_text(rows)
        directory.truncate_metrics(step)
        assert [row["step"] for row in directory.read_metrics()] == expected
