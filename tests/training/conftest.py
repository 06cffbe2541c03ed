"""Fixtures of the training tests."""

import pytest

from radiance.training import trajectories


@pytest.fixture(scope="module")
def four_trajectories_per_file():
    """Let files hold four trajectories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectories, "SHARD_SIZE", 4)
        yield
