import pytest

from radiance.training import trajectories


@pytest.fixture(scope="module")
def few_trajectories_a_file():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trajectories, "SHARD_SIZE", 4)
        yield
