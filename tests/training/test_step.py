from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.flow import timesteps
from radiance.flow.coupling import coupling_costs
from radiance.training.parameter_groups import split_frozen
from radiance.training.step import (
    add_noise_and_times,
    compute_image_losses,
    compute_validation_losses,
    init_state,
)
from tests.helpers.toy_models import apply, toy_params
from tests.helpers.toy_runs import PLAIN, batch_of, same, step_of, toy_run

FROZEN = "optimizer.frozen=modulation,head,double/image"


@pytest.fixture
def run():
    return toy_run("unused", "unused")


@pytest.fixture
def plain():
    return toy_run("unused", "unused", **PLAIN)


def make_state(run):
    return init_state(run, toy_params(run.model))


def test_a_step_is_pure_and_updates_everything(run):
    step, batch = step_of(run), batch_of(run)
    a, metrics = step(make_state(run), batch)
    b, _ = step(make_state(run), batch)
    assert same(a, b)
    assert int(a.step) == 1
    assert np.isfinite(metrics["loss"])
    changed = jax.tree.map(
        lambda x, y: bool((np.asarray(x) != np.asarray(y)).any()), a.params, make_state(run).params
    )
    unchanged = {
        "/".join(k.key for k in path)
        for path, is_changed in jax.tree_util.tree_flatten_with_path(changed)[0]
        if not is_changed
    }
    # A bias of keys shifts all logits by the same amount.
    assert unchanged <= {
        "double/image/attention/qkv/bias",
        "double/text/attention/qkv/bias",
        "single/attention/qkv/bias",
    }
    assert not same(a.ema["0.9"], a.ema["0.99"]) or int(a.step) < 100  # both are ramped up


def test_each_step_has_its_own_noise(run):
    batch = batch_of(run)
    batches = [
        add_noise_and_times(run, batch, jax.random.fold_in(jax.random.key(0), i)) for i in range(2)
    ]
    assert not np.array_equal(batches[0]["noise"], batches[1]["noise"])
    assert not np.array_equal(batches[0]["time"], batches[1]["time"])


def test_the_loss_is_that_of_the_objective(run):
    batch = add_noise_and_times(run, batch_of(run), jax.random.key(5))
    params = toy_params(run.model)
    losses = jax.jit(partial(compute_image_losses, run))(params, batch)
    t = batch["time"][:, None, None, None]
    noisy = (1 - t) * batch["image"] + t * batch["noise"]
    velocity = apply(
        run.model,
        params,
        dict(image=noisy, text=batch["text"], lengths=batch["lengths"], time=batch["time"]),
    )
    clean = noisy - t * velocity
    expected = (np.asarray(clean - batch["image"], np.float64) ** 2).mean(axis=(1, 2, 3)) / (
        np.asarray(batch["time"], np.float64) + 0.05
    ) ** 2
    np.testing.assert_allclose(losses, expected, rtol=1e-3)


def test_a_velocity_loss_can_be_weighted_like_an_image_loss():
    plain = toy_run("unused", "unused", **PLAIN | dict(prediction="velocity"))
    runs = plain, config.override(plain, ["flow.loss_weighting=x0"])
    batch = add_noise_and_times(plain, batch_of(plain), jax.random.key(5))
    losses = jax.jit(
        lambda params, batch: [compute_image_losses(run, params, batch) for run in runs]
    )(toy_params(plain.model), batch)
    np.testing.assert_allclose(
        losses[1], losses[0] * (batch["time"] / (batch["time"] + 0.05)) ** 2, rtol=1e-5
    )


