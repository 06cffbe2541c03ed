"""Timesteps, loss and coupling against float64 references in SciPy and NumPy."""

from dataclasses import replace
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import integrate, special, stats
from scipy.optimize import linear_sum_assignment

from radiance.config import Compute, Flow, Model
from radiance.flow.coupling import assign_noise, caption_distances, couple_noise, coupling_costs
from radiance.flow.objective import (
    loss_weights,
    mean_squared_errors,
    mix,
    velocity_divisor,
    velocity_target,
    weighted_mean,
)
from radiance.flow.timesteps import (
    resolution_shift,
    sample_timesteps,
    shift_times,
    timestep_density,
    timestep_quantile,
    timestep_weights,
)
from radiance.model.transformer import bind_model, init_params

# --- timestep distributions -----------------------------------------------------------------------


def parabola(t):
    def weight(t):
        return 2 - 7.7 * (t - 0.5) ** 2

    return weight(t) / integrate.quad(weight, 0, 1)[0]


def logit_density(distribution):
    """Return the density of t for which logit(t) has the given distribution."""
    return lambda t: distribution.pdf(special.logit(t)) / (t * (1 - t))


# name: settings, image tokens, density in float64. The mean by resolution is 0.5 at 256 tokens,
# 1.15 at 4096, and linear between.
DISTRIBUTIONS = {
    "uniform": (Flow(timestep_distribution="uniform"), 256, lambda t: np.ones_like(t)),
    "parabola": (Flow(timestep_distribution="parabola"), 256, parabola),
    "logistic 256": (
        Flow(timestep_distribution="logistic"),
        256,
        logit_density(stats.logistic(0.5, 1)),
    ),
    "logistic 2176": (
        Flow(timestep_distribution="logistic"),
        2176,
        logit_density(stats.logistic(0.825, 1)),
    ),
    "logistic 4096": (
        Flow(timestep_distribution="logistic"),
        4096,
        logit_density(stats.logistic(1.15, 1)),
    ),
    "logistic fixed": (
        Flow(timestep_distribution="logistic", logit_mean=-0.3, logit_std=0.8),
        4096,
        logit_density(stats.logistic(-0.3, 0.8)),
    ),
    "logit_normal": (
        Flow(timestep_distribution="logit_normal"),
        4096,
        logit_density(stats.norm(0, 1)),
    ),
    "logit_normal fixed": (
        Flow(timestep_distribution="logit_normal", logit_mean=-0.8, logit_std=0.8),
        256,
        logit_density(stats.norm(-0.8, 0.8)),
    ),
}
each_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)

CELLS = 2**14
EDGES = np.arange(CELLS + 1) / CELLS
MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2  # exact in float32


@lru_cache
def cumulative_distribution(name):
    """Integrate `timestep_density` up to each of EDGES, by the midpoint rule."""
    flow, tokens, _ = DISTRIBUTIONS[name]
    density = np.asarray(timestep_density(flow, jnp.float32(MIDDLES), tokens), np.float64)
    return np.concatenate([[0], np.cumsum(density) / CELLS])


@each_distribution
def test_densities_equal_the_references(name):
    flow, tokens, reference = DISTRIBUTIONS[name]
    t = np.linspace(0.01, 0.99, 197)
    np.testing.assert_allclose(
        timestep_density(flow, jnp.float32(t), tokens), reference(t), rtol=2e-5
    )


@each_distribution
def test_densities_integrate_to_one(name):
    assert cumulative_distribution(name)[-1] == pytest.approx(1, abs=1e-5)


@each_distribution
def test_quantiles_invert_the_integral_of_the_density(name):
    flow, tokens, _ = DISTRIBUTIONS[name]
    u = np.linspace(0, 1, 1001)
    t = np.asarray(timestep_quantile(flow, jnp.float32(u), tokens), np.float64)
    np.testing.assert_allclose(np.interp(t, EDGES, cumulative_distribution(name)), u, atol=1e-5)


@each_distribution
def test_samples_follow_the_density(name):
    flow, tokens, _ = DISTRIBUTIONS[name]
    times = sample_timesteps(jax.random.key(7), flow, 50_000, tokens)
    assert times.shape == (50_000,)
    assert times.dtype == jnp.float32
    times = np.asarray(times, np.float64)
    assert (
        stats.kstest(times, lambda t: np.interp(t, EDGES, cumulative_distribution(name))).pvalue
        > 0.05
    )
    for other in DISTRIBUTIONS.keys() - {name}:  # the test distinguishes them
        assert (
            stats.kstest(
                times, lambda t, other=other: np.interp(t, EDGES, cumulative_distribution(other))
            ).pvalue
            < 1e-9
        )


