"""Solvers against flows with a known solution, and whole runs against a plain loop of model calls in float64."""

from functools import lru_cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from radiance.config import Compute, Model, Sample
from radiance.model.transformer import abstract, bind
from radiance.sampling import Condition, Known, guide, integrate, sample, times_of
from radiance.text.encoders import bucket

SOLVERS = ["euler", "heun", "dpmpp_2m"]
each_solver = pytest.mark.parametrize("solver", SOLVERS)
SCHEDULES = {
    "uniform": {},
    "shifted": {"schedule": "shifted", "shift": 1.2},
    "by resolution": {"schedule": "shifted"},
    "beta": {"schedule": "beta", "beta": (0.6, 0.8)},
}


# --- references -------------------------------------------------------------------------------------------------------


def plain(velocity, x, times, solver):
    """The solvers as their papers write them, one step after another. velocity(x, t, number of the step)."""
    x, clean, half_log_snr = np.float64(x), [], []
    for i, (t, s) in enumerate(zip(np.float64(times[:-1]), np.float64(times[1:]))):
        v = velocity(x, t, i)
        if solver == "euler" or (solver == "heun" and s == 0):
            x = x + (s - t) * v
        elif solver == "heun":
            x = x + (s - t) * (v + velocity(x + (s - t) * v, s, i)) / 2
        else:  # algorithm 2 of arXiv 2211.01095, with α = 1 − t, σ = t, λ = log(α/σ)
            clean.append(x - t * v)
            half_log_snr.append(np.log(1 - t) - np.log(t) if t < 1 else -np.inf)
            if s == 0:
                x = clean[-1]
                continue
            if i == 0 or not np.isfinite(half_log_snr[-2]):
                d = clean[-1]
                h = np.log(1 - s) - np.log(s) - half_log_snr[-1]
            else:
                h = np.log(1 - s) - np.log(s) - half_log_snr[-1]
                r = (half_log_snr[-1] - half_log_snr[-2]) / h
                d = (1 + 1 / (2 * r)) * clean[-1] - 1 / (2 * r) * clean[-2]
            x = s / t * x - (1 - s) * np.expm1(-h) * d
    return x


def never_at_zero(velocity):
    """`velocity` that spoils the result if it is used at t = 0, and the times at which it was evaluated."""
    seen = []

    def guarded(x, t, *_):
        jax.debug.callback(lambda t: seen.append(float(t)), t)
        return jnp.where(t > 0, velocity(x, t), jnp.nan)

    return guarded, seen


# --- schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 30, 200])
@pytest.mark.parametrize("tokens", [4, 4096])
def test_times_fall_from_one_to_zero(schedule, steps, tokens):
    times = times_of(Sample(steps=steps, **SCHEDULES[schedule]), tokens)
    assert times.dtype == np.float32 and times.shape == (steps + 1,)
    assert times[0] == 1 and times[-1] == 0 and np.isfinite(times).all()
    assert (np.diff(times) < 0).all()


def test_times_against_their_formulas():
    uniform = np.arange(10, -1, -1) / 10

    def times(tokens=256, **settings):
        return times_of(Sample(steps=10, **settings), tokens)

    def shifted(mu):
        return np.append(np.exp(mu) / (np.exp(mu) + 1 / uniform[:-1] - 1), 0)

    close = partial(np.testing.assert_allclose, rtol=1e-6)
    close(times(), uniform)
    close(times(schedule="shifted", shift=1.2), shifted(1.2))
    close(times(schedule="shifted", shift=0.0), uniform)  # 0 is a shift, not its absence
    close(times(schedule="shifted"), shifted(0.5))
    close(times(4096, schedule="shifted"), shifted(1.15))
    close(times(schedule="beta"), stats.beta(0.4, 0.4).ppf(uniform))
    close(stats.beta(2, 0.7).cdf(np.float64(times(schedule="beta", beta=(2, 0.7)))), uniform)


# --- solvers ----------------------------------------------------------------------------------------------------------

NOISE = np.linspace(-2, 2, 16, dtype=np.float32).reshape(1, 4, 4, 1)


