"""The method against float64 references: SciPy's distributions and assignment, and formulas written out in NumPy."""

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

# --- time laws --------------------------------------------------------------------------------------------------------


def parabola(t):
    def weight(t):
        return 2 - 7.7 * (t - 0.5) ** 2

    return weight(t) / integrate.quad(weight, 0, 1)[0]


def on_logit(law):
    """Density of t when logit(t) has that law."""
    return lambda t: law.pdf(special.logit(t)) / (t * (1 - t))


# name: settings, image tokens, density in float64. Means by resolution: 0.5 at 256 tokens, 1.15 at 4096, linear between.
LAWS = {
    "uniform": (Flow(timestep_distribution="uniform"), 256, lambda t: np.ones_like(t)),
    "parabola": (Flow(timestep_distribution="parabola"), 256, parabola),
    "logistic 256": (Flow(timestep_distribution="logistic"), 256, on_logit(stats.logistic(0.5, 1))),
    "logistic 2176": (
        Flow(timestep_distribution="logistic"),
        2176,
        on_logit(stats.logistic(0.825, 1)),
    ),
    "logistic 4096": (
        Flow(timestep_distribution="logistic"),
        4096,
        on_logit(stats.logistic(1.15, 1)),
    ),
    "logistic fixed": (
        Flow(timestep_distribution="logistic", logit_mean=-0.3, logit_std=0.8),
        4096,
        on_logit(stats.logistic(-0.3, 0.8)),
    ),
    "logit_normal": (Flow(timestep_distribution="logit_normal"), 4096, on_logit(stats.norm(0, 1))),
    "logit_normal fixed": (
        Flow(timestep_distribution="logit_normal", logit_mean=-0.8, logit_std=0.8),
        256,
        on_logit(stats.norm(-0.8, 0.8)),
    ),
}
each_law = pytest.mark.parametrize("name", LAWS)

CELLS = 2**14
EDGES = np.arange(CELLS + 1) / CELLS
MIDDLES = (EDGES[1:] + EDGES[:-1]) / 2  # exact in float32


@lru_cache
def distribution(name):
    """The integral of `time_density` up to each of EDGES, by the midpoint rule."""
    flow, tokens, _ = LAWS[name]
    density = np.asarray(timestep_density(flow, jnp.float32(MIDDLES), tokens), np.float64)
    return np.concatenate([[0], np.cumsum(density) / CELLS])


@each_law
def test_density_is_the_law(name):
    flow, tokens, reference = LAWS[name]
    t = np.linspace(0.01, 0.99, 197)
    np.testing.assert_allclose(
        timestep_density(flow, jnp.float32(t), tokens), reference(t), rtol=2e-5
    )


@each_law
def test_density_integrates_to_one(name):
    assert distribution(name)[-1] == pytest.approx(1, abs=1e-5)


@each_law
def test_quantile_inverts_the_integral_of_the_density(name):
    flow, tokens, _ = LAWS[name]
    u = np.linspace(0, 1, 1001)
    t = np.asarray(timestep_quantile(flow, jnp.float32(u), tokens), np.float64)
    np.testing.assert_allclose(np.interp(t, EDGES, distribution(name)), u, atol=1e-5)


@each_law
def test_draws_follow_the_density(name):
    flow, tokens, _ = LAWS[name]
    times = sample_timesteps(jax.random.key(7), flow, 50_000, tokens)
    assert times.shape == (50_000,)
    assert times.dtype == jnp.float32
    times = np.asarray(times, np.float64)
    assert stats.kstest(times, lambda t: np.interp(t, EDGES, distribution(name))).pvalue > 0.05
    for other in LAWS.keys() - {name}:  # the test can tell the laws apart
        assert (
            stats.kstest(
                times, lambda t, other=other: np.interp(t, EDGES, distribution(other))
            ).pvalue
            < 1e-9
        )


@each_law
def test_quantile_at_the_ends(name):
    flow, tokens, _ = LAWS[name]
    steps = np.arange(64) * 2.0**-24
    u = np.float32(np.concatenate([steps, np.linspace(0.001, 0.999, 999), 1 - steps[:0:-1]]))
    assert u[0] == 0
    assert u[-1] == np.nextafter(np.float32(1), np.float32(0))
    t = np.asarray(
        jax.jit(lambda u: timestep_quantile(flow, u, tokens))(u)
    )  # fused, roundings differ from eager ones
    assert np.isfinite(t).all()
    assert t.min() >= 0
    assert t.max() <= 1
    assert t[0] == pytest.approx(0, abs=1e-6)
    assert (np.diff(t) >= -1e-6).all()


