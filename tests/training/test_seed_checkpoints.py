"""Checkpoints of seeds that are trained together, when those of one are missing or fail."""

import pytest

from radiance.base.errors import CheckpointError
from radiance.training.checkpoints import Checkpoints
from radiance.training.seed_checkpoints import SeedCheckpoints, open_checkpoints
from radiance.training.seeds import init_states
from tests.helpers.toy_runs import PLAIN, toy_run

SEEDS = (3, 5)


@pytest.fixture
def directories(tmp_path):
    return [tmp_path / f"seed_{seed}" / "checkpoints" for seed in SEEDS]


def make_steps(directories, *steps_of_seeds):
    """Make empty folders in place of checkpoints; no folder at all for None."""
    for directory, steps in zip(directories, steps_of_seeds):
        if steps is not None:
            directory.mkdir(parents=True)
        for step in steps or ():
            (directory / str(step)).mkdir()


def read_steps(directories):
    return [sorted(int(path.name) for path in directory.iterdir()) for directory in directories]


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (([2, 4], [2]), ([2], [2])),  # interrupted between the saves of the two seeds
        (([2], []), ([], [])),  # interrupted during the first save
        (([], []), ([], [])),
        (([2, 4], [2, 4]), ([2, 4], [2, 4])),
    ],
)
def test_checkpoints_that_not_all_seeds_have_are_removed(directories, steps, expected):
    make_steps(directories, *steps)
    open_checkpoints(directories, 1).close()
    assert read_steps(directories) == [*expected]


@pytest.mark.parametrize("steps", [([4], None), ([2, 4], []), ([4, 6], [2])])
def test_nothing_is_removed_if_a_seed_has_lost_its_checkpoints(directories, steps):
    make_steps(directories, *steps)
    with pytest.raises(CheckpointError, match=r"seed_3/checkpoints has .*4.*: restore the missing"):
        open_checkpoints(directories, 1)
    existing = [directory for directory in directories if directory.is_dir()]
    assert read_steps(existing) == [seed_steps for seed_steps in steps if seed_steps is not None]


def test_a_seed_whose_save_failed_is_saved_first(directories, tmp_path, monkeypatch):
    state = init_states(toy_run(tmp_path, str(tmp_path), **PLAIN), SEEDS)
    saved = []
    monkeypatch.setattr(Checkpoints, "save", lambda self, *_: saved.append(self.directory))
    checkpoints = SeedCheckpoints(directories)
    checkpoints.save(state)
    checkpoints._seeds[1].last_save_failed = True
    checkpoints.save(state)
    assert saved == [*directories, *reversed(directories)]
    checkpoints.close()


def test_all_seeds_are_closed_if_one_fails(directories, monkeypatch):
    checkpoints, closed, close = SeedCheckpoints(directories), [], Checkpoints.close

    def close_and_fail(self):
        close(self)
        closed.append(self.directory)
        if len(closed) == 1:
            raise CheckpointError("The disk is away.")

    monkeypatch.setattr(Checkpoints, "close", close_and_fail)
    with pytest.raises(CheckpointError, match="away"):
        checkpoints.close()
    assert sorted(closed) == sorted(directories)