def test_microbatches_give_the_gradient_of_the_batch(plain):
    batch = batch_of(plain) | {"weight": jnp.linspace(0, 2, plain.data.batch_size)}
    whole, metrics = step_of(plain)(make_state(plain), batch)
    accumulated, accumulated_metrics = step_of(
        config.override(plain, ["optimizer.gradient_accumulation_steps=4"])
    )(make_state(plain), batch)
    np.testing.assert_allclose(metrics["loss"], accumulated_metrics["loss"], rtol=1e-5)
    key = jax.random.fold_in(jax.random.key(plain.train.seed), 0)
    losses = jax.jit(partial(compute_image_losses, plain))(
        make_state(plain).params, add_noise_and_times(plain, batch, key)
    )
    np.testing.assert_allclose(
        metrics["loss"], losses[1:].mean(), rtol=1e-5
    )  # the first has weight zero
    np.testing.assert_allclose(
        metrics["gradient_norm"], accumulated_metrics["gradient_norm"], rtol=1e-4
    )
    for x, y in zip(
        jax.tree.leaves(whole.optimizer_state[1].mu),
        jax.tree.leaves(accumulated.optimizer_state[1].mu),
    ):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_gradient_norms_of_parts_add_up_to_the_norm(run):
    _, metrics = step_of(run)(make_state(run), batch_of(run))
    norms = metrics["gradient_norms"]
    assert norms.keys() == make_state(run).params.keys()
    assert all(norm > 0 for norm in norms.values())
    assert metrics["gradient_norm"] == pytest.approx(
        np.sqrt(sum(float(norm) ** 2 for norm in norms.values())), rel=1e-5
    )
    frozen = config.override(run, [FROZEN])
    state, metrics = step_of(frozen)(make_state(frozen), batch_of(run))
    assert metrics["gradient_norms"].keys() == make_state(run).params.keys() - {
        "modulation",
        "head",
    }
    # Norms are those before clipping; the first moment holds the clipped gradient.
    clip = min(1, 1 / float(metrics["gradient_norm"]))
    for part, moment in state.optimizer_state[1].mu.items():
        expected = np.sqrt(
            sum(float((np.asarray(x, np.float32) ** 2).sum()) for x in jax.tree.leaves(moment))
        ) / (0.1 * clip)
        assert metrics["gradient_norms"][part] == pytest.approx(expected, rel=1e-4)


def test_a_weight_of_zero_removes_an_image(plain):
    batch = batch_of(plain)
    weight = jnp.ones(plain.data.batch_size).at[0].set(0)
    changed = batch["image"].at[0].set(0.7)
    a, _ = step_of(plain)(make_state(plain), batch | {"weight": weight})
    b, _ = step_of(plain)(make_state(plain), batch | {"weight": weight, "image": changed})
    for x, y in zip(
        jax.tree.leaves(a.optimizer_state[1].mu), jax.tree.leaves(b.optimizer_state[1].mu)
    ):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_non_finite_step_is_skipped_and_counted(plain):
    step, batch = step_of(plain), batch_of(plain)
    state, _ = step(make_state(plain), batch)
    nan_batch = batch | {"image": batch["image"].at[0, 0, 0, 0].set(jnp.nan)}
    after, metrics = step(state, nan_batch)
    assert same(
        (after.params, after.ema, after.optimizer_state),
        (state.params, state.ema, state.optimizer_state),
    )
    assert (
        int(after.step),
        int(after.skipped_steps),
        int(metrics["consecutive_skipped_steps"]),
    ) == (
        2,
        1,
        1,
    )
    good, metrics = step(after, batch)
    assert int(good.skipped_steps) == 1
    assert int(metrics["consecutive_skipped_steps"]) == 0
    assert not same(good.params, after.params)


def test_frozen_parts_do_not_change_and_have_no_moments(run):
    frozen = config.override(run, [FROZEN])
    state, _ = step_of(frozen)(make_state(frozen), batch_of(run))
    before = make_state(frozen).params
    for part in ("modulation", "head"):
        assert same(state.params[part], before[part])
    assert same(state.params["double"]["image"], before["double"]["image"])
    assert not same(state.params["double"]["text"], before["double"]["text"])
    for tree in (state.optimizer_state[1].mu, state.ema["0.9"]):
        assert jax.tree.structure(tree) == jax.tree.structure(
            split_frozen(before, frozen.optimizer.frozen)[0]
        )


def test_remat_and_head_chunks_do_not_change_gradients(run):
    batch = batch_of(run)
    plain, _ = step_of(run)(make_state(run), batch)
    other, _ = step_of(config.override(run, ["compute.remat=full", "compute.head_chunk_size=3"]))(
        make_state(run), batch
    )
    for x, y in zip(
        jax.tree.leaves(plain.optimizer_state[1].mu), jax.tree.leaves(other.optimizer_state[1].mu)
    ):
        np.testing.assert_allclose(x, y, atol=2e-5)


