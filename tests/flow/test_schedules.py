"""Schedules, solvers and guidance against formulas and flows with a known solution."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from radiance.config import Sample
from radiance.flow.guidance import apply_guidance
from radiance.flow.schedules import make_time_schedule
from radiance.flow.solvers import integrate_velocity
from tests.helpers.reference_sampling import (
    each_solver,
    guide_float64,
    integrate_float64,
    sample_images,
)

SCHEDULES = {
    "uniform": {},
    "shifted": {"schedule": "shifted", "shift": 1.2},
    "by resolution": {"schedule": "shifted"},
    "beta": {"schedule": "beta", "beta": (0.6, 0.8)},
}


def record_times(velocity):
    """Return a velocity that is NaN at t = 0, and the list of times of its evaluations."""
    evaluated_times = []

    def recorded_velocity(x, t, *_):
        jax.debug.callback(lambda t: evaluated_times.append(float(t)), t)
        return jnp.where(t > 0, velocity(x, t), jnp.nan)

    return recorded_velocity, evaluated_times


# --- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 30, 200])
@pytest.mark.parametrize("tokens", [4, 4096])
def test_times_fall_from_one_to_zero(schedule, steps, tokens):
    times = make_time_schedule(Sample(steps=steps, **SCHEDULES[schedule]), tokens)
    assert times.dtype == np.float32
    assert times.shape == (steps + 1,)
    assert times[0] == 1
    assert times[-1] == 0
    assert np.isfinite(times).all()
    assert (np.diff(times) < 0).all()


def test_times_follow_their_formulas():
    uniform = np.arange(10, -1, -1) / 10

    def times(tokens=256, **settings):
        return make_time_schedule(Sample(steps=10, **settings), tokens)

    def shifted(mu):
        return np.append(np.exp(mu) / (np.exp(mu) + 1 / uniform[:-1] - 1), 0)

    close = partial(np.testing.assert_allclose, rtol=1e-6)
    close(times(), uniform)
    close(times(schedule="shifted", shift=1.2), shifted(1.2))
    close(times(schedule="shifted", shift=0.0), uniform)  # 0 is not the default
    close(times(schedule="shifted"), shifted(0.5))
    close(times(4096, schedule="shifted"), shifted(1.15))
    close(times(schedule="beta"), stats.beta(0.4, 0.4).ppf(uniform))
    close(stats.beta(2, 0.7).cdf(np.float64(times(schedule="beta", beta=(2, 0.7)))), uniform)


# --- solvers --------------------------------------------------------------------------------------

NOISE = jnp.linspace(-2, 2, 16, dtype=jnp.float32).reshape(1, 4, 4, 1)


class Gaussian:
    """Images from N(mean, std²), with the exact velocity and the exact solution of its ODE."""

    def __init__(self, mean, std):
        self.mean, self.std = mean, std

    def variance(self, t):
        return (1 - t) ** 2 * self.std**2 + t**2

    def velocity(self, x, t, *_):
        return -self.mean + (t - (1 - t) * self.std**2) / self.variance(t) * (
            x - (1 - t) * self.mean
        )

    def solve(self, x, start, end):
        return (1 - end) * self.mean + np.sqrt(self.variance(end) / self.variance(start)) * (
            x - (1 - start) * self.mean
        )

    def error(self, solver, times):
        exact = self.solve(np.float64(NOISE), np.float64(times[0]), np.float64(times[-1]))
        return np.abs(integrate_velocity(self.velocity, NOISE, times, solver) - exact).max()


@pytest.mark.parametrize(("solver", "order"), [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize(
    ("start", "end", "tolerance"),
    [(1, 0, 0.35), (0.9, 0.1, 0.15)],
    ids=["all times", "inner times"],
)
def test_solvers_have_their_order(solver, order, start, end, tolerance):
    """From 1 to 0 dpmpp_2m's error is h²·log(1/h): at the ends its steps in λ do not shrink."""
    errors = np.array(
        [
            Gaussian(0.7, 2).error(solver, np.linspace(start, end, n + 1, dtype=np.float32))
            for n in (32, 64, 128)
        ]
    )
    assert errors[-1] > 3e-5  # above rounding errors
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=tolerance)


@pytest.mark.parametrize("schedule", ["uniform", "shifted", "beta"])
@pytest.mark.parametrize(("solver", "steps"), [("heun", 16), ("dpmpp_2m", 32)])
def test_second_order_solvers_are_better_with_as_many_evaluations(solver, steps, schedule):
    def error(solver, steps):
        return Gaussian(0.3, 1.5).error(
            solver, make_time_schedule(Sample(steps=steps, **SCHEDULES[schedule]), 256)
        )

    assert error(solver, steps) < error("euler", 32) / 2