def test_parabola_is_the_authors_grid_law():
    """lodestone-rock/flow draws from 1000 grid points with these weights; no time may be more than 1.5 cells from theirs."""
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
def test_logistic_is_the_flux_shift_of_uniform_numbers(flow, tokens, mu, sigma):
    u = np.linspace(0.001, 0.999, 999)
    expected = np.exp(mu) / (np.exp(mu) + (1 / u - 1) ** sigma)
    np.testing.assert_allclose(timestep_quantile(flow, jnp.float32(u), tokens), expected, rtol=1e-5)


def test_logit_normal_is_the_sigmoid_of_a_normal():
    u = np.linspace(0.001, 0.999, 999)
    flow = Flow(timestep_distribution="logit_normal", logit_mean=-0.8, logit_std=1.3)
    np.testing.assert_allclose(
        timestep_quantile(flow, jnp.float32(u), 256),
        special.expit(-0.8 + 1.3 * stats.norm.ppf(u)),
        rtol=2e-5,
    )


def test_shift():
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
    ("drawn", "weighed"),
    [("uniform", "parabola"), ("parabola", "uniform"), ("parabola", "parabola")],
)
def test_weights_turn_one_law_into_another(drawn, weighed):
    """The expected loss and its gradient are those of the other law: here of a fit of a·t to t², whose error changes with time."""

    def expected(flow, a):
        t = timestep_quantile(flow, (jnp.arange(4096) + 0.5) / 4096, 256)
        return (timestep_weights(flow, t, 256) * (t**2 - a * t) ** 2).mean()

    found, other = (
        jax.value_and_grad(lambda a, flow=flow: expected(flow, a))(0.5)
        for flow in (
            Flow(timestep_distribution=drawn, timestep_weighting=weighed),
            Flow(timestep_distribution=weighed),
        )
    )
    np.testing.assert_allclose(found, other, rtol=1e-3)
    if drawn != weighed:
        assert (
            abs(
                found[1] / jax.grad(lambda a: expected(Flow(timestep_distribution=drawn), a))(0.5)
                - 1
            )
            > 0.05
        )


# --- interpolation and loss -------------------------------------------------------------------------------------------

TIMES = np.array([0.0, 0.02, 0.3, 1.0])
WEIGHTS = np.array([1.0, 2.0, 0.0, 0.5])
X0 = Model(
    patch=4, hidden=8, heads=1, rope_axes=(4, 2, 2), double_blocks=0, single_blocks=1, text_dim=4,
    modulation="none", head="linear", prediction="x0",
)  # fmt: skip


def images(seed, batch=4):
    return np.random.RandomState(seed).standard_normal((batch, 4, 4, 3)).astype(np.float32)


def test_mix():
    image, noise = images(0), images(1)
    x = np.asarray(mix(image, noise, jnp.float32(TIMES)))
    np.testing.assert_allclose(
        x,
        np.stack([(1 - t) * a + t * b for t, a, b in zip(TIMES, np.float64(image), noise)]),
        atol=1e-6,
    )
    np.testing.assert_array_equal(x[0], image[0])
    np.testing.assert_array_equal(x[3], noise[3])


def test_velocity_models_are_compared_with_noise_minus_image():
    image, noise = images(0), images(1)
    for flow in (Flow(), Flow(min_divisor_mode="clamp")):
        np.testing.assert_array_equal(
            velocity_target(flow, "velocity", image, noise, jnp.float32(TIMES)), noise - image
        )


def test_bound():
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


def loss_of(flow, model_config, image, noise, weights=WEIGHTS):
    """The training loss as a function of the last layer's output, through the model's own conversion to velocity."""
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


