"""A run that is killed again and again, at any moment: it loses nothing, and always has a checkpoint to go on from.

RADIANCE_KILLS is how often, RADIANCE_KILLS_SEED when.
"""

import os
from pathlib import Path

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp

from radiance import config
from radiance.training.checkpoints import Checkpoints
from radiance.training.loop import train
from radiance.training.run_directory import UNFINISHED_PATTERNS, RunDirectory
from tests.helpers.processes import Forks, Moment
from tests.helpers.toy_runs import PLAIN, metrics, painted, same, state_of, toy_run

KILLS = int(os.environ.get("RADIANCE_KILLS", 6))
SEED = int(os.environ.get("RADIANCE_KILLS_SEED", 0))

pytestmark = pytest.mark.slow


def often_saved(output: Path, data_directory: str, *changes: str) -> config.Config:
    """A run that compiles fast and writes something of every kind every few steps. Its captions are cut, and its checkpoints lie between rows."""
    return toy_run(
        output, data_directory, "text.max_length=4", "optimizer.ema_decays=0.9", "optimizer.ema_widths=0.1,0.2", "train.validate_every=6",
        "train.sample_every=6", "train.snapshot_every=6", "train.max_to_keep=1", *changes, **PLAIN,
    )  # fmt: skip


def snapshots(run: config.Config) -> dict[str, dict]:
    return {
        path.name: ocp.load_checkpointables(path)["averages"]
        for path in RunDirectory(run.run_dir).average_dir.iterdir()
    }


def left_over(run: config.Config) -> list[Path]:
    return [path for pattern in UNFINISHED_PATTERNS for path in run.run_dir.glob(pattern)]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks")) as started:
        yield started


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data_directory, forks):
    """A run that no kill cuts short, long enough for all of them, and that keeps all its checkpoints."""
    run = often_saved(
        tmp_path_factory.mktemp("unbroken"),
        data_directory,
        f"train.steps={12 + 6 * KILLS}",
        "train.max_to_keep=1000",
    )
    ended = forks.train(run)
    assert ended.code == 0, ended.output
    assert any(row.get("captions_cut") for row in metrics(run))
    return run


def moments(draw: np.random.Generator):
    """In turn: while a checkpoint is saved, while a snapshot is, and at any time from the start on."""
    parts = {"checkpoints": 45, "averages": 16, "": 90}  # with what is written in about one save
    while True:
        for part, n in parts.items():
            yield Moment(
                part, int(draw.integers(1, n)), float(draw.choice([0.0, draw.uniform(0.001, 0.1)]))
            )


def test_killed_at_any_moment_it_goes_on_bit_for_bit(unbroken, tmp_path, data_directory, forks):
    run = config.override(unbroken, [f"output={tmp_path}", "train.max_to_keep=1"])
    stands, during = 0, {"checkpoints": 0, "averages": 0}
    for number, moment in zip(range(KILLS), moments(np.random.default_rng(SEED))):
        ended = forks.train(run, kill=moment)
        assert ended.code == -9, f"{moment}, kill {number}: {ended.output}"
        for part in during:
            during[part] += any(part in path.parts for path in left_over(run))
        latest = Checkpoints(run.run_dir / "checkpoints").latest_complete_step or 0
        print(f"kill {number}, {moment}: step {latest} stands")
        assert latest >= stands
        assert not latest or same(state_of(run, latest), state_of(unbroken, latest))
        stands = latest
    print(
        f"{KILLS} kills, in {during['checkpoints']} of them a checkpoint was half written, in {during['averages']} a snapshot"
    )
    assert all(during.values())
    ended = forks.train(run)
    assert ended.code == 0, ended.output
    assert same(state_of(run, run.train.steps), state_of(unbroken, run.train.steps))
    assert metrics(run) == metrics(unbroken)
    assert same(snapshots(run), snapshots(unbroken))
    assert painted(run) == painted(unbroken)
    assert not left_over(run)


def test_a_image_that_a_kill_prevented_is_painted_by_the_next_start(unbroken):
    before, written = painted(unbroken), metrics(unbroken)
    (unbroken.run_dir / "samples" / f"{unbroken.train.steps:08d}.png").unlink()
    assert train(unbroken) == unbroken.train.steps
    assert painted(unbroken) == before
    assert metrics(unbroken) == written


def test_from_step_0_on_all_is_measured_again(tmp_path):
    directory = RunDirectory(tmp_path)
    rows = '{"step": 0, "loss": 1}\n{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"st'
    for step, kept in ((2, [0, 2]), (0, [])):
        directory.metrics_path.write_text(rows)
        directory.truncate_metrics(step)
        assert [row["step"] for row in directory.read_metrics()] == kept