def test_bfloat16_keeps_float32_masters(plain):
    half = config.override(plain, ["compute.dtype=bfloat16"])
    state, metrics = step_of(half)(make_state(half), batch_of(plain))
    assert {
        x.dtype for x in jax.tree.leaves((state.params, state.ema, state.optimizer_state[1].mu))
    } == {jnp.dtype("float32")}
    full = step_of(plain)(make_state(plain), batch_of(plain))[1]
    np.testing.assert_allclose(metrics["loss"], full["loss"], rtol=0.05)


def test_bfloat16_states_keep_their_types_and_stay_close(run):
    half = config.override(
        run, [f"optimizer.{name}_dtype=bfloat16" for name in ("weights", "mu", "nu")]
    )
    state = make_state(half)
    new, metrics = step_of(half)(state, batch_of(run))
    assert jax.tree.map(lambda x: x.dtype, new) == jax.tree.map(lambda x: x.dtype, state)
    assert (
        new.params["double"]["image"]["mlp"]["linear_in"]["kernel"].dtype
        == new.optimizer_state[1].nu["patch_embed"]["bias"].dtype
        == jnp.bfloat16
    )
    assert (
        new.params["head"]["embedder"]["kernel"].dtype
        == new.params["patch_embed"]["bias"].dtype
        == jnp.float32
    )
    exact, full = step_of(run)(make_state(run), batch_of(run))
    np.testing.assert_allclose(metrics["loss"], full["loss"], rtol=0.02)
    for x, y in zip(jax.tree.leaves(new.params), jax.tree.leaves(exact.params)):
        np.testing.assert_allclose(
            x.astype(np.float32), y, rtol=0, atol=2**-6 * max(np.abs(y).max(), 1e-3)
        )


def test_optimal_transport_pairs_the_batch(run):
    batch, key = batch_of(run), jax.random.key(2)
    independent = add_noise_and_times(run, batch, key)
    transported = add_noise_and_times(
        config.override(run, ["flow.coupling=optimal_transport"]), batch, key
    )

    def cost(noise):
        return float(jnp.trace(coupling_costs(batch["image"], noise)))

    assert cost(transported["noise"]) < cost(independent["noise"])
    assert np.array_equal(transported["time"], independent["time"])
    assert np.array_equal(transported["image"], independent["image"])
    assert np.array_equal(
        np.sort(transported["noise"].ravel()), np.sort(independent["noise"].ravel())
    )
    within = add_noise_and_times(config.override(run, ["flow.coupling=within_caption"]), batch, key)
    assert np.array_equal(
        within["noise"], independent["noise"]
    )  # because no two captions are equal


def test_timestep_weighting_is_the_density_of_its_distribution(run):
    weighted = config.override(
        run, ["flow.timestep_distribution=uniform", "flow.timestep_weighting=parabola"]
    )
    batch = add_noise_and_times(
        weighted, batch_of(run) | {"weight": jnp.full(run.data.batch_size, 2.0)}, jax.random.key(2)
    )
    np.testing.assert_allclose(
        batch["weight"], 2 * timesteps.timestep_density(run.flow, batch["time"], 4), rtol=1e-5
    )


def test_validation_losses_are_deterministic_and_binned(run):
    validate = jax.jit(partial(compute_validation_losses, run))
    params, batch = toy_params(run.model), batch_of(run)
    losses = validate(params, batch, jnp.int32(0))
    assert losses.shape == (run.data.batch_size, 10)
    assert np.isfinite(losses).all()
    assert np.array_equal(losses, validate(params, batch, jnp.int32(0)))
    assert not np.array_equal(losses, validate(params, batch, jnp.int32(1)))
    mean = losses.mean(axis=0)
    assert mean[0] > mean[9]  # an untrained x0 model is weighted by 1 / (t + ε)²


@pytest.mark.parametrize(
    ("modulation", "head"), [("per_block", "linear"), ("shared", "nerf_linear"), ("none", "linear")]
)
def test_every_variant_takes_a_step(modulation, head):
    run = toy_run(
        "unused",
        "unused",
        modulation=modulation,
        head=head,
        registers=2,
        masking="off",
        prediction="velocity",
    )
    _, metrics = step_of(run)(make_state(run), batch_of(run))
    assert np.isfinite(metrics["loss"])
    assert np.isfinite(metrics["gradient_norm"])