@pytest.mark.parametrize("bound", ["add", "clamp"])
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_loss_and_gradient(prediction, bound):
    """Loss is Σ w·mean|error|²/d² / b, its gradient 2·w·error/d² / (b·values): d = 1 for velocity, t + ε or max(t, ε) for x0."""
    flow = Flow(min_divisor=0.05, min_divisor_mode=bound)
    image, noise, output = images(0), images(1), images(2)
    value, gradient = jax.value_and_grad(
        loss_of(flow, replace(X0, prediction=prediction), image, noise)
    )(output)

    t = TIMES[:, None, None, None]
    image, noise, output = (np.float64(x) for x in (image, noise, output))
    if prediction == "velocity":
        error, divisor = output - (noise - image), np.ones_like(t)
    else:
        error, divisor = output - image, t + 0.05 if bound == "add" else np.maximum(t, 0.05)
    w = WEIGHTS[:, None, None, None]
    assert float(value) == pytest.approx((w * error**2 / divisor**2).mean(), rel=1e-5)
    expected = 2 * w * error / divisor**2 / error.size
    assert np.isfinite(gradient).all()
    assert np.abs(expected[0]).max() > 0
    for g, e in zip(gradient, expected):
        np.testing.assert_allclose(g, e, atol=2e-5 * np.abs(e).max())


def test_velocity_models_can_be_trained_with_the_loss_of_x0_models():
    """Both see the same image in what they put out."""
    flow = Flow(loss_weighting="x0")
    image, noise, clean = (images(seed) for seed in range(3))
    time = jnp.float32(TIMES[1:])  # no velocity says what the image is at time 0
    velocity = (mix(image, noise, jnp.float32(TIMES)) - clean)[1:] / time[:, None, None, None]
    ours = mean_squared_errors(velocity, (noise - image)[1:]) * loss_weights(flow, "velocity", time)
    np.testing.assert_allclose(
        ours, ((clean - image) ** 2).mean(axis=(1, 2, 3))[1:] / (TIMES[1:] + 0.05) ** 2, rtol=1e-4
    )
    for same, prediction in ((flow, "x0"), (Flow(), "velocity")):
        assert (np.asarray(loss_weights(same, prediction, time)) == 1).all()


def test_x0_gradient_points_along_finite_differences():
    image, noise, output, direction = (images(seed) for seed in range(4))
    loss = loss_of(Flow(), X0, image, noise, weights=np.ones(4))
    slope = float(loss(output + 0.5 * direction)) - float(
        loss(output - 0.5 * direction)
    )  # exact: the loss is quadratic
    assert float((jax.grad(loss)(output) * direction).sum()) == pytest.approx(slope, rel=1e-4)


def test_exact_prediction_has_no_loss():
    image, noise = images(0), images(1)
    assert float(loss_of(Flow(), X0, image, noise)(image)) < 1e-9


def test_squared_error_is_float32_and_per_image():
    velocity, target = jnp.asarray(images(0)).astype(jnp.bfloat16), images(1)
    losses = mean_squared_errors(velocity, target)
    assert losses.dtype == jnp.float32
    expected = (
        ((np.float64(velocity.astype(jnp.float32)) - target) ** 2).reshape(4, -1).mean(axis=1)
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-6)


def test_weights():
    losses = jnp.array([3.0, 5.0, 7.0])

    def total(losses, weights):
        return float(weighted_mean(jnp.asarray(losses), jnp.asarray(weights))) * len(losses)

    assert total(losses, [1.0, 2.0, 1.0]) == pytest.approx(total([3.0, 5.0, 5.0, 7.0], np.ones(4)))
    assert total(losses, [1.0, 0.0, 1.0]) == pytest.approx(total([3.0, 7.0], np.ones(2)))
    assert float(weighted_mean(losses[:1], jnp.array([2.0]))) == 6
    assert float(weighted_mean(losses, jnp.ones(3))) == pytest.approx(5)


# --- coupling ---------------------------------------------------------------------------------------------------------


@jax.jit
def jit_transport(image, noise):
    return assign_noise(coupling_costs(image, noise))


def costs64(image, noise):
    x, y = (np.float64(z).reshape(len(z), -1) for z in (image, noise))
    return (
        -np.einsum("id,jd->ij", x, y)
        / np.linalg.norm(x, axis=1)[:, None]
        / np.linalg.norm(y, axis=1)
    )


def scaled(seed, batch):
    """Images of different norms, which the cosine must not depend on."""
    return images(seed, batch) * np.linspace(0.2, 3, batch, dtype=np.float32)[:, None, None, None]


def test_costs():
    image, noise = scaled(0, 7), scaled(1, 7)[::-1]
    expected = costs64(image, noise)
    np.testing.assert_allclose(
        coupling_costs(image, noise), expected, atol=1e-6 * np.abs(expected).max()
    )