@each_solver
@pytest.mark.parametrize("schedule", ["uniform", "shifted", "beta"])
@pytest.mark.parametrize("steps", [1, 5])
def test_solvers_end_at_a_constant_prediction_without_evaluating_time_zero(solver, schedule, steps):
    """Every solver ends at x̂ after any number of steps."""
    point = np.linspace(-1, 1, 16, dtype=np.float32).reshape(NOISE.shape)
    velocity, evaluated_times = record_times(lambda x, t: (x - point) / t)
    times = make_time_schedule(Sample(steps=steps, **SCHEDULES[schedule]), 256)
    x = integrate_velocity(velocity, NOISE, times, solver)
    np.testing.assert_allclose(x, point, atol=2e-6)
    jax.effects_barrier()
    assert min(evaluated_times) > 0
    assert (
        len(evaluated_times) == {"euler": steps, "heun": 2 * steps - 1, "dpmpp_2m": steps}[solver]
    )


def nonlinear_velocity(x, t, i=0):
    """Compute a velocity that is nonlinear in x and t."""
    sin = jnp.sin if isinstance(x, jax.Array) else np.sin
    return 1.5 * sin(2 * x + 3 * t) - 0.5 * x / (t + 0.2)


@each_solver
@pytest.mark.parametrize("schedule", ["uniform", "shifted", "beta"])
def test_solvers_equal_the_references(solver, schedule):
    times = make_time_schedule(Sample(steps=9, **SCHEDULES[schedule]), 4096)
    x = integrate_velocity(lambda x, t, *_: nonlinear_velocity(x, t), NOISE, times, solver)
    np.testing.assert_allclose(
        x, integrate_float64(nonlinear_velocity, NOISE, times, solver), atol=3e-6
    )


@each_solver
def test_solvers_may_start_and_end_between_one_and_zero(solver):
    times = np.float32([0.8, 0.55, 0.4, 0.1])
    x = integrate_velocity(lambda x, t, *_: nonlinear_velocity(x, t), NOISE, times, solver)
    np.testing.assert_allclose(
        x, integrate_float64(nonlinear_velocity, NOISE, times, solver), atol=3e-6
    )


@each_solver
def test_the_last_step_returns_the_prediction(solver):
    def predict_x0(x, t):
        return jnp.tanh(3 * x) * (1 - t) + 0.1

    times = np.float32([0.4, 0])
    x = integrate_velocity(lambda x, t, *_: (x - predict_x0(x, t)) / t, NOISE, times, solver)
    np.testing.assert_allclose(x, predict_x0(NOISE, 0.4), atol=1e-6)


@each_solver
def test_evaluations_receive_the_index_of_their_time_and_their_guidance_flag(solver):
    times = np.float32([1, 0.7, 0.6, 0.2, 0])
    guidance_mask = np.array([[0, 1], [1, 1], [1, 0], [0, 1]], bool)
    evaluations = []

    def velocity(x, t, i, is_guided):
        jax.debug.callback(
            lambda *a: evaluations.append(tuple(np.asarray(v).item() for v in a)), t, i, is_guided
        )
        return x

    integrate_velocity(velocity, NOISE, times, solver, guidance_mask)
    jax.effects_barrier()
    starts = {(times[i].item(), i, bool(guidance_mask[i, 0])) for i in range(4)}
    ends = {(times[i + 1].item(), i + 1, bool(guidance_mask[i, 1])) for i in range(3)}
    assert set(evaluations) == (starts | ends if solver == "heun" else starts)


# --- guidance -------------------------------------------------------------------------------------


def test_guidance_and_its_rescaling():
    v, w = jnp.asarray(sample_images(0)), jnp.asarray(sample_images(1))

    def guided(scale, rescale=0.0):
        return np.asarray(
            apply_guidance(v, w, Sample(guidance_scale=scale, guidance_rescale=rescale))
        )

    np.testing.assert_allclose(guided(3.5), 3.5 * np.float64(v) - 2.5 * np.float64(w), atol=1e-5)
    np.testing.assert_allclose(guided(1.0), v, atol=1e-6)
    np.testing.assert_array_equal(guided(0.0), w)
    np.testing.assert_allclose(
        guided(3.5, 1.0).std(axis=(1, 2, 3)), np.std(v, axis=(1, 2, 3)), rtol=1e-5
    )
    for rescale in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(
            guided(3.5, rescale), guide_float64(v, w, 3.5, rescale), atol=1e-5
        )


def test_rescaling_zeros_is_finite():
    zero = jnp.zeros((1, 4, 4, 3))
    np.testing.assert_array_equal(apply_guidance(zero, zero, Sample(guidance_rescale=1.0)), zero)