class Gaussian:
    """Pictures of N(mean, spread²): the velocity and where it carries a point from one time to another, both exact."""

    def __init__(self, mean, spread):
        self.mean, self.spread = mean, spread

    def variance(self, t):
        return (1 - t) ** 2 * self.spread**2 + t**2

    def velocity(self, x, t, *_):
        return -self.mean + (t - (1 - t) * self.spread**2) / self.variance(t) * (x - (1 - t) * self.mean)

    def carry(self, x, start, end):
        return (1 - end) * self.mean + np.sqrt(self.variance(end) / self.variance(start)) * (x - (1 - start) * self.mean)

    def error(self, solver, times):
        exact = self.carry(np.float64(NOISE), np.float64(times[0]), np.float64(times[-1]))
        return np.abs(integrate(self.velocity, NOISE, times, solver) - exact).max()


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), ("dpmpp_2m", 2)])
@pytest.mark.parametrize("start, end, tolerance", [(1, 0, 0.35), (0.9, 0.1, 0.15)], ids=["whole", "inside"])
def test_order(solver, order, start, end, tolerance):
    """On the whole way dpmpp_2m's error falls as h²·log(1/h), for its steps in log(α/σ) do not shrink at the ends."""
    errors = np.array([Gaussian(0.7, 2).error(solver, np.linspace(start, end, n + 1, dtype=np.float32)) for n in (32, 64, 128)])
    assert errors[-1] > 3e-5  # above the rounding, or there is nothing to measure
    np.testing.assert_allclose(np.log2(errors[:-1] / errors[1:]), order, atol=tolerance)


@pytest.mark.parametrize("schedule", ["uniform", "shifted", "beta"])
@pytest.mark.parametrize("solver, steps", [("heun", 16), ("dpmpp_2m", 32)])
def test_second_order_is_better_for_the_same_work(solver, steps, schedule):
    def error(solver, steps):
        return Gaussian(0.3, 1.5).error(solver, times_of(Sample(steps=steps, **SCHEDULES[schedule]), 256))

    assert error(solver, steps) < error("euler", 32) / 2


@each_solver
@pytest.mark.parametrize("schedule", ["uniform", "shifted", "beta"])
@pytest.mark.parametrize("steps", [1, 5])
def test_single_point_is_reached_and_time_zero_never_evaluated(solver, schedule, steps):
    """A constant x̂: every solver ends on it, whatever the number of steps."""
    point = np.linspace(-1, 1, 16, dtype=np.float32).reshape(NOISE.shape)
    velocity, seen = never_at_zero(lambda x, t: (x - point) / t)
    times = times_of(Sample(steps=steps, **SCHEDULES[schedule]), 256)
    x = integrate(velocity, NOISE, times, solver)
    np.testing.assert_allclose(x, point, atol=2e-6)
    jax.effects_barrier()
    assert min(seen) > 0
    assert len(seen) == {"euler": steps, "heun": 2 * steps - 1, "dpmpp_2m": steps}[solver]


def curved(x, t, i=0):
    """Nothing special: nonlinear in x and t."""
    sin = jnp.sin if isinstance(x, jax.Array) else np.sin
    return 1.5 * sin(2 * x + 3 * t) - 0.5 * x / (t + 0.2)


@each_solver
@pytest.mark.parametrize("schedule", ["uniform", "shifted", "beta"])
def test_against_plain_loops(solver, schedule):
    times = times_of(Sample(steps=9, **SCHEDULES[schedule]), 4096)
    x = integrate(lambda x, t, *_: curved(x, t), NOISE, times, solver)
    np.testing.assert_allclose(x, plain(curved, NOISE, times, solver), atol=3e-6)


@each_solver
def test_starting_and_ending_between_the_ends(solver):
    times = np.float32([0.8, 0.55, 0.4, 0.1])
    x = integrate(lambda x, t, *_: curved(x, t), NOISE, times, solver)
    np.testing.assert_allclose(x, plain(curved, NOISE, times, solver), atol=3e-6)


@each_solver
def test_last_step_gives_the_models_picture(solver):
    def clean(x, t):
        return jnp.tanh(3 * x) * (1 - t) + 0.1

    times = np.float32([0.4, 0])
    x = integrate(lambda x, t, *_: (x - clean(x, t)) / t, NOISE, times, solver)
    np.testing.assert_allclose(x, clean(NOISE, 0.4), atol=1e-6)


@each_solver
def test_index_and_guidance_flags_of_evaluations(solver):
    """Every evaluation is told where in `times` its t stands, and the flag of its step's start or end."""
    times = np.float32([1, 0.7, 0.6, 0.2, 0])
    flags = np.array([[0, 1], [1, 1], [1, 0], [0, 1]], bool)
    seen = []

    def velocity(x, t, i, guided):
        jax.debug.callback(lambda *a: seen.append(tuple(np.asarray(v).item() for v in a)), t, i, guided)
        return x

    integrate(velocity, NOISE, times, solver, flags)
    jax.effects_barrier()
    starts = {(times[i].item(), i, bool(flags[i, 0])) for i in range(4)}
    ends = {(times[i + 1].item(), i + 1, bool(flags[i, 1])) for i in range(3)}
    assert set(seen) == (starts | ends if solver == "heun" else starts)