@pytest.mark.parametrize(("batch", "seeds"), [(1, 1), (2, 8), (12, 6)])
def test_transport_is_the_least_cost_assignment(batch, seeds):
    for seed in range(seeds):
        image, noise = scaled(seed, batch), scaled(seed + 100, batch)[::-1]
        columns = np.asarray(jit_transport(image, noise))
        assert sorted(columns) == list(range(batch))
        costs = costs64(image, noise)
        total = costs[np.arange(batch), columns].sum()
        assert total <= np.trace(costs) + 1e-9
        assert total == pytest.approx(
            costs[linear_sum_assignment(costs)].sum(), abs=1e-5 * np.abs(costs).max()
        )


def test_transport_indexes_noise_by_image():
    """noise[transport(…)] lies beside the images; the inverse permutation would not, and a cycle of 3 tells them apart."""
    image = images(0, 5)
    noise = image[[1, 2, 0, 4, 3]]
    columns = assign_noise(coupling_costs(image, noise))  # not under jit
    np.testing.assert_array_equal(noise[columns], image)
    np.testing.assert_array_equal(columns, [2, 0, 1, 4, 3])
    np.testing.assert_array_equal(columns, jit_transport(image, noise))


def test_transport_of_blank_and_equal_images():
    """Ties and zero norms: still a permutation, and the same one each time."""
    for image in (np.zeros((12, 4, 4, 3), np.float32), np.ones((12, 4, 4, 3), np.float32)):
        assert np.isfinite(coupling_costs(image, images(1, 12))).all()
        first, second = (jit_transport(image, images(1, 12)) for _ in range(2))
        assert sorted(np.asarray(first)) == list(range(12))
        np.testing.assert_array_equal(first, second)


# Captions 0, 2, 5 and 1, 4 are the same, and what stands behind their ends is not looked at.
CAPTIONS = np.array([0, 1, 0, 2, 1, 0, 3, 4])


def captioned():
    rows = np.random.RandomState(3).standard_normal((5, 3, 4)).astype(np.float32)[CAPTIONS]
    rows[:, 2] = np.random.RandomState(4).standard_normal((8, 4))
    return scaled(3, 8), scaled(103, 8)[::-1], rows, np.full(8, 2, np.int32)


def test_caption_distances():
    *_, text, lengths = captioned()
    means = np.float64(text[:, :2]).mean(axis=1)
    means /= np.linalg.norm(means, axis=1)[:, None]
    found = np.asarray(caption_distances(text, lengths))
    np.testing.assert_allclose(found, ((means[:, None] - means) ** 2).sum(-1), atol=1e-6)
    np.testing.assert_array_equal(found == 0, CAPTIONS[:, None] == CAPTIONS)


# name: settings, and what they add to the costs of all pairs, to be solved by SciPy; a unit of caption distance is WEIGHT
WEIGHT = 0.2
APART, BLOCKS = CAPTIONS[:, None] != CAPTIONS, np.arange(8)[:, None] // 4 != np.arange(8) // 4
COUPLINGS = {
    "global": (Flow(coupling="optimal_transport"), lambda far: 0),
    "local": (Flow(coupling="optimal_transport", coupling_group_size=4), lambda far: 1e6 * BLOCKS),
    "c2ot": (Flow(coupling="optimal_transport", coupling_caption_weight=1), lambda far: far),
    "within_caption": (Flow(coupling="within_caption"), lambda far: 1e6 * APART),
    "both": (
        Flow(coupling="within_caption", coupling_group_size=4),
        lambda far: 1e6 * (APART | BLOCKS),
    ),
}


def test_couplings_are_the_least_cost_assignments():
    image, noise, text, lengths = captioned()
    far = WEIGHT * np.float64(caption_distances(text, lengths))
    found, costs = {}, costs64(image, noise)
    for name, (flow, more) in COUPLINGS.items():
        flow = replace(flow, coupling_caption_weight=WEIGHT * flow.coupling_caption_weight)
        columns = jax.jit(partial(couple_noise, flow))(image, noise, text, lengths)
        expected = linear_sum_assignment(costs + more(far))[1]
        np.testing.assert_array_equal(columns, expected, err_msg=name)
        found[name] = tuple(expected)
    assert len(set(found.values())) >= 4  # the settings make a difference
    assert found["within_caption"] != tuple(range(8))
    assert (CAPTIONS[list(found["within_caption"])] == CAPTIONS).all()
    np.testing.assert_array_equal(couple_noise(Flow(), image, noise, text, lengths), np.arange(8))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="8 does not divide into groups of 3"):
        couple_noise(Flow(coupling="optimal_transport", coupling_group_size=3), *captioned())
