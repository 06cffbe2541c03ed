"""Training a few blocks: who has a turn, what moves in it, what the optimizer holds, and a run that is resumed."""

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
from tests.helpers.toy_runs import PLAIN, batch_of, command, metrics, same, step_of, toy_run, train


def rotating(*changes, output="unused", data_directory="unused", **model):
    sizes = PLAIN | dict(double_blocks=2, single_blocks=5)
    return toy_run(
        output,
        data_directory,
        "optimizer.block_rotation=1,2",
        "optimizer.block_rotation_every=3",
        *changes,
        **(sizes | model),
    )


def order(run, turns):
    return [
        {
            kind: tuple(map(int, at))
            for kind, at in active_blocks(run, turn * run.optimizer.rotate_every).items()
        }
        for turn in range(turns)
    ]


def test_every_block_gets_its_turn():
    run = rotating()
    turns = order(run, 24)
    for begin in range(0, 24, 3):  # five blocks, two at a time
        assert {i for turn in turns[begin : begin + 3] for i in turn["single"]} == set(range(5))
    for begin in range(0, 24, 2):
        assert {i for turn in turns[begin : begin + 2] for i in turn["double"]} == {0, 1}
    assert all(len(set(turn["single"])) == 2 for turn in turns)
    assert (
        len(
            {
                tuple(turn["single"] for turn in turns[begin : begin + 3])
                for begin in range(0, 24, 3)
            }
        )
        > 4
    )  # shuffled anew
    assert turns != order(config.override(run, ["train.seed=1"]), 24)
    for step in range(9):
        at = jax.jit(partial(active_blocks, run))(jnp.int32(step))
        assert {kind: tuple(map(int, x)) for kind, x in at.items()} == turns[step // 3]
    assert active_blocks(config.override(run, ["optimizer.block_rotation=0,0"]), 5) == {}


def picked(stack, at):
    return jax.tree.map(lambda x: np.asarray(x)[np.asarray(at)], stack)


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("optimizer.kind=muon",),
        ("optimizer.weights_dtype=bfloat16", "optimizer.gradient_accumulation_steps=2"),
    ],
)
def test_only_the_blocks_at_hand_move(changes):
    run = rotating(*changes)
    step, state = step_of(run), init_state(run, toy_params(run.model))
    for number in range(7):
        before, at = (
            state,
            {kind: [int(i) for i in x] for kind, x in active_blocks(run, number).items()},
        )
        state, _ = step(state, batch_of(run, number))
        for kind, count in (("double", 2), ("single", 5)):
            old, new = (
                [picked(state.params[kind], i) for i in range(count)] for state in (before, state)
            )
            still = {i for i in range(count) if same(old[i], new[i])}
            assert still == set(range(count)) - set(at[kind]), (number, kind)
        assert not same(state.params["head"], before.params["head"])
        assert not same(state.params["text_embed"], before.params["text_embed"])


def test_a_step_is_that_of_all_blocks_where_it_is_taken():
    """The gradients of the blocks at hand are those of a step of all; so are, unclipped, the moments."""
    run = rotating("optimizer.clip_norm=1e9")
    whole = config.override(run, ["optimizer.block_rotation=0,0"])
    params, batch = toy_params(run.model), batch_of(run)
    few, all_ = (step_of(r)(init_state(r, params), batch)[0] for r in (run, whole))
    at = active_blocks(run, 0)
    for name, part in few.optimizer[1].mu.items():
        expected = all_.optimizer[1].mu[name]
        expected = picked(expected, at[name]) if name in at else expected
        for x, y in zip(jax.tree.leaves(part), jax.tree.leaves(expected), strict=True):
            assert x.shape == y.shape
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * max(np.abs(y).max(), 1e-2))


def test_moments_begin_anew_with_every_turn_even_where_its_first_step_is_skipped():
    run = rotating()
    step, state, batch = step_of(run), init_state(run, toy_params(run.model)), batch_of(run)
    bad = batch | {"image": batch["image"].at[0, 0, 0, 0].set(jnp.nan)}
    counts = []
    for number in range(8):
        state, _ = step(state, bad if number == 6 else batch)
        counts.append(int(state.optimizer[1].count))
    assert counts == [1, 2, 3, 1, 2, 3, 0, 1]
    assert int(state.optimizer_state[-1].count) == 7  # the learning rate's goes on


def test_at_the_edges_the_first_and_the_last_blocks_move_and_no_others():
    """Their moments go on, as those of a run do that trains all blocks."""
    run = rotating(
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
            if not same(picked(first.params[kind], i), picked(state.params[kind], i))
        ]
        for kind, count in (("double", 2), ("single", 5))
    }
    assert moved == {"double": [0], "single": [3, 4]}
    assert int(state.optimizer_state[1].count) == 3
    assert state.optimizer_state[1].mu["single"]["mlp"]["linear_in"]["kernel"].shape[0] == 2
    assert not same(first.params["head"], state.params["head"])
    assert same(first.params["patch_embed"], state.params["patch_embed"])


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_over_two_devices(tmp_path, data_directory):
    whole, broken = (
        rotating("train.steps=8", output=tmp_path / name, data_directory=data_directory)
        for name in ("whole", "broken")
    )
    assert train(whole) == 8
    assert train(config.override(broken, ["train.steps=4"])) == 4
    assert train(broken) == 8

    def state(run):
        return Checkpoints(run.directory / "checkpoints").restore(
            8, jax.eval_shape(partial(init_state, run))
        )

    assert same(state(whole), state(broken))
    assert state(whole).optimizer_state[1].mu["single"]["mlp"]["linear_in"]["kernel"].shape[0] == 2
    assert [row for row in metrics(broken) if row["step"] > 4] == [
        row for row in metrics(whole) if row["step"] > 4
    ]
    two = config.override(whole, ["name=two", "mesh.fsdp=2", "mesh.data=1"])
    process = command(two, devices=2)
    assert process.returncode == 0, process.output
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in (whole, two)]
    np.testing.assert_allclose(*losses, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            ["optimizer.block_rotation=0,2"],
            "trains 0 double blocks at a time, and model.double_blocks=19: give a number from 1 to 19",
        ),
        (["optimizer.block_rotation=1,39"], "trains 39 single blocks .* from 1 to 38, or 0,0"),
        (["model.double_blocks=0", "optimizer.block_rotation=1,2"], "give 0, or 0,0"),
        (["lora.rank=4", "init=x", "optimizer.block_rotation=1,2"], "no meaning with lora.rank=4"),
        (["optimizer.block_rotation_every=0"], "at least 1"),
        (["optimizer.edge_blocks=2,39"], "edges=.2, 39. trains 39 single blocks"),
        (
            ["lora.rank=4", "init=x", "optimizer.edge_blocks=1,2"],
            "edges=.* no meaning with lora.rank=4",
        ),
        (
            ["optimizer.block_rotation=1,2", "optimizer.edge_blocks=1,2"],
            "both say which blocks are trained",
        ),
    ],
)
def test_settings_that_cannot_be(changes, told):
    with pytest.raises(config.ConfigError, match=told):
        config.override(config.Config(), changes)
    config.override(config.Config(), ["model.double_blocks=0", "optimizer.block_rotation=0,2"])
