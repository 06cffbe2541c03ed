"""Training a few blocks: their order, their updates, the optimizer's moments, and resumed runs."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.training.block_rotation import active_blocks
from radiance.training.checkpoints import Checkpoints
from radiance.training.step import init_state
from tests.helpers.toy_models import toy_params
from tests.helpers.toy_runs import (
    PLAIN,
    batch_of,
    metrics,
    same,
    step_of,
    toy_run,
    train,
    train_on_devices,
)


def rotating_run(*changes, output="unused", data_directory="unused", **model):
    sizes = PLAIN | dict(double_blocks=2, single_blocks=5)
    return toy_run(
        output,
        data_directory,
        "optimizer.block_rotation=1,2",
        "optimizer.block_rotation_every=3",
        *changes,
        **(sizes | model),
    )


def list_active(run, num_rotations):
    return [
        {
            kind: tuple(map(int, indices))
            for kind, indices in active_blocks(
                run, rotation * run.optimizer.block_rotation_every
            ).items()
        }
        for rotation in range(num_rotations)
    ]


def test_every_block_becomes_active():
    run = rotating_run()
    rotations = list_active(run, 24)
    for begin in range(0, 24, 3):  # five blocks, two at a time
        assert {i for rotation in rotations[begin : begin + 3] for i in rotation["single"]} == set(
            range(5)
        )
    for begin in range(0, 24, 2):
        assert {i for rotation in rotations[begin : begin + 2] for i in rotation["double"]} == {
            0,
            1,
        }
    assert all(len(set(rotation["single"])) == 2 for rotation in rotations)
    cycles = {
        tuple(rotation["single"] for rotation in rotations[begin : begin + 3])
        for begin in range(0, 24, 3)
    }
    assert len(cycles) > 4  # each is shuffled
    assert rotations != list_active(config.override(run, ["train.seed=1"]), 24)
    for step in range(9):
        indices = jax.jit(partial(active_blocks, run))(jnp.int32(step))
        assert {kind: tuple(map(int, x)) for kind, x in indices.items()} == rotations[step // 3]
    assert active_blocks(config.override(run, ["optimizer.block_rotation=0,0"]), 5) == {}


def take_block(stack, index):
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(index)], stack)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("optimizer.kind=muon",),
        ("optimizer.weights_dtype=bfloat16", "optimizer.gradient_accumulation_steps=2"),
    ],
)
def test_only_active_blocks_change(changes):
    run = rotating_run(*changes)
    step, state = step_of(run), init_state(run, toy_params(run.model))
    for number in range(7):
        before, at = (
            state,
            {kind: [int(i) for i in x] for kind, x in active_blocks(run, number).items()},
        )
        state, _ = step(state, batch_of(run, number))
        for kind, count in (("double", 2), ("single", 5)):
            old, new = (
                [take_block(state.params[kind], i) for i in range(count)]
                for state in (before, state)
            )
            still = {i for i in range(count) if same(old[i], new[i])}
            assert still == set(range(count)) - set(at[kind]), (number, kind)
        assert not same(state.params["head"], before.params["head"])
        assert not same(state.params["text_embed"], before.params["text_embed"])


def test_active_blocks_change_as_in_a_step_of_all_blocks():
    """Gradients, and unclipped moments, are the same."""
    run = rotating_run("optimizer.clip_norm=1e9")
    complete = config.override(run, ["optimizer.block_rotation=0,0"])
    params, batch = toy_params(run.model), batch_of(run)
    some, all_ = (step_of(r)(init_state(r, params), batch)[0] for r in (run, complete))
    at = active_blocks(run, 0)
    for name, part in some.optimizer_state[1].mu.items():
        expected = all_.optimizer_state[1].mu[name]
        expected = take_block(expected, at[name]) if name in at else expected
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(expected), strict=True):
            assert x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(np.abs(y).max(), 1e-2))


def test_moments_are_reset_in_every_rotation_even_if_its_first_step_is_skipped():
    run = rotating_run()
    step, state, batch = step_of(run), init_state(run, toy_params(run.model)), batch_of(run)
    bad = batch | {"image": batch["image"].at[0, 0, 0, 0].set(jnp.nan)}
    counts = []
    for number in range(8):
        state, _ = step(state, bad if number == 6 else batch)
        counts.append(int(state.optimizer_state[1].count))
    assert counts == [1, 2, 3, 1, 2, 3, 0, 1]
    assert int(state.optimizer_state[-1].count) == 7  # the learning-rate schedule continues


def test_edge_blocks_are_the_first_double_and_the_last_single_blocks():
    """Their moments are never reset."""
    run = rotating_run(
        "optimizer.block_rotation=0,0",
        "optimizer.edge_blocks=1,2",
        "optimizer.block_rotation_every=1",
        "optimizer.frozen=patch_embed",
    )
    first = state = init_state(run, toy_params(run.model))
    step = step_of(run)
    for number in range(3):
        state, _ = step(state, batch_of(run, number))
    moved = {
        kind: [
            i
            for i in range(count)
            if not same(take_block(first.params[kind], i), take_block(state.params[kind], i))
        ]
        for kind, count in (("double", 2), ("single", 5))
    }
    assert moved == {"double": [0], "single": [3, 4]}
    assert int(state.optimizer_state[1].count) == 3
    assert state.optimizer_state[1].mu["single"]["mlp"]["linear_in"]["kernel"].shape[0] == 2
    assert not same(first.params["head"], state.params["head"])
    assert same(first.params["patch_embed"], state.params["patch_embed"])


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_runs_on_two_devices(tmp_path, data_directory):
    complete, interrupted = (
        rotating_run("train.steps=8", output=tmp_path / name, data_directory=data_directory)
        for name in ("complete", "interrupted")
    )
    assert train(complete) == 8
    assert train(config.override(interrupted, ["train.steps=4"])) == 4
    assert train(interrupted) == 8

    def state(run):
        return Checkpoints(run.run_dir / "checkpoints").restore(
            8, jax.eval_shape(partial(init_state, run))
        )

    assert same(state(complete), state(interrupted))
    assert (
        state(complete).optimizer_state[1].mu["single"]["mlp"]["linear_in"]["kernel"].shape[0] == 2
    )
    assert [row for row in metrics(interrupted) if row["step"] > 4] == [
        row for row in metrics(complete) if row["step"] > 4
    ]
    two = config.override(complete, ["name=two", "mesh.fsdp=2", "mesh.data=1"])
    train_on_devices(two, 2)
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in (complete, two)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            ["optimizer.block_rotation=0,2"],
            "trains 0 double blocks at a time, and model.double_blocks=19",
        ),
        (["optimizer.block_rotation=1,39"], "trains 39 single blocks .* from 1 to 38, or 0,0"),
        (["model.double_blocks=0", "optimizer.block_rotation=1,2"], "give 0, or 0,0"),
        (["lora.rank=4", "init=x", "optimizer.block_rotation=1,2"], "no meaning with lora.rank=4"),
        (["optimizer.block_rotation_every=0"], "at least 1"),
        (["optimizer.edge_blocks=2,39"], "edge_blocks=.2, 39. trains 39 single blocks"),
        (
            ["lora.rank=4", "init=x", "optimizer.edge_blocks=1,2"],
            "edge_blocks=.* no meaning with lora.rank=4",
        ),
        (
            ["optimizer.block_rotation=1,2", "optimizer.edge_blocks=1,2"],
            "both choose the trained blocks",
        ),
    ],
)
def test_wrong_settings_are_an_error(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.override(config.Config(), changes)
    config.override(config.Config(), ["model.double_blocks=0", "optimizer.block_rotation=0,2"])
