"""A full disk is reported in one sentence, and the run resumes without loss when there is room.

The disk is a small tmpfs that only the processes of the run see, which needs user namespaces.
"""

import re
import subprocess

import pytest

from radiance import config
from radiance.training.checkpoints import Checkpoints
from tests.helpers.processes import Forks, Moment
from tests.helpers.toy_runs import PLAIN, metrics, read_samples, same, state_of, toy_run

pytestmark = pytest.mark.slow

MOUNT = ("unshare", "-Urm", "sh", "-c", 'mount -t tmpfs -o size=16m tmpfs "$0" && exec "$@"')
REMEDY = "make room there and run the same command again"
SAVED_STEP = 32  # the step of the only complete checkpoint
# When the disk is filled, and the message: during the second save, and after the first at the next
# row of metrics and at the next samples.
MOMENTS = {
    "checkpoint": (
        Moment("checkpoints", 10, once=f"checkpoints/{SAVED_STEP}"),
        rf"The .*checkpoint .* could not be written: its disk is full: {REMEDY} \(.*\)\.?",
    ),
    "metrics": (
        Moment("metrics.jsonl", 1, once=f"checkpoints/{SAVED_STEP}"),
        rf"\S+/metrics.jsonl could not be written \(No space left on device\): {REMEDY}\.",
    ),
    "image": (
        Moment("samples", 1, once=f"checkpoints/{SAVED_STEP}"),
        rf"\S+/000000\d\d.png could not be written \(No space left on device\): {REMEDY}\.",
    ),
}


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """The folder where the disk is mounted for the forks."""
    folder = tmp_path_factory.mktemp("disk")
    try:
        mount = subprocess.run([*MOUNT, str(folder), "true"], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("There is no unshare(1) to mount a small disk with.")
    if mount.returncode:
        pytest.skip(f"No small disk can be mounted here: {mount.stderr.strip()}.")
    return folder


@pytest.fixture(scope="module")
def forks(disk, tmp_path_factory):
    with Forks(tmp_path_factory.mktemp("forks"), *MOUNT, str(disk)) as started:
        yield started


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data_directory, forks):
    run = toy_run(
        tmp_path_factory.mktemp("uninterrupted"),
        data_directory,
        "train.steps=80",
        "train.log_every=1",
        "train.checkpoint_every=32",
        "train.sample_every=10",
        "train.validate_every=16",
        **PLAIN,
    )
    process = forks.train(run)
    assert process.code == 0, process.output
    return run


@pytest.mark.parametrize("kind", MOMENTS)
def test_a_full_disk_loses_nothing(kind, uninterrupted, disk, forks):
    run = config.override(uninterrupted, [f"output={disk}", f"name={kind}"])
    outside_run = config.override(
        run, [f"output=/proc/{forks.pid}/root{disk}"]
    )  # the same directory, outside of the mount
    moment, message = MOMENTS[kind]
    # The second start finds the full disk before any work.
    starts = [
        (forks.train(run, fill=moment), message),
        (forks.train(run), r".* GB free, and .* GB are needed: make room .*"),
    ]
    for process, message in starts:
        errors = [line for line in process.output.splitlines() if "radiance: " in line]
        assert (process.code, len(errors)) == (2, 1), process.output
        assert "absl" not in process.output
        assert re.fullmatch(f"radiance: {message}", errors[0]), errors
        assert Checkpoints(outside_run.run_dir / "checkpoints").latest_complete_step == SAVED_STEP
        assert same(state_of(outside_run, SAVED_STEP), state_of(uninterrupted, SAVED_STEP))
    (outside_run.run_dir.parent / "ballast").unlink()
    process = forks.train(run)
    assert process.code == 0, process.output
    assert f"resumed from step {SAVED_STEP}" in process.output
    assert same(state_of(outside_run, 80), state_of(uninterrupted, 80))
    assert metrics(outside_run) == metrics(uninterrupted)
    assert read_samples(outside_run) == read_samples(uninterrupted)