# --- guidance ---------------------------------------------------------------------------------------------------------


def guided64(positive, negative, scale, rescale):
    v = np.float64(negative) + scale * (np.float64(positive) - np.float64(negative))
    stretch = np.float64(positive).std(axis=(1, 2, 3)) / v.std(axis=(1, 2, 3))
    return v * (rescale * stretch + 1 - rescale)[:, None, None, None]


def pictures(seed, batch=3):
    """Of unlike spreads, so that a scale shared by the batch is seen."""
    return (
        np.random.RandomState(seed).standard_normal((batch, 8, 8, 3)).astype(np.float32) * np.float32([1, 2, 0.3])[:batch, None, None, None]
    )


def test_guide():
    v, w = jnp.asarray(pictures(0)), jnp.asarray(pictures(1))

    def guided(scale, rescale=0.0):
        return np.asarray(guide(v, w, Sample(guidance=scale, guidance_rescale=rescale)))

    np.testing.assert_allclose(guided(3.5), 3.5 * np.float64(v) - 2.5 * np.float64(w), atol=1e-5)
    np.testing.assert_allclose(guided(1.0), v, atol=1e-6)
    np.testing.assert_array_equal(guided(0.0), w)
    np.testing.assert_allclose(guided(3.5, 1.0).std(axis=(1, 2, 3)), np.std(v, axis=(1, 2, 3)), rtol=1e-5)
    for rescale in (0.0, 0.3, 1.0):
        np.testing.assert_allclose(guided(3.5, rescale), guided64(v, w, 3.5, rescale), atol=1e-5)


def test_rescale_of_nothing_is_finite():
    zero = jnp.zeros((1, 4, 4, 3))
    np.testing.assert_array_equal(guide(zero, zero, Sample(guidance_rescale=1.0)), zero)


# --- whole runs -------------------------------------------------------------------------------------------------------

TINY = dict(
    patch=4, hidden=32, heads=2, rope_axes=(4, 6, 6), double_blocks=1, single_blocks=1, text_dim=8, head="linear",
    approximator_dim=16, approximator_hidden=32, approximator_depth=1,
)  # fmt: skip
COMPUTE = Compute(dtype="float32")


# Many small programs that run once: XLA's optimizations cost more than they give.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True})


@lru_cache
def network(**changes):
    """A tiny model, and parameters under which nothing is zero (drawn in NumPy, as compiling `init` takes seconds)."""
    model, random = Model(**TINY | changes), np.random.RandomState(1)

    def draw(path, x):
        noise = 0.1 * random.standard_normal(x.shape)
        if path[-1].key == "kernel":
            return np.float32(noise + random.standard_normal(x.shape) / np.sqrt(x.shape[-2]))
        return np.float32(noise + (path[-1].key == "scale"))

    return model, jax.tree.map_with_path(draw, abstract(model))


@partial(quick_jit, static_argnames="model")
def predict(model, params, x, condition, t):
    """One call of the model, which computes its own modulation."""
    return bind(model, COMPUTE, params)(x, condition.text, condition.lengths, jnp.full(len(x), t), None, condition.pooled)


def condition(seed, lengths, room=16, pooled=0):
    """Random text, in the padding too: the model must hide it."""
    random = np.random.RandomState(seed)
    text = jnp.float32(random.standard_normal((len(lengths), room, 8)))
    return Condition(text, jnp.int32(lengths), jnp.float32(random.standard_normal((len(lengths), pooled))) if pooled else None)


POSITIVE, NEGATIVE = condition(2, (3, 9, 1)), condition(3, (1, 2, 1))


@partial(quick_jit, static_argnames=("model", "settings"))
def sampled(model, params, noise, settings, positive, negative=None):
    return sample(bind(model, COMPUTE, params), noise, times_of(settings, 4), settings, positive, negative)


def looped(model, params, noise, settings, positive, negative=None):
    """What `sampled` should give: two calls of the model in a guided step, one in another."""
    low, high = settings.guidance_interval

    def velocity(x, t, step):
        def half(c):
            return np.float64(predict(model, params, jnp.float32(x), c, jnp.float32(t)))

        if settings.guidance == 1 or step < settings.unguided_steps or not np.float32(low) <= t <= np.float32(high):
            return half(positive)
        return guided64(half(positive), half(negative), settings.guidance, settings.guidance_rescale)

    def floored(x, t, step):  # what an x0 model divides by is no less than the floor
        return velocity(x, t, step) * t / max(t, settings.floor)

    return plain(floored, noise, times_of(settings, 4), settings.solver)


