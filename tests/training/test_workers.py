"""Processes that decode images end with a trainer that is killed."""

import signal
import time

import psutil
import pytest

from radiance import config
from tests.helpers.toy_runs import PLAIN, command, toy_run

pytestmark = pytest.mark.slow


def test_decoding_processes_end_with_a_killed_trainer(tmp_path, data_directory):
    run = toy_run(tmp_path, data_directory, "data.num_workers=2", "train.steps=100000", **PLAIN)
    run = config.override(run, ["train.validate_every=999999", "train.sample_every=999999"])
    process = command(run, wait=False)
    deadline = time.monotonic() + 200
    try:
        while not list((run.run_dir / "checkpoints").glob("3")):
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.1)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) >= 2
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert not alive