@each_distribution
def test_quantiles_at_the_ends(name):
    flow, tokens, _ = DISTRIBUTIONS[name]
    steps = np.arange(64) * 2.0**-24
    u = np.float32(np.concatenate([steps, np.linspace(0.001, 0.999, 999), 1 - steps[:0:-1]]))
    assert u[0] == 0
    assert u[-1] == np.nextafter(np.float32(1), np.float32(0))
    # Compiled, because fused operations round differently.
    t = np.asarray(jax.jit(lambda u: timestep_quantile(flow, u, tokens))(u))
    assert np.isfinite(t).all()
    assert t.min() >= 0
    assert t.max() <= 1
    assert t[0] == pytest.approx(0, abs=1e-6)
    assert (np.diff(t) >= -1e-6).all()


def test_parabola_equals_the_authors_grid_distribution():
    """lodestone-rock/flow samples 1000 grid points; quantiles differ by at most 1.5 cells."""
    grid = np.arange(1000) / 999
    weight = 2 - 7.7 * (grid - 0.5) ** 2
    cumulative = np.cumsum(weight / weight.sum())
    u = np.float32((np.arange(20_000) + 0.5) / 20_000)
    theirs = grid[np.minimum(np.searchsorted(cumulative, u, side="right"), 999)]
    ours = np.asarray(timestep_quantile(Flow(timestep_distribution="parabola"), u, 256), np.float64)
    assert np.abs(ours - theirs).max() < 1.5 / 999
    assert abs(ours.mean() - 0.5) < 1e-5
    assert ours.std() == pytest.approx(0.2277, abs=1e-4)


@pytest.mark.parametrize(
    ("flow", "tokens", "mu", "sigma"),
    [
        (Flow(timestep_distribution="logistic"), 256, 0.5, 1),
        (Flow(timestep_distribution="logistic"), 4096, 1.15, 1),
        (Flow(timestep_distribution="logistic", logit_mean=0.9), 256, 0.9, 1),
        (Flow(timestep_distribution="logistic", logit_mean=-1.5, logit_std=1.7), 256, -1.5, 1.7),
    ],
)
def test_logistic_equals_the_flux_shift_of_uniform_numbers(flow, tokens, mu, sigma):
    u = np.linspace(0.001, 0.999, 999)
    expected = np.exp(mu) / (np.exp(mu) + (1 / u - 1) ** sigma)
    np.testing.assert_allclose(timestep_quantile(flow, jnp.float32(u), tokens), expected, rtol=1e-5)


def test_logit_normal_equals_the_sigmoid_of_a_normal():
    u = np.linspace(0.001, 0.999, 999)
    flow = Flow(timestep_distribution="logit_normal", logit_mean=-0.8, logit_std=1.3)
    np.testing.assert_allclose(
        timestep_quantile(flow, jnp.float32(u), 256),
        special.expit(-0.8 + 1.3 * stats.norm.ppf(u)),
        rtol=2e-5,
    )


def test_shift_follows_its_formula():
    assert [resolution_shift(n) for n in (256, 2176, 4096)] == pytest.approx([0.5, 0.825, 1.15])
    t = np.linspace(0.05, 1, 20)
    np.testing.assert_allclose(shift_times(t, 0.0), t, rtol=1e-12)
    np.testing.assert_allclose(
        shift_times(t, np.log(3)), 3 * t / (1 + 2 * t), rtol=1e-12
    )  # SD3's form of the same map
    assert (np.asarray(shift_times(jnp.array([0.0, 1.0]), 1.15)) == [0, 1]).all()


def test_keys_give_different_times():
    a, b = (sample_timesteps(jax.random.key(k), Flow(), 8, 256) for k in (0, 1))
    assert not np.isin(a, b).any()