def close(x, expected, tolerance=1e-5):
    np.testing.assert_allclose(x, expected, atol=tolerance * np.abs(expected).max())


# On four uniform steps the times are 1, 0.75, 0.5, 0.25, 0. "early" and "late" leave heun steps that are guided at one end only.
GUIDANCE = {
    "everywhere": dict(guidance=3.5),
    "late": dict(guidance=3.5, guidance_rescale=0.7, unguided_steps=1, guidance_interval=(0.0, 0.5)),
    "early": dict(guidance=3.5, unguided_steps=1, guidance_interval=(0.5, 0.9)),
    "nowhere": dict(guidance=1.0),
    "floor": dict(guidance=3.5, guidance_interval=(0.4, 1.0), floor=0.6),
}


@pytest.mark.parametrize(
    "solver, where",
    [
        *(("heun", where) for where in GUIDANCE),
        ("euler", "everywhere"),
        ("euler", "early"),
        ("euler", "floor"),
        ("dpmpp_2m", "everywhere"),
        ("dpmpp_2m", "early"),
    ],
)
def test_sample_is_a_loop_of_model_calls(solver, where):
    settings = Sample(solver=solver, steps=4, **GUIDANCE[where])
    inputs = (*network(prediction="x0"), pictures(5), settings, POSITIVE, None if where == "nowhere" else NEGATIVE)
    close(sampled(*inputs), looped(*inputs))


@pytest.mark.parametrize("changes", [dict(modulation="per_block", pooled_dim=5), dict(modulation="none")], ids=["pooled", "timeless"])
def test_sample_with_other_modulations(changes):
    """A pooled text makes the modulation differ from picture to picture; without time it is one for all."""
    pooled = changes.get("pooled_dim", 0)
    positive, negative = condition(2, (3, 9, 1), pooled=pooled), condition(3, (1, 2, 1), pooled=pooled)
    inputs = (*network(**changes), pictures(5), Sample(steps=4, **GUIDANCE["early"]), positive, negative)
    close(sampled(*inputs), looped(*inputs))


def test_last_step_of_an_x0_model_gives_its_picture():
    """An x0 model's last layer puts out the picture; as a velocity model the same network returns that output as it is."""
    (model, params), times = network(prediction="x0"), np.float32([0.4, 0])
    settings = Sample(steps=1, guidance=1.0)
    x = quick_jit(lambda params, x: sample(bind(model, COMPUTE, params), x, times, settings, POSITIVE))(params, pictures(5))
    close(x, predict(*network(), pictures(5), POSITIVE, 0.4), 1e-6)


def test_settings_of_guidance_matter():
    """The runs compared with loops above are runs with different results."""
    inputs = (*network(prediction="x0"), pictures(5))
    runs = [sampled(*inputs, Sample(solver="heun", steps=4, **GUIDANCE[where]), POSITIVE, NEGATIVE) for where in GUIDANCE]
    for i, a in enumerate(runs):
        for b in runs[:i]:
            assert np.abs(a - b).max() > 1e-2 * np.abs(a).max()


def test_negative_is_needed_only_for_guidance():
    model, noise, times = bind(network()[0], COMPUTE, network()[1]), pictures(5), times_of(Sample(steps=4), 4)
    for settings in (Sample(steps=4, guidance=2.0), Sample(steps=4, guidance=2.0, unguided_steps=3)):
        with pytest.raises(ValueError, match="negative"):
            sample(model, noise, times, settings, POSITIVE)
    inputs = (*network(prediction="x0"), noise, Sample(solver="heun", steps=4, guidance=2.0, unguided_steps=4), POSITIVE)
    close(sampled(*inputs), looped(*inputs))


def test_pictures_do_not_depend_on_their_neighbours():
    settings = Sample(solver="heun", steps=4, **GUIDANCE["late"])
    inputs = (pictures(5), POSITIVE, NEGATIVE)
    together = sampled(*network(prediction="x0"), inputs[0], settings, *inputs[1:])
    for i in range(3):
        noise, positive, negative = jax.tree.map(lambda x, i=i: x[i : i + 1], inputs)
        close(sampled(*network(prediction="x0"), noise, settings, positive, negative)[0], together[i])


# --- from a picture -----------------------------------------------------------------------------------------------------


