"""Distribution matching against NumPy, closed forms of Gaussian images, and its fixed point."""

from unittest.mock import Mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from radiance import config
from radiance.flow import distribution_matching, objective
from radiance.flow.sampler import TextCondition
from radiance.model.transformer import Transformer, bind_model
from tests.helpers.distilled_runs import wide
from tests.helpers.toy_models import apply, toy_params
from tests.helpers.toy_runs import PLAIN, batch_of, toy_run

MEAN, STD, SHIFT = 0.3, 0.5, 0.8  # of the teacher's Gaussian images, and of the schedule
NEGATIVE = TextCondition(jnp.zeros((1, 2, 16)), jnp.array([1]))


def matching(*changes, segments=3, **model):
    return toy_run(
        "unused",
        "unused",
        "init=base",
        "lora.rank=2",
        "distill.kind=distribution_matching",
        f"distill.segments={segments}",
        f"distill.sample.steps={2 * segments}",
        "distill.sample.schedule=shifted",
        f"distill.sample.shift={SHIFT}",
        "data.batch_size=4",
        *changes,
        **PLAIN | model,
    )


def boundary_times(segments):
    """The shifted schedule, written out."""
    u = np.linspace(1, 0, segments + 1)[:-1]
    return np.append(np.exp(SHIFT) / (np.exp(SHIFT) + 1 / u - 1), 0)


def gaussian_image(x, time, mean=MEAN, std=STD):
    """E[image | x] of Gaussian images: a line in x."""
    gain = (1 - time) * std**2 / ((1 - time) ** 2 * std**2 + time**2)
    return mean + gain * (x - (1 - time) * mean)


def as_network(predict_image):
    """Return a network whose predicted image is a function of noisy images, text and time."""

    def network(noisy, text, lengths, time, divisor):
        assert divisor is not None
        t = time[:, None, None, None]
        return (noisy - predict_image(noisy, text[:, :1, :1, None], t)) / t

    return Mock(Transformer, side_effect=network)


def test_the_trajectory_has_one_euler_step_for_each_segment():
    run = matching("flow.noise_scale=1.5")
    params, batch = toy_params(run.model), batch_of(run)
    noise = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
    student = bind_model(run.model, run.compute, params)
    result = distribution_matching.sample_student_trajectory(run, student, batch, noise)
    assert result.shape == (4, 4, 8, 8, 3)
    times, x = boundary_times(3), noise
    for step in range(3):
        np.testing.assert_allclose(result[:, step], x, atol=2e-5)
        time = np.full(4, times[step], np.float32)
        inputs = {"text": batch["text"], "lengths": batch["lengths"], "time": time}
        velocity = np.asarray(apply(run.model, params, inputs | {"image": x, "divisor": time}))
        x = x + (times[step + 1] - times[step]).astype(np.float32) * velocity
    np.testing.assert_allclose(result[:, 3], x, atol=2e-5)


@pytest.mark.parametrize("noise_scale", [1.0, 1.5])
def test_noise_moves_a_state_to_the_distribution_of_a_later_time(noise_scale):
    """(1 − t)·image + t·noise, written with its own noise, has the moments of the later time."""
    state_time, time = jnp.array([0, 0.2, 0.5, 0.7]), jnp.array([0.3, 0.2, 0.9, 0.71])
    image, old, new = np.random.default_rng(1).normal(size=(3, 4, 8, 8, 3)).astype(np.float32)
    old, new = noise_scale * old, noise_scale * new

    def add(image, old, new):
        state = (1 - wide(state_time)) * image + wide(state_time) * old
        return np.asarray(distribution_matching.add_noise(state, state_time, new, time))

    zero = np.zeros_like(image)
    weights = [
        add(*(x if k == i else zero for k, x in enumerate((image, old, new)))) for i in range(3)
    ]
    np.testing.assert_allclose(weights[0], (1 - wide(time)) * image, atol=1e-6)
    gains = [(weights[1] / old)[:, 0, 0, 0], (weights[2] / new)[:, 0, 0, 0]]
    np.testing.assert_allclose(np.hypot(*gains), time, rtol=1e-5)
    np.testing.assert_allclose(add(image, old, new), sum(weights), atol=1e-5)