@pytest.mark.parametrize(
    ("distribution", "target"),
    [("uniform", "parabola"), ("parabola", "uniform"), ("parabola", "parabola")],
)
def test_weights_give_the_expectation_under_the_target_distribution(distribution, target):
    """Compare the loss and the gradient of a fit of a·t to t², whose error depends on time."""

    def expected_loss(flow, a):
        t = timestep_quantile(flow, (jnp.arange(4096) + 0.5) / 4096, 256)
        return (timestep_weights(flow, t, 256) * (t**2 - a * t) ** 2).mean()

    weighted, reference = (
        jax.value_and_grad(lambda a, flow=flow: expected_loss(flow, a))(0.5)
        for flow in (
            Flow(timestep_distribution=distribution, timestep_weighting=target),
            Flow(timestep_distribution=target),
        )
    )
    np.testing.assert_allclose(weighted, reference, rtol=1e-3)
    if distribution != target:
        assert (
            abs(
                weighted[1]
                / jax.grad(lambda a: expected_loss(Flow(timestep_distribution=distribution), a))(
                    0.5
                )
                - 1
            )
            > 0.05
        )


# --- interpolation and loss -----------------------------------------------------------------------

TIMES = np.array([0.0, 0.02, 0.3, 1.0])
WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5])
X0 = Model(
    patch=4, hidden=8, heads=1, rope_axes=(4, 2, 2), double_blocks=0, single_blocks=1, text_dim=4,
    modulation="none", head="linear", prediction="x0",
)  # fmt: skip


def sample_images(seed, batch=4):
    return jnp.float32(np.random.RandomState(seed).standard_normal((batch, 4, 4, 3)))


def test_mix_interpolates():
    image, noise = sample_images(0), sample_images(1)
    x = np.asarray(mix(image, noise, jnp.float32(TIMES)))
    np.testing.assert_allclose(
        x,
        np.stack([(1 - t) * a + t * b for t, a, b in zip(TIMES, np.float64(image), noise)]),
        atol=1e-6,
    )
    np.testing.assert_array_equal(x[0], image[0])
    np.testing.assert_array_equal(x[3], noise[3])


def test_the_target_of_velocity_models_is_noise_minus_image():
    image, noise = sample_images(0), sample_images(1)
    for flow in (Flow(), Flow(min_divisor_mode="clamp")):
        np.testing.assert_array_equal(
            velocity_target(flow, "velocity", image, noise, jnp.float32(TIMES)), noise - image
        )


def test_velocity_divisor_has_a_minimum():
    np.testing.assert_allclose(
        velocity_divisor(Flow(min_divisor=0.05), jnp.float32(TIMES)),
        [0.05, 0.07, 0.35, 1.05],
        rtol=1e-6,
    )
    np.testing.assert_allclose(
        velocity_divisor(Flow(min_divisor=0.05, min_divisor_mode="clamp"), jnp.float32(TIMES)),
        [0.05, 0.05, 0.3, 1],
        rtol=1e-6,
    )


def make_loss(flow, model_config, image, noise, weights=WEIGHTS):
    """Return the training loss as a function of the last layer's output, for the real model."""
    params = init_params(model_config, jax.random.key(0))
    time, text = jnp.float32(TIMES), jnp.zeros((4, 2, 4))

    def loss(predicted):
        model = bind_model(model_config, Compute(dtype="float32"), params)
        model.head = lambda *_: predicted
        velocity = model(
            mix(image, noise, time),
            text,
            jnp.ones(4, jnp.int32),
            time,
            divisor=velocity_divisor(flow, time),
        )
        target = velocity_target(flow, model_config.prediction, image, noise, time)
        return weighted_mean(mean_squared_errors(velocity, target), jnp.float32(weights))

    return jax.jit(loss)


@pytest.mark.parametrize("mode", ["add", "clamp"])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_loss_and_gradient_follow_their_formulas(prediction, mode):
    """Loss is Σ w·mean|error|²/d² / b, its gradient 2·w·error/d² / (b·values).

    d is 1 for velocity, and t + ε or max(t, ε) for x0.
    """
    flow = Flow(min_divisor=0.05, min_divisor_mode=mode)
    image, noise, output = sample_images(0), sample_images(1), sample_images(2)
    value, gradient = jax.value_and_grad(
        make_loss(flow, replace(X0, prediction=prediction), image, noise)
    )(output)

    t = TIMES[:, None, None, None]
    image, noise, output = (np.float64(x) for x in (image, noise, output))
    if prediction == "velocity":
        error, divisor = output - (noise - image), np.ones_like(t)
    else:
        error, divisor = output - image, t + 0.05 if mode == "add" else np.maximum(t, 0.05)
    w = WEIGHTS[:, None, None, None]
    assert float(value) == pytest.approx((w * error**2 / divisor**2).mean(), rel=1e-5)
    expected = 2 * w * error / divisor**2 / error.size
    assert np.isfinite(gradient).all()
    assert np.abs(expected[0]).max() > 0
    for g, e in zip(gradient, expected):
        np.testing.assert_allclose(g, e, atol=2e-5 * np.abs(e).max())


