"""Two processes that compute together, as two hosts of a cluster do: over gloo, with two fake devices each."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.training.loop import train
from tests.helpers.toy_runs import PLAIN, environment_of, metrics, toy_run, written_experiment

pytestmark = pytest.mark.slow


def start_hosts(*command: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = environment_of(1) | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "radiance", *command, "--coordinator", address, "--hosts", "2", "--host", str(host)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for host in range(2)
    ]  # fmt: skip


def outputs(processes) -> list[str]:
    found = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(found)
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_directory):
    run = toy_run(
        tmp_path_factory.mktemp("alone"), data_directory, "train.profile_steps=2", **PLAIN
    )
    assert train(run) == 8
    return run


def test_steps_are_traced(alone):
    assert list((alone.run_dir / "profile").rglob("*.xplane.pb"))


def test_two_hosts_train_as_one_are_killed_and_go_on(alone, tmp_path, data_directory):
    run = toy_run(
        tmp_path,
        data_directory,
        "mesh.fsdp=2",
        "mesh.data=1",
        "train.checkpoint_every=2",
        "train.steps=8",
        **PLAIN,
    )
    experiment = written_experiment(run)
    processes = start_hosts("train", str(experiment))
    deadline = time.monotonic() + 200
    while not (run.run_dir / "checkpoints" / "2").is_dir():  # which appears when it is whole
        assert time.monotonic() < deadline and all(p.poll() is None for p in processes), [
            p.communicate()[0] for p in processes
        ]
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    first, second = outputs(start_hosts("train", str(experiment)))
    assert "2 device(s), resumed from step" in first
    assert (run.run_dir / "report.html").is_file()
    ours, expected = metrics(run), metrics(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in expected]
    for x, y in zip(ours, expected):
        np.testing.assert_allclose([*x.values()][1], [*y.values()][1], rtol=1e-3)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten one\nthe digit 2\nthe digit 3\n")
    arguments = ["sample", str(run.run_dir), "--prompts", str(prompts), "--seeds", "4"]
    outputs(start_hosts(*arguments, "--out", str(tmp_path / "two")))
    one = subprocess.run(
        [sys.executable, "-m", "radiance", *arguments, "--out", str(tmp_path / "one")],
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stderr
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == [f"{i:05d}_seed4.png" for i in range(3)]
    for name in names:
        ours, expected = (
            np.asarray(Image.open(Path(tmp_path) / many / name), int) for many in ("two", "one")
        )
        assert np.abs(ours - expected).max() <= 1


def test_a_host_that_dies_ends_the_run_which_goes_on(tmp_path, data_directory):
    changes = [
        "mesh.fsdp=2",
        "mesh.data=1",
        "train.checkpoint_every=2",
        "train.validate_every=9999",
        "train.sample_every=9999",
    ]
    run = toy_run(tmp_path, data_directory, *changes, "train.steps=9999", **PLAIN)
    first, second = start_hosts("train", str(written_experiment(run)))
    deadline = time.monotonic() + 200
    while not (run.run_dir / "checkpoints" / "2").is_dir():
        assert time.monotonic() < deadline and first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    second.kill()
    told = first.communicate(timeout=200)[0]  # which notices, and ends by itself
    second.communicate()
    assert (
        first.returncode == 1
        and "radiance: another host is gone, or" in told
        and "Traceback" not in told
    ), told
    steps = [
        int(path.name) for path in (run.run_dir / "checkpoints").iterdir() if path.name.isdecimal()
    ]
    assert (
        int(re.search(r"resumes from step (\d+)\.", told)[1]) in steps
    )  # and is not one that was on its way to the disk
    step = max(steps)
    run = config.override(run, [f"train.steps={step + 1}"])
    assert (
        f"resumed from step {step}"
        in outputs(start_hosts("train", str(written_experiment(run))))[0]
    )


def test_a_host_that_does_not_find_the_others(capsys):
    from radiance.cli import main

    assert main(["train", "experiments/quickstart.py", "--hosts", "auto"]) == 2
    told = capsys.readouterr().err
    assert "could not join the others" in told
    assert told.count("\n") == 1
    assert main(["train", "experiments/quickstart.py", "--hosts", "many"]) == 2
    assert "neither a number nor auto" in capsys.readouterr().err