@pytest.mark.parametrize("limit", ["segment", "trajectory"])
def test_states_are_mixed_with_noise_up_to_a_limit(limit):
    run = matching("data.batch_size=400", f"distill.noise_limit={limit}")
    trajectory = np.random.default_rng(2).normal(size=(400, 4, 2, 2, 3)).astype(np.float32)
    captions = {"lengths": jnp.arange(400), "dropped": jnp.zeros(400, bool)}
    batch = captions | {"trajectory": jnp.asarray(trajectory)}
    result = distribution_matching.renoise_trajectories(run, batch, jax.random.key(4))
    assert result.keys() == {*captions, "begin", "begin_time", "image", "time", "noise"}

    times, time, rows = boundary_times(3), np.asarray(result["time"], float), np.arange(400)
    segment = np.argmin(np.abs(times[:, None] - np.asarray(result["begin_time"])), axis=0)
    assert np.bincount(segment).min() > 90
    begin, end = trajectory[rows, segment], trajectory[rows, segment + 1]
    np.testing.assert_array_equal(result["begin"], begin)
    later, earlier = times[segment], np.maximum(times[segment + 1], 0.025)
    position = (time - earlier) / ((later if limit == "segment" else 1) - earlier)
    assert position.min() >= -1e-6
    assert np.abs(np.sort(position) - (np.arange(400) + 0.5) / 400).max() < 0.09
    # Euler's step from `begin` is a straight line, whose end at time 0 is the student's image.
    velocity = (begin - end) / wide(times[segment] - times[segment + 1])
    np.testing.assert_allclose(result["image"], begin - wide(later) * velocity, atol=1e-4)
    # What is added to the segment's end is noise of the right size.
    noisy = np.asarray(objective.mix(result["image"], result["noise"], result["time"]))
    gain = (1 - time) / (1 - times[segment + 1])
    amplitude = np.sqrt(time**2 - (gain * times[segment + 1]) ** 2)
    fresh = (noisy - wide(gain) * end) / wide(amplitude)
    assert abs(fresh.mean()) < 0.05
    assert fresh.std() == pytest.approx(1, abs=0.04)


def test_losses_and_gradients_follow_their_formula():
    """The student is v = a·x + b·text; the scores are those of Gaussian images."""
    run, rng = matching("distill.sample.guidance_scale=3"), np.random.default_rng(5)
    begin, image, noise = rng.normal(size=(3, 4, 8, 8, 3))
    text, time = rng.normal(size=(4, 2, 16)), np.array([0.05, 0.4, 0.7, 0.95])
    begin_time, dropped = np.array([0.5, 0.5, 0.8, 1]), np.array([False, False, True, False])
    arrays = dict(
        begin=begin, image=image, noise=noise, text=text, time=time, begin_time=begin_time
    )
    batch = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    batch |= {"lengths": jnp.ones(4, jnp.int32), "dropped": jnp.asarray(dropped)}
    teacher = as_network(lambda x, text, t: gaussian_image(x, t, MEAN + text))
    fake = as_network(lambda x, text, t: gaussian_image(x, t, 0.1, 0.8))

    def compute(params):
        student = as_network(lambda x, text, t: x - t * (params[0] * x + params[1] * text))
        losses = distribution_matching.compute_student_losses(
            run, student, fake, teacher, batch, NEGATIVE
        )
        return losses.sum(), losses

    (_, losses), gradient = jax.value_and_grad(compute, has_aux=True)(jnp.array([0.4, -0.2]))

    t, word = wide(time), text[:, :1, :1, None]
    noisy = (1 - t) * image + t * noise
    positive, negative = gaussian_image(noisy, t, MEAN + word), gaussian_image(noisy, t, MEAN)
    real = np.where(wide(dropped), positive, negative + 3 * (positive - negative))
    error = gaussian_image(noisy, t, 0.1, 0.8) - real  # the student's image minus its target
    distance = np.abs(image - real).mean(axis=(1, 2, 3))
    expected = (np.sqrt(error**2 + 1e-6) - 1e-3).mean(axis=(1, 2, 3)) / distance
    np.testing.assert_allclose(losses, expected, rtol=2e-3)
    pulls = error / np.sqrt(error**2 + 1e-6) / wide(distance) / error[0].size
    slopes = [-wide(begin_time) * begin, -wide(begin_time) * np.broadcast_to(word, begin.shape)]
    np.testing.assert_allclose(gradient, [(pulls * s).sum() for s in slopes], rtol=2e-3)


