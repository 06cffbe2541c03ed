"""Muon against singular vectors from NumPy, with everything a run may combine it with, and as a run that is resumed."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from radiance import config
from radiance.base.trees import flatten_tree
from radiance.distributed.sharding import MESH_AXES, make_shardings
from radiance.training.adam import scale_by_adam
from radiance.training.checkpoints import Checkpoints
from radiance.training.lora import init_adapters
from radiance.training.muon import scale_by_muon_and_adam
from radiance.training.step import init_state
from tests.helpers.toy_models import toy_model, toy_params
from tests.helpers.toy_runs import PLAIN, batch_of, command, metrics, same, step_of, toy_run, train

MUON = config.Optimizer(kind="muon")


def noise_like(params, seed=0):
    draw = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(draw.standard_normal(x.shape, np.float32)), params)


def matrices_of(path, leaf):
    """[count, in, out], written out by hand."""
    leaf = np.asarray(leaf, np.float64)
    if path.endswith("qkv/kernel"):
        blocks, inputs, three, heads, channels = leaf.shape
        return np.stack(
            [
                leaf[b, :, i].reshape(inputs, heads * channels)
                for b in range(blocks)
                for i in range(three)
            ]
        )
    return leaf.reshape(len(leaf), -1, leaf.shape[-1])


def test_updates_are_the_momentum_without_its_singular_values():
    params = toy_params(toy_model(text_refiner_blocks=2, head="linear", modulation="none"))
    gradients, optimizer = noise_like(params), scale_by_muon_and_adam(MUON)
    updates = flatten_tree(jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0])
    adam = flatten_tree(scale_by_adam(MUON).update(gradients, scale_by_adam(MUON).init(params))[0])
    seen = 0
    for path, gradient in flatten_tree(gradients).items():
        if not (path.startswith(("refiner", "double", "single")) and path.endswith("kernel")):
            np.testing.assert_array_equal(updates[path], adam[path], err_msg=path)
            continue
        for g, u in zip(matrices_of(path, gradient), matrices_of(path, updates[path]), strict=True):
            left, _, right = np.linalg.svd(g, full_matrices=False)
            u = u / (0.2 * np.sqrt(max(u.shape)))
            # Five rounds of the iteration bring singular values between 0.7 and 1.2, of square noise a few less; the vectors are g's own.
            inside = left.T @ u @ right.T
            np.testing.assert_allclose(left @ inside @ right, u, atol=1e-4, err_msg=path)
            np.testing.assert_allclose(inside, np.diag(np.diag(inside)), atol=1e-3, err_msg=path)
            assert 0.6 < np.median(np.diag(inside)) < 1.25 and np.diag(inside).min() > 0, path
            assert 0.12 < np.sqrt((updates[path] ** 2).mean()) < 0.25
            seen += 1
    assert seen == 2 * (3 + 3) + 2 * 2 * (3 + 3) + 3 * (3 + 3)


def test_the_second_step_is_of_nesterovs_momentum():
    """Up to its length, which is taken away: after gradients g, h it is β ((1 − β) β g + (1 − β) h) / (1 − β³) + (1 − β) h / (1 − β²)."""
    params = toy_params(toy_model())["single"]["mlp"]["linear_in"]
    tree = {"single": {"mlp": {"linear_in": {"kernel": params["kernel"]}}}}
    optimizer = scale_by_muon_and_adam(config.Optimizer(kind="muon", muon_beta=0.8))
    g, h = noise_like(tree, 1), noise_like(tree, 2)
    state = optimizer.update(g, optimizer.init(tree), tree)[1]
    ours = optimizer.update(h, state, tree)[0]
    mixed = jax.tree.map(
        lambda g, h: 0.8 * (0.16 * g + 0.2 * h) / (1 - 0.8**3) + 0.2 * h / (1 - 0.8**2), g, h
    )
    alone = optimizer.update(mixed, optimizer.init(tree), tree)[0]
    np.testing.assert_allclose(
        flatten_tree(ours)["single/mlp/linear_in/kernel"],
        flatten_tree(alone)["single/mlp/linear_in/kernel"],
        atol=1e-5,
    )


def test_both_factors_of_a_lora_are_matrices():
    adapters = init_adapters(toy_model(), config.Lora(rank=3), jax.random.key(0))
    optimizer = scale_by_muon_and_adam(MUON)
    updates = optimizer.update(noise_like(adapters), optimizer.init(adapters), adapters)[0]
    for path, update in flatten_tree(updates).items():
        values = np.linalg.svd(np.asarray(update), compute_uv=False) / (
            0.2 * np.sqrt(max(update.shape[1:]))
        )
        assert values.shape[1] == 3 and (values > 0.6).all() and (values < 1.25).all(), path


def test_a_momentum_in_bfloat16_stays_right_on_average():
    tree = {"single": {"mlp": {"linear_in": {"kernel": jnp.full((1, 64, 64), 2.0)}}}}
    optimizer = scale_by_muon_and_adam(
        config.Optimizer(kind="muon", mu_dtype="bfloat16", muon_beta=0.999)
    )
    state, momenta = (
        optimizer.init(tree),
        lambda state: [x for x in jax.tree.leaves(state) if x.dtype == jnp.bfloat16],
    )
    assert [x.shape for x in momenta(state)] == [(1, 64, 64)]
    step = jax.jit(lambda state: optimizer.update(tree, state, tree)[1])
    for _ in range(300):
        state = step(state)
    assert float(momenta(state)[0].astype(jnp.float32).mean()) == pytest.approx(
        2 * (1 - 0.999**300), rel=5e-3
    )


@pytest.mark.parametrize(
    "changes",
    [
        (),
        ("optimizer.weights_dtype=bfloat16", "optimizer.mu_dtype=bfloat16"),
        ("optimizer.frozen=double,single/mlp",),
    ],
)
def test_it_trains(changes):
    settings = [
        "optimizer.kind=muon",
        "optimizer.learning_rate=3e-3",
        "optimizer.warmup_steps=0",
        *changes,
    ]
    run = toy_run("unused", "unused", *settings, **PLAIN | dict(double_blocks=1))
    step, batch, state = step_of(run), batch_of(run), init_state(run, toy_params(run.model))
    kinds, before, losses = jax.tree.map(lambda x: x.dtype, state), state.params, []
    for _ in range(30):
        state, found = step(state, batch)
        losses.append(float(found["loss"]))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert jax.tree.map(lambda x: x.dtype, state) == kinds
    if "frozen" in " ".join(changes):
        assert same(state.params["double"], before["double"])
        assert not same(state.params["single"]["attention"], before["single"]["attention"])


def test_a_momentum_lies_as_its_matrix_does():
    run = toy_run("unused", "unused", "optimizer.kind=muon", hidden=64, rope_axes=(4, 14, 14))
    places = make_shardings(
        jax.eval_shape(partial(init_state, run)), AbstractMesh((1, 2, 2), MESH_AXES)
    )
    found = {path: place.spec for path, place in flatten_any(places.optimizer)}
    matrices = [
        (path, place.spec)
        for path, place in flatten_any(places.params)
        if path.startswith(("double", "single")) and path.endswith("kernel")
    ]
    for path, spec in matrices:
        momenta = [other for name, other in found.items() if name.endswith(f"mu/{path}")]
        assert momenta == [spec], path
    assert any(spec for _, spec in matrices)


def flatten_any(tree):
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield (
            "/".join(
                str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", "")))) for k in keys
            ),
            leaf,
        )


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_over_two_devices(tmp_path, data_directory):
    changes = ["optimizer.kind=muon", "optimizer.mu_dtype=bfloat16", "train.steps=6"]
    whole, broken = (
        toy_run(tmp_path / name, data_directory, *changes, **PLAIN) for name in ("whole", "broken")
    )
    assert train(whole) == 6
    assert train(config.override(broken, ["train.steps=3"])) == 3
    assert train(broken) == 6

    def states(run):
        checkpoints = Checkpoints(run.directory / "checkpoints")
        return checkpoints.restore(6, jax.eval_shape(partial(init_state, run)))

    assert same(states(whole), states(broken))
    two = config.override(whole, ["name=two", "mesh.fsdp=2", "mesh.data=1"])
    process = command(two, devices=2)
    assert process.returncode == 0, process.output
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in (whole, two)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
