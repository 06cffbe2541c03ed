"""Two processes that train together over gloo, like two hosts of a cluster."""

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
from radiance.training.run_directory import RunDirectory
from tests.helpers.toy_runs import PLAIN, environment_of, metrics, toy_run, written_experiment

pytestmark = pytest.mark.slow


def start_hosts(*command: str) -> list[subprocess.Popen]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    environment = environment_of(1) | {"JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo"}
    return [
        subprocess.Popen(
            [
                sys.executable,
                "-m",
                "radiance",
                *command,
                "--coordinator",
                address,
                "--hosts",
                "2",
                "--host",
                str(host),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
        )
        for host in range(2)
    ]


def wait_for_outputs(processes) -> list[str]:
    texts = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(texts)
    return texts


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_directory):
    run = toy_run(
        tmp_path_factory.mktemp("alone"), data_directory, "train.profile_steps=2", **PLAIN
    )
    assert train(run) == 8
    return run


def test_profiled_steps_leave_a_trace(alone):
    assert list((alone.run_dir / "profile").rglob("*.xplane.pb"))


def test_two_killed_hosts_resume_and_train_like_one(alone, tmp_path, data_directory):
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
    while not (run.run_dir / "checkpoints" / "2").is_dir():  # it appears when it is complete
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.1)
    for process in processes:
        process.send_signal(signal.SIGKILL)
        process.communicate()

    output, _ = wait_for_outputs(start_hosts("train", str(experiment)))
    assert "2 device(s), resumed from step" in output
    assert (run.run_dir / "report.html").is_file()
    ours, expected = metrics(run), metrics(alone)
    assert [row["step"] for row in ours] == [row["step"] for row in expected]
    for x, y in zip(ours, expected):
        np.testing.assert_allclose([*x.values()][1], [*y.values()][1], rtol=1e-3)

    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a handwritten one\nthe digit 2\nthe digit 3\n")
    arguments = ["sample", str(run.run_dir), "--prompts", str(prompts), "--seeds", "4"]
    wait_for_outputs(start_hosts(*arguments, "--out", str(tmp_path / "two")))
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


def test_the_death_of_a_host_ends_the_run_and_all_hosts_resume(tmp_path, data_directory):
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
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.1)
    second.kill()
    output = first.communicate(timeout=200)[0]  # it notices, and ends by itself
    second.communicate()
    assert first.returncode == 1, output
    assert "radiance: another host has failed, or" in output
    assert "Traceback" not in output
    steps = [
        int(path.name) for path in (run.run_dir / "checkpoints").iterdir() if path.name.isdecimal()
    ]
    assert (
        int(re.search(r"resumes from step (\d+)\.", output)[1]) in steps
    )  # not one that was still being written
    step = max(steps)
    run = config.override(run, [f"train.steps={step + 1}"])
    assert (
        f"resumed from step {step}"
        in wait_for_outputs(start_hosts("train", str(written_experiment(run))))[0]
    )


def test_sigterm_of_one_host_stops_all_after_the_same_step(tmp_path, data_directory):
    changes = [
        "mesh.fsdp=2",
        "mesh.data=1",
        "train.checkpoint_every=9999",
        "train.validate_every=9999",
        "train.sample_every=9999",
        "train.log_every=2",
        "train.steps=99999",
    ]
    run = toy_run(tmp_path, data_directory, *changes, **PLAIN)
    experiment = str(written_experiment(run))
    processes = start_hosts("train", experiment)
    deadline = time.monotonic() + 200
    while max((row["step"] for row in read_rows(run)), default=0) < 4:
        assert time.monotonic() < deadline
        assert all(p.poll() is None for p in processes), [p.communicate()[0] for p in processes]
        time.sleep(0.05)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [143, 143], outputs
    assert "the same command resumes the run" in outputs[0]
    assert "Traceback" not in outputs[0] + outputs[1]
    stopped = int(re.search(r"Stopped at step (\d+)", outputs[0])[1])
    assert (run.run_dir / "checkpoints" / str(stopped)).is_dir()
    run = config.override(run, [f"train.steps={stopped + 2}"])
    output, _ = wait_for_outputs(start_hosts("train", str(written_experiment(run))))
    assert f"resumed from step {stopped}" in output


def read_rows(run: config.Config) -> list[dict]:
    return RunDirectory(run.run_dir).read_metrics()


def test_a_host_that_cannot_join_the_others_is_reported(capsys):
    from radiance.cli import main

    assert main(["train", "experiments/quickstart.py", "--hosts", "auto"]) == 2
    error = capsys.readouterr().err
    assert "could not join the others" in error
    assert error.count("\n") == 1
    assert main(["train", "experiments/quickstart.py", "--hosts", "many"]) == 2
    assert "neither a number nor auto" in capsys.readouterr().err
