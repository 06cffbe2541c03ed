"""Commands that run at the same time or are killed do not destroy each other's work.

RADIANCE_TRIALS is the number of trials of each test.
"""

import json
import os
import re
import time

import numpy as np
import pytest

from radiance import config
from radiance.training.run_directory import find_complete_steps
from tests.helpers.commands import Commands
from tests.helpers.toy_runs import (
    PLAIN,
    metrics,
    read_samples,
    same,
    state_of,
    toy_run,
    written_experiment,
)

TRIALS = int(os.environ.get("RADIANCE_TRIALS", 1))
SUITE = """
from radiance import config as c
from radiance.ablation.suite import Scale, Suite

RUN = c.from_json(c.Config, {run!r})
SCALE = Scale(RUN, num_images=16, num_seeds=2, learning_rate_factors=(1.0, 2.0))
SUITE = Suite(
    name="toy",
    question="?",
    metric="validation_loss",
    base="base",
    controls=("slow",),
    margin=0.1,
    variants={{"base": (), "slow": ("optimizer.learning_rate=1e-5",)}},
    scales={{"cpu": SCALE, "gpu": SCALE, "pod": Scale(RUN)}},
)
"""
IN_USE = r"radiance: \S+ is in use by process \d+ on \S+, started [-\d]+ [:\d]+: radiance .*\n"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def commands(tmp_path_factory):
    with Commands(tmp_path_factory.mktemp("commands")) as started:
        yield started


@pytest.fixture(scope="module")
def alone(tmp_path_factory, data_directory, commands):
    run = toy_run(tmp_path_factory.mktemp("alone"), data_directory, **PLAIN)
    assert commands.run("train", written_experiment(run))[0] == 0
    return run


def assert_same_run(run: config.Config, expected: config.Config):
    assert same(state_of(run, run.train.steps), state_of(expected, run.train.steps))
    assert metrics(run) == metrics(expected)
    assert read_samples(run) == read_samples(expected)


def wait_for(condition, command, seconds: float = 200):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, command.output
        time.sleep(0.02)


@pytest.mark.parametrize("trial", range(TRIALS))
def test_two_trainers_of_one_directory(trial, alone, tmp_path, commands):
    run = config.override(alone, [f"output={tmp_path}"])
    experiment = written_experiment(run)
    first = commands.start("train", experiment)
    time.sleep(float(np.random.default_rng(trial).choice([0, 0.05, 0.5, 1.5])))
    second = commands.start("train", experiment)
    codes = [first.wait(), second.wait()]
    assert sorted(codes) in ([0, 2], [0, 0]), first.output + second.output
    for code, command in zip(codes, (first, second)):
        if code == 2:
            lines = [line for line in command.output.splitlines() if line.startswith("radiance:")]
            assert len(lines) == 1
            assert re.fullmatch(IN_USE, lines[0] + "\n"), lines
    assert_same_run(run, alone)
    assert not (run.run_dir / ".lock").exists()


@pytest.mark.parametrize("trial", range(TRIALS))
def test_sampling_beside_a_run_that_keeps_one_checkpoint(trial, alone, tmp_path, commands):
    changes = ["train.max_to_keep=1", "train.checkpoint_every=1", "train.steps=100000"]
    changes += ["train.sample_every=999999", "train.validate_every=999999", "train.log_every=1000"]
    run = config.override(alone, [f"output={tmp_path}", *changes])
    training = commands.start("train", written_experiment(run))
    try:
        wait_for(lambda: find_complete_steps(run.run_dir / "checkpoints"), training)
        for number in range(3):
            out = tmp_path / f"images_{number}"
            code, output = commands.run(
                "sample", run.run_dir, "--prompt", "the digit 2", "--out", out
            )
            assert code == 0, output
            assert "could not be read" not in output
    finally:
        training.kill()
        training.wait()


def make_suite(folder, data_directory: str):
    run = toy_run(
        "unused", data_directory, "train.steps=8", "train.checkpoint_every=4",
        "train.validate_every=8", "train.sample_every=9999", "data.source=shapes",
        "data.shapes.max_tokens=20", "data.shapes.caption_lengths=short", "text.max_length=20",
        **PLAIN,
    )  # fmt: skip
    path = folder / "suite.py"
    path.write_text(SUITE.format(run=config.to_json(run)))
    return [path, "--results", folder / "results", "--work", folder / "work"]


def read_results(folder) -> dict:
    results = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for result in results.values():
        del result["cost"]["seconds"], result["environment"]
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory, data_directory, commands):
    folder = tmp_path_factory.mktemp("ablated")
    code, output = commands.run("ablate", *make_suite(folder, data_directory))
    assert code == 0, output
    found = read_results(folder / "results")
    assert found.keys() == {"base.json", "slow.json"}
    return found


@pytest.mark.parametrize("trial", range(TRIALS))
def test_two_ablations_of_one_folder(trial, results, tmp_path, data_directory, commands):
    arguments = make_suite(tmp_path, data_directory)
    first = commands.start("ablate", *arguments)
    time.sleep(float(np.random.default_rng(trial).choice([0, 0.05, 0.5, 1.5])))
    second = commands.start("ablate", *arguments)
    codes = [first.wait(), second.wait()]
    assert sorted(codes) in ([0, 2], [0, 0]), first.output + second.output
    for code, command in zip(codes, (first, second)):
        assert code == 0 or re.search(IN_USE, command.output), command.output
    assert read_results(tmp_path / "results") == results


@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_killed_ablation_continues(trial, results, tmp_path, data_directory, commands):
    arguments = make_suite(tmp_path, data_directory)
    rng = np.random.default_rng(trial)
    for _ in range(3):
        command = commands.start("ablate", *arguments)
        time.sleep(float(rng.uniform(1, 8)))
        command.kill()
        if command.wait() == 0:
            break
    code, output = commands.run("ablate", *arguments)
    assert code == 0, output
    assert read_results(tmp_path / "results") == results


@pytest.mark.parametrize("trial", range(TRIALS))
def test_killed_trajectories_continue(trial, alone, tmp_path, commands):
    changes = ["distill.kind=trajectories", f"distill.teacher={alone.run_dir}", "train.steps=2"]
    changes += ["distill.num_trajectories=600", "distill.sample.steps=4", "train.sample_every=9999"]
    run = config.override(alone, [f"output={tmp_path}", "name=killed", *changes])
    straight = config.override(run, ["name=straight"])
    assert commands.run("train", written_experiment(straight))[0] == 0
    rng, folder = np.random.default_rng(trial), run.run_dir / "trajectories"
    for count in sorted(rng.integers(1, 8, 2)):
        command = commands.start("train", written_experiment(run))
        wait_for(lambda: len([*folder.glob("*.safetensors")]) >= count, command)  # noqa: B023
        command.kill()
        command.wait()
    code, output = commands.run("train", written_experiment(run))
    assert code == 0, output

    def read_shards(run: config.Config) -> dict[str, bytes]:
        paths = (run.run_dir / "trajectories").glob("*.safetensors")
        return {path.name: path.read_bytes() for path in paths}

    assert read_shards(run) == read_shards(straight)
    assert same(state_of(run, 2), state_of(straight, 2))