def test_times_from_a_strength():
    whole = times_of(Sample(steps=4), 4)
    assert times_of(Sample(steps=4), 4, 0.6).tolist() == [np.float32(0.6), 0.5, 0.25, 0]
    assert times_of(Sample(steps=4), 4, 0.5).tolist() == [0.5, 0.25, 0] and times_of(Sample(steps=4), 4, 0.1).tolist() == [
        np.float32(0.1),
        0,
    ]
    assert np.array_equal(times_of(Sample(steps=4), 4, 1.0), whole)


@partial(quick_jit, static_argnames=("model", "settings", "strength"))
def continued(model, params, noise, known, settings, strength, positive, negative):
    times = times_of(settings, 4, strength)
    return sample(bind(model, COMPUTE, params), noise, times, settings, positive, negative, known=known)


@each_solver
def test_what_a_mask_hides_stays_and_the_rest_sees_it_noisy(solver):
    """Against a plain loop that puts the noisy picture back where the mask hides it, after every step of the solver and inside it."""
    (model, params), noise, image = network(prediction="x0"), pictures(5), np.tanh(pictures(6))
    mask = np.zeros((3, 8, 8, 1), np.float32)
    mask[:, 2:7, :5] = 1
    settings = Sample(solver=solver, steps=4, guidance=3.5)
    x = continued(model, params, noise, Known(image, mask), settings, 0.8, POSITIVE, NEGATIVE)
    times = times_of(settings, 4, 0.8)

    def put_back(x, t):
        return mask * x + (1 - mask) * np.float64((1 - t) * image + t * noise)

    def velocity(x, t, step):
        halves = (np.float64(predict(model, params, jnp.float32(put_back(x, t)), c, jnp.float32(t))) for c in (POSITIVE, NEGATIVE))
        return guided64(*halves, 3.5, 0)

    painted = plain(velocity, np.float64((1 - times[0]) * image + times[0] * noise), times, solver)
    close(x, put_back(painted, 0), 2e-5)
    assert np.abs(mask * (x - image)).max() > 0.1


def test_a_mask_of_ones_is_painting_from_the_mixture():
    (model, params), noise, image = network(prediction="x0"), pictures(5), np.tanh(pictures(6))
    settings, ones = Sample(steps=4, guidance=3.5), np.ones((3, 8, 8, 1), np.float32)
    close(
        continued(model, params, noise, Known(image, ones), settings, 1.0, POSITIVE, NEGATIVE),
        sampled(model, params, noise, settings, POSITIVE, NEGATIVE),
    )
    weak = continued(model, params, noise, Known(image, ones), settings, 0.01, POSITIVE, NEGATIVE)
    times = times_of(settings, 4, 0.01)
    x = np.float32(0.99) * image + np.float32(0.01) * noise
    halves = [predict(model, params, jnp.float32(x), c, jnp.float32(times[0])) for c in (POSITIVE, NEGATIVE)]
    close(weak, x - times[0] * guided64(*halves, 3.5, 0))


@pytest.mark.parametrize("modulation", ["approximator", "per_block"])
def test_modulation_at_hand_is_the_modulation_computed(modulation):
    model, params = network(modulation=modulation)

    @quick_jit
    def at_hand(x, t):
        network = bind(model, COMPUTE, params)
        vectors = network.modulation(jnp.full((1,), t), None, None)
        # The time given beside the vectors must not matter to a velocity model.
        return network(x, POSITIVE.text, POSITIVE.lengths, jnp.zeros(3), vectors=vectors)

    early, late = (predict(model, params, pictures(5), POSITIVE, t) for t in (0.7, 0.2))
    close(at_hand(pictures(5), 0.7), early, 1e-6)
    assert np.abs(early - late).max() > 1e-2


@pytest.mark.parametrize("masking, padding, text_ids", [("one_pad", 1, "sequential"), ("strict", 0, "zero")])
def test_cutting_text_to_a_bucket_changes_nothing(masking, padding, text_ids):
    """The bucket must hold the visible tokens: the longest text, and its one padding token where that is seen."""
    inputs = (*network(masking=masking, text_ids=text_ids), pictures(5))
    for longest in (15, 16):
        text = condition(4, (3, longest, 1), room=48)
        visible = longest + padding
        assert bucket(visible, 48) == (32 if visible > 16 else 16)
        whole = predict(*inputs, text, 0.7)
        close(predict(*inputs, text._replace(text=text.text[:, : bucket(visible, 48)]), 0.7), whole, 3e-6)
    cut = Condition(text.text[:, : visible - 1], jnp.minimum(text.lengths, visible - 1))
    change = np.abs(predict(*inputs, cut, 0.7) - whole).max(axis=(1, 2, 3))
    assert (change > 1e-4).tolist() == [False, True, False]  # one token fewer is another prompt, for the one it was cut from
