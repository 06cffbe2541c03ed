"""Muon against singular vectors from NumPy, with other settings, and in a resumed run."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from radiance import config
from radiance.base.trees import flatten_tree, leaf_path
from radiance.distributed.sharding import MESH_AXES, make_shardings
from radiance.training.adam import scale_by_adam
from radiance.training.checkpoints import Checkpoints
from radiance.training.lora import init_adapters
from radiance.training.muon import scale_by_muon_and_adam
from radiance.training.step import init_state
from tests.helpers.toy_models import toy_model, toy_params
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

MUON = config.Optimizer(kind="muon")


def noise_like(params, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.standard_normal(x.shape, np.float32)), params)


def matrices_of(path, leaf):
    """Return the matrices [count, in, out] of a leaf."""
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


def test_updates_are_the_orthogonalized_momentum():
    params = toy_params(toy_model(text_refiner_blocks=2, head="linear", modulation="none"))
    gradients, optimizer = noise_like(params), scale_by_muon_and_adam(MUON)
    updates = flatten_tree(jax.jit(optimizer.update)(gradients, optimizer.init(params), params)[0])
    adam = flatten_tree(scale_by_adam(MUON).update(gradients, scale_by_adam(MUON).init(params))[0])
    num_matrices = 0
    for path, gradient in flatten_tree(gradients).items():
        if not (path.startswith(("refiner", "double", "single")) and path.endswith("kernel")):
            np.testing.assert_array_equal(updates[path], adam[path], err_msg=path)
            continue
        for g, u in zip(matrices_of(path, gradient), matrices_of(path, updates[path]), strict=True):
            left, _, right = np.linalg.svd(g, full_matrices=False)
            u = u / (0.2 * np.sqrt(max(u.shape)))
            # Five iterations bring singular values between 0.7 and 1.2, and a few of square noise
            # below; the singular vectors are those of g.
            core = left.T @ u @ right.T
            np.testing.assert_allclose(left @ core @ right, u, atol=1e-4, err_msg=path)
            np.testing.assert_allclose(core, np.diag(np.diag(core)), atol=1e-3, err_msg=path)
            assert 0.6 < np.median(np.diag(core)) < 1.25, path
            assert np.diag(core).min() > 0, path
            assert 0.12 < np.sqrt((updates[path] ** 2).mean()) < 0.25
            num_matrices += 1
    assert num_matrices == 2 * (3 + 3) + 2 * 2 * (3 + 3) + 3 * (3 + 3)


def test_the_second_step_uses_nesterovs_momentum():
    """After gradients g and h it is β ((1 − β) β g + (1 − β) h) / (1 − β³) + (1 − β) h / (1 − β²).

    Its length does not matter.
    """
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
        assert values.shape[1] == 3, path
        assert (values > 0.6).all(), path
        assert (values < 1.25).all(), path


def test_a_momentum_in_bfloat16_is_right_on_average():
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
def test_muon_trains(changes):
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
        state, result = step(state, batch)
        losses.append(float(result["loss"]))
    assert np.mean(losses[-5:]) < 0.6 * np.mean(losses[:5])
    assert jax.tree.map(lambda x: x.dtype, state) == kinds
    if "frozen" in " ".join(changes):
        assert same(state.params["double"], before["double"])
        assert not same(state.params["single"]["attention"], before["single"]["attention"])


def test_a_momentum_has_the_sharding_of_its_matrix():
    run = toy_run("unused", "unused", "optimizer.kind=muon", hidden=64, rope_axes=(4, 14, 14))
    shardings = make_shardings(
        jax.eval_shape(partial(init_state, run)), AbstractMesh((1, 2, 2), MESH_AXES)
    )
    specs = {path: sharding.spec for path, sharding in flatten_any(shardings.optimizer_state)}
    matrices = [
        (path, sharding.spec)
        for path, sharding in flatten_any(shardings.params)
        if path.startswith(("double", "single")) and path.endswith("kernel")
    ]
    for path, spec in matrices:
        momenta = [other for name, other in specs.items() if name.endswith(f"mu/{path}")]
        assert momenta == [spec], path
    assert any(spec for _, spec in matrices)


def flatten_any(tree):
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        yield leaf_path(keys), leaf


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_runs_on_two_devices(tmp_path, data_directory):
    changes = ["optimizer.kind=muon", "optimizer.mu_dtype=bfloat16", "train.steps=6"]
    complete, interrupted = (
        toy_run(tmp_path / name, data_directory, *changes, **PLAIN)
        for name in ("complete", "interrupted")
    )
    assert train(complete) == 6
    assert train(config.override(interrupted, ["train.steps=3"])) == 3
    assert train(interrupted) == 6

    def states(run):
        checkpoints = Checkpoints(run.run_dir / "checkpoints")
        return checkpoints.restore(6, jax.eval_shape(partial(init_state, run)))

    assert same(states(complete), states(interrupted))
    two = config.override(complete, ["name=two", "mesh.fsdp=2", "mesh.data=1"])
    train_on_devices(two, 2)
    losses = [[row["loss"] for row in metrics(run) if "loss" in row] for run in (complete, two)]
    np.testing.assert_allclose(*losses, rtol=1e-3)
