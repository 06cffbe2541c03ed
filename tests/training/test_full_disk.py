"""A disk that fills up while a run writes: one sentence, no checkpoint lost, and with room again the run goes on as if nothing had been.

The disk is a small tmpfs that only the run's processes see, for which user namespaces (or root) are needed.
"""

import re
import subprocess

import pytest

from radiance import config
from radiance.training.checkpoints import Checkpoints
from tests.helpers.processes import Forks, Moment
from tests.helpers.toy_runs import PLAIN, metrics, painted, same, state_of, toy_run

pytestmark = pytest.mark.slow

MOUNT = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"')
AGAIN = "make room there and run the same command again"
STANDS = 32  # the step whose checkpoint is whole by then, and the only one
# When the disk is filled, and what is said: in the second save, and, once the first is whole, at the next row of metrics and the next image.
MOMENTS = {
    "checkpoint": (
        Moment("checkpoints", 10, once=f"checkpoints/{STANDS}"),
        rf"The .*checkpoint .* could not be written: its disk is full: {AGAIN} \(.*\)\.?",
    ),
    "metrics": (
        Moment("metrics.jsonl", 1, once=f"checkpoints/{STANDS}"),
        rf"\S+/metrics.jsonl could not be written \(No space left on device\): {AGAIN}\.",
    ),
    "image": (
        Moment("samples", 1, once=f"checkpoints/{STANDS}"),
        rf"\S+/000000\d\d.png could not be written \(No space left on device\): {AGAIN}\.",
    ),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """Where the disk is mounted for the forks."""
    folder = tmp_path_factory.mktemp("disk")
    try:
        done = subprocess.run([*MOUNT, str(folder), "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("There is no unshare(1) to mount a small disk with.")
    if done.returncode:
        pytest.skip(f"No small disk can be mounted here: {done.stderr.strip()}.")
    return folder


@pytest.fixture(scope="module")
def forks(disk, tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks"), *MOUNT, str(disk)) as started:
        yield started


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data_directory, forks):
    run = toy_run(
        tmp_path_factory.mktemp("unbroken"), data_directory, "train.steps=80", "train.log_every=1", "train.checkpoint_every=32",
        "train.sample_every=10", "train.validate_every=16", **PLAIN,
    )  # fmt: skip
    ended = forks.train(run)
    assert ended.code == 0, ended.output
    return run


@pytest.mark.parametrize("what", MOMENTS)
def test_a_full_disk(what, unbroken, disk, forks):
    run = config.override(unbroken, [f"output={disk}", f"name={what}"])
    seen = config.override(
        run, [f"output=/proc/{forks.pid}/root{disk}"]
    )  # the same directory from outside
    moment, sentence = MOMENTS[what]
    # Once more while it is still full, which is found before anything is done.
    starts = [
        (forks.train(run, fill=moment), sentence),
        (forks.train(run), r".* GB free, and .* GB are needed: make room .*"),
    ]
    for ended, sentence in starts:
        told = [line for line in ended.output.splitlines() if "radiance: " in line]
        assert ended.code == 2 and len(told) == 1 and "absl" not in ended.output, ended.output
        assert re.fullmatch(f"radiance: {sentence}", told[0]), told
        assert Checkpoints(seen.run_dir / "checkpoints").latest_complete_step == STANDS
        assert same(state_of(seen, STANDS), state_of(unbroken, STANDS))
    (seen.run_dir.parent / "ballast").unlink()
    ended = forks.train(run)
    assert ended.code == 0 and f"resumed from step {STANDS}" in ended.output, ended.output
    assert same(state_of(seen, 80), state_of(unbroken, 80))
    assert metrics(seen) == metrics(unbroken)
    assert painted(seen) == painted(unbroken)