def test_velocity_models_can_be_trained_with_the_loss_of_x0_models():
    """Both predictions imply the same image."""
    flow = Flow(loss_weighting="x0")
    image, noise, predicted_x0 = (sample_images(seed) for seed in range(3))
    time = jnp.float32(TIMES[1:])  # no velocity implies an image at time 0
    velocity = (mix(image, noise, jnp.float32(TIMES)) - predicted_x0)[1:] / time[
        :, None, None, None
    ]
    ours = mean_squared_errors(velocity, (noise - image)[1:]) * loss_weights(flow, "velocity", time)
    np.testing.assert_allclose(
        ours,
        np.asarray((predicted_x0 - image) ** 2).mean(axis=(1, 2, 3))[1:] / (TIMES[1:] + 0.05) ** 2,
        rtol=1e-4,
    )
    for same, prediction in ((flow, "x0"), (Flow(), "velocity")):
        assert (np.asarray(loss_weights(same, prediction, time)) == 1).all()


def test_the_gradient_of_x0_models_equals_finite_differences():
    image, noise, output, direction = (sample_images(seed) for seed in range(4))
    loss = make_loss(Flow(), X0, image, noise, weights=np.ones(4))
    slope = float(loss(output + 0.5 * direction)) - float(
        loss(output - 0.5 * direction)
    )  # exact: the loss is quadratic
    assert float((jax.grad(loss)(output) * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_an_exact_prediction_has_no_loss():
    image, noise = sample_images(0), sample_images(1)
    assert float(make_loss(Flow(), X0, image, noise)(image)) < 1e-9


def test_squared_errors_are_float32_and_per_image():
    velocity, target = jnp.asarray(sample_images(0)).astype(jnp.bfloat16), sample_images(1)
    losses = mean_squared_errors(velocity, target)
    assert losses.dtype == jnp.float32
    expected = (
        ((np.float64(velocity.astype(jnp.float32)) - target) ** 2).reshape(4, -1).mean(axis=1)
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_an_image_of_weight_two_counts_twice():
    losses = jnp.array([3.0, 5.0, 7.0])

    def total(losses, weights):
        return float(weighted_mean(jnp.asarray(losses), jnp.asarray(weights))) * len(losses)

    assert total(losses, [1.0, 2.0, 1.0]) == pytest.approx(total([3.0, 5.0, 5.0, 7.0], np.ones(4)))
    assert total(losses, [1.0, 0.0, 1.0]) == pytest.approx(total([3.0, 7.0], np.ones(2)))
    assert float(weighted_mean(losses[:1], jnp.array([2.0]))) == 6
    assert float(weighted_mean(losses, jnp.ones(3))) == pytest.approx(5)


# --- coupling -------------------------------------------------------------------------------------


@jax.jit
def assign_jitted(image, noise):
    return assign_noise(coupling_costs(image, noise))


def costs_float64(image, noise):
    x, y = (np.float64(z).reshape(len(z), -1) for z in (image, noise))
    return (
        -np.einsum("id,jd->ij", x, y)
        / np.linalg.norm(x, axis=1)[:, None]
        / np.linalg.norm(y, axis=1)
    )


def sample_scaled_images(seed, batch):
    """Sample images with different norms, which the cosine must ignore."""
    scales = np.linspace(0.2, 3, batch, dtype=np.float32)
    return sample_images(seed, batch) * scales[:, None, None, None]


def test_costs_are_minus_the_cosines():
    image, noise = sample_scaled_images(0, 7), sample_scaled_images(1, 7)[::-1]
    expected = costs_float64(image, noise)
    np.testing.assert_allclose(coupling_costs(image, noise), expected, atol=1e-6)


@pytest.mark.parametrize(("batch", "seeds"), [(1, 1), (2, 8), (12, 6)])
def test_the_assignment_has_the_least_cost(batch, seeds):
    for seed in range(seeds):
        image, noise = (
            sample_scaled_images(seed, batch),
            sample_scaled_images(seed + 100, batch)[::-1],
        )
        columns = np.asarray(assign_jitted(image, noise))
        assert sorted(columns) == list(range(batch))
        costs = costs_float64(image, noise)
        total = costs[np.arange(batch), columns].sum()
        assert total <= np.trace(costs) + 1e-9
        assert total == pytest.approx(
            costs[linear_sum_assignment(costs)].sum(), abs=1e-5 * np.abs(costs).max()
        )


def test_the_assignment_is_the_index_of_the_noise():
    """noise[assignment] belongs to the images; in a cycle of 3 the inverse permutation differs."""
    image = sample_images(0, 5)
    noise = image[np.array([1, 2, 0, 4, 3])]
    columns = assign_noise(coupling_costs(image, noise))  # not compiled
    np.testing.assert_array_equal(noise[columns], image)
    np.testing.assert_array_equal(columns, [2, 0, 1, 4, 3])
    np.testing.assert_array_equal(columns, assign_jitted(image, noise))


def test_ties_and_zero_norms_give_the_same_permutation_each_time():
    for image in (jnp.zeros((12, 4, 4, 3)), jnp.ones((12, 4, 4, 3))):
        assert np.isfinite(coupling_costs(image, sample_images(1, 12))).all()
        first, second = (assign_jitted(image, sample_images(1, 12)) for _ in range(2))
        assert sorted(np.asarray(first)) == list(range(12))
        np.testing.assert_array_equal(first, second)


# Captions 0, 2, 5 and 1, 4 are equal up to their lengths.
CAPTIONS = np.array([0, 1, 0, 2, 1, 0, 3, 4])


def make_captioned_batch():
    rows = np.random.RandomState(3).standard_normal((5, 3, 4)).astype(np.float32)[CAPTIONS]
    rows[:, 2] = np.random.RandomState(4).standard_normal((8, 4))
    lengths = jnp.full(8, 2, jnp.int32)
    return (
        sample_scaled_images(3, 8),
        sample_scaled_images(103, 8)[::-1],
        jnp.asarray(rows),
        lengths,
    )


def test_caption_distances_are_those_of_mean_directions():
    *_, text, lengths = make_captioned_batch()
    means = np.float64(text[:, :2]).mean(axis=1)
    means /= np.linalg.norm(means, axis=1)[:, None]
    distances = np.asarray(caption_distances(text, lengths))
    np.testing.assert_allclose(distances, ((means[:, None] - means) ** 2).sum(-1), atol=1e-6)
    np.testing.assert_array_equal(distances == 0, CAPTIONS[:, None] == CAPTIONS)


# name: settings, and what they add to the costs of all pairs, for SciPy to solve; the unit of
# caption distances is WEIGHT
WEIGHT = 0.2
DIFFERENT, BLOCKS = CAPTIONS[:, None] != CAPTIONS, np.arange(8)[:, None] // 4 != np.arange(8) // 4
COUPLINGS = {
    "global": (Flow(coupling="optimal_transport"), lambda distances: 0),
    "local": (
        Flow(coupling="optimal_transport", coupling_group_size=4),
        lambda distances: 1e6 * BLOCKS,
    ),
    "c2ot": (
        Flow(coupling="optimal_transport", coupling_caption_weight=1),
        lambda distances: distances,
    ),
    "within_caption": (Flow(coupling="within_caption"), lambda distances: 1e6 * DIFFERENT),
    "both": (
        Flow(coupling="within_caption", coupling_group_size=4),
        lambda distances: 1e6 * (DIFFERENT | BLOCKS),
    ),
}


def test_couplings_are_the_least_cost_assignments():
    image, noise, text, lengths = make_captioned_batch()
    distances = WEIGHT * np.float64(caption_distances(text, lengths))
    assignments, costs = {}, costs_float64(image, noise)
    for name, (flow, added_costs) in COUPLINGS.items():
        flow = replace(flow, coupling_caption_weight=WEIGHT * flow.coupling_caption_weight)
        columns = jax.jit(partial(couple_noise, flow))(image, noise, text, lengths)
        expected = linear_sum_assignment(costs + added_costs(distances))[1]
        np.testing.assert_array_equal(columns, expected, err_msg=name)
        assignments[name] = tuple(expected)
    assert len(set(assignments.values())) >= 4  # settings change the result
    assert assignments["within_caption"] != tuple(range(8))
    assert (CAPTIONS[list(assignments["within_caption"])] == CAPTIONS).all()
    np.testing.assert_array_equal(couple_noise(Flow(), image, noise, text, lengths), np.arange(8))


def test_a_batch_that_does_not_divide_is_an_error():
    with pytest.raises(ValueError, match="8 does not divide into groups of 3"):
        couple_noise(
            Flow(coupling="optimal_transport", coupling_group_size=3), *make_captioned_batch()
        )
