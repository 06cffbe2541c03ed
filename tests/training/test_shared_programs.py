"""Runs of one process share compiled functions exactly where they compute the same."""

import pytest

from radiance import config
from radiance.training.shared_programs import share_init, share_step, share_validation
from tests.helpers.toy_runs import PLAIN, toy_run


def make_functions(run: config.Config) -> tuple:
    return share_init(run, (run.train.seed,), None), share_step(run, 1), share_validation(run)


@pytest.mark.parametrize(
    "changes",
    [
        ["name=other", "output=elsewhere"],
        [
            "train.steps=99",
            "train.validate_every=3",
            "train.sample_prompts=a dog",
            "train.loggers=",
        ],
    ],
)
def test_names_and_intervals_change_no_program(changes):
    run = toy_run("here", "unused", **PLAIN)
    for ours, theirs in zip(make_functions(run), make_functions(config.override(run, changes))):
        assert ours is theirs


@pytest.mark.parametrize(
    "change",
    [
        "train.seed=5",
        "optimizer.learning_rate=0.5",
        "optimizer.ema_decays=0.5",
        "model.masking=off",
        "flow.min_divisor=0.2",
        "data.batch_size=4",
        "compute.remat=dots",
    ],
)
def test_other_settings_make_other_programs(change):
    run = toy_run("here", "unused", **PLAIN)
    for ours, theirs in zip(make_functions(run), make_functions(config.override(run, [change]))):
        assert ours is not theirs


def test_the_end_of_a_cosine_schedule_is_part_of_the_program():
    run = toy_run("here", "unused", "optimizer.lr_schedule=cosine", **PLAIN)
    longer = config.override(run, ["train.steps=99"])
    assert share_step(run, 1) is not share_step(longer, 1)
    assert share_step(run, 1) is not share_step(run, 2)