def test_a_linear_student_reaches_the_gaussian_of_its_teacher():
    """With the exact fake score, the student's last state has the teacher's mean and deviation."""
    segments = 2
    run = matching(
        "distill.sample.guidance_scale=1", "distill.noise_limit=segment", segments=segments
    )
    times = boundary_times(segments)[:-1]

    def student_of(params):
        def predict(x, text, t):
            a, b = (jnp.interp(t, times[::-1], params[name][::-1]) for name in ("gain", "shift"))
            return a * x + b

        return as_network(predict)

    def fake_of(params):
        """E[image | x_τ], exactly: image and x_τ are lines in the state where a segment begins."""
        all_times, mean, variance = boundary_times(segments), 0.0, 1.0
        moments = []
        for m in range(segments):
            begin, end = all_times[m], all_times[m + 1]
            a, b = params["gain"][m], params["shift"][m]
            factor, offset = a + end / begin * (1 - a), (1 - end / begin) * b
            moments.append((begin, end, a, b, factor, offset, mean, variance))
            mean, variance = factor * mean + offset, factor**2 * variance

        def predict(x, text, t):
            result = x
            for begin, end, a, b, factor, offset, mean, variance in moments:
                c = (1 - t) / (1 - end)
                added = t**2 - (c * end) ** 2
                gain = a * c * factor * variance / ((c * factor) ** 2 * variance + added)
                line = a * mean + b + gain * (x - c * (factor * mean + offset))
                result = jnp.where((t > end) & (t <= begin), line, result)
            return result

        return as_network(predict)

    teacher = as_network(lambda x, text, t: gaussian_image(x, t))
    captions = {"text": jnp.zeros((64, 1, 16)), "lengths": jnp.ones(64, jnp.int32)}

    def sample(params, key):
        """Sample the linear map of each step, which is Euler's step to the predicted image."""
        states = [jax.random.normal(key, (64, 8, 8, 3))]
        for m, (begin, end) in enumerate(zip(times, boundary_times(segments)[1:])):
            image = params["gain"][m] * states[-1] + params["shift"][m]
            states.append(image + end / begin * (states[-1] - image))
        return jnp.stack(states, axis=1)

    optimizer = optax.adam(optax.cosine_decay_schedule(0.03, 400))
    first = {"gain": jnp.array([0.1, 0.1]), "shift": jnp.zeros(2)}

    def update(carry, key):
        params, state = carry
        trajectory = jax.lax.stop_gradient(sample(params, key))
        batch = distribution_matching.renoise_trajectories(
            run, captions | {"trajectory": trajectory}, jax.random.fold_in(key, 1)
        )

        def loss(params):
            fake = fake_of(jax.lax.stop_gradient(params))
            return distribution_matching.compute_student_losses(
                run, student_of(params), fake, teacher, batch, NEGATIVE
            ).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    keys = jax.random.split(jax.random.key(0), 400)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(update, carry, keys))(
        (first, optimizer.init(first))
    )
    image = np.asarray(sample(params, jax.random.key(7)))[:, -1]
    before = np.asarray(sample(first, jax.random.key(7)))[:, -1]
    assert abs(before.std() - STD) > 0.2
    assert image.mean() == pytest.approx(MEAN, abs=0.03)
    assert image.std() == pytest.approx(STD, abs=0.03)


# --- errors of settings ---------------------------------------------------------------------------

LORA = ["init=base", "lora.rank=2", "distill.kind=distribution_matching"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["lora.rank=0", "lora.weight_format=none"], "trains a LoRA .* set lora.rank"),
        (["init="], "set init to a checkpoint file"),
        (["distill.teacher=other"], "distill.teacher=other is not used: .* the teacher is init"),
        (["distill.segments=3"], "distill.sample.steps=10 does not divide"),
        (["distill.trajectory_dir=x"], "trajectory_dir is for distill.kind=trajectories, not for"),
        (["distill.fake_lr_multiplier=0"], "fake_lr_multiplier=0.0 must be positive"),
        (["data.bucket_step=8"], "distribution_matching supports only squares"),
        (["flow.coupling=optimal_transport"], "has its own pairs and times"),
        (["distill.sample.guidance_interval=0,0.5"], "learns the same guidance for all times"),
        (["flow.timestep_distribution=pure_noise"], "trains only time 1"),
    ],
)
def test_wrong_settings_are_an_error(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        toy_run("unused", "unused", *LORA, *changes)
