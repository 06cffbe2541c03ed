"""What students are taught, against NumPy, separate calls of the models, finite differences and closed forms; what a config may not say."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import MEAN, PLAIN, batch_of, same, step_of, toy_run
from toys import apply, toy_params

from radiance import config, flow
from radiance.model.transformer import bind
from radiance.pipeline import Pipeline
from radiance.sampling import Condition, noise_of, paint, times_of
from radiance.training import distillation, step
from radiance.training.distillation import Teacher, on_segments
from radiance.training.step import init_state, picture_losses, validation_losses, with_noise


def distilling(kind, *changes, **model):
    return toy_run(
        "unused", "unused", f"distill.kind={kind}", "distill.teacher=another", "data.batch=4", "compute.attention=xla", *changes, **model
    )


def teacher_of(run, words=8):
    """Other weights, and a text to lead away from."""
    text = np.random.default_rng(8).normal(size=(1, words, run.model.text_dim)).astype(np.float32)
    return Teacher(toy_params(run.model, 7), Condition(jnp.asarray(text), jnp.array([2])))


def wide(t):
    return np.asarray(t)[:, None, None, None]


@partial(jax.jit, static_argnames="run")
def pulled(run, params, batch, teacher, pulls):
    """Losses, and the gradient of their weighted sum."""

    def total(params):
        losses = picture_losses(run, params, batch, teacher)
        return pulls @ losses, losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return losses, gradient


@partial(jax.jit, static_argnames="model")
def pulled_to(model, params, inputs, target, scale):
    """Mean squared errors of a velocity to a constant, scaled, and the gradient of their sum."""

    def total(params):
        losses = scale * jnp.square(bind(model, config.Compute(dtype="float32"), params)(**inputs) - target).mean(axis=(1, 2, 3))
        return losses.sum(), losses

    (_, losses), gradient = jax.value_and_grad(total, has_aux=True)(params)
    return losses, gradient


def close(found, expected, rtol=1e-3):
    """Over trees, by the largest number of each leaf."""
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * float(np.abs(y).max()) + 1e-7)


# --- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
def test_guidance_is_learned(prediction):
    """Of the teacher's predictions; or of the pictures' velocities, away from the student's own, but not where captions were dropped."""
    changes = ["distill.sample.guidance=3", "flow.velocity_weight=x0"]
    runs = {
        rule: distilling("guidance", *changes, f"distill.rule={rule}", **PLAIN, prediction=prediction) for rule in ("prediction", "picture")
    }
    run = runs["prediction"]
    model, params, teacher, dropped = run.model, toy_params(run.model), teacher_of(run), np.array([True, False, False, True])
    batch = with_noise(run, batch_of(run) | {"dropped": jnp.asarray(dropped)}, jax.random.key(3))
    image, noise, time = (np.asarray(batch[name]) for name in ("image", "noise", "time"))
    noisy = (1 - wide(time)) * image + wide(time) * noise
    inputs = dict(image=noisy, text=batch["text"], lengths=batch["lengths"], time=time, divisor=time + 0.05)
    nothing = inputs | dict(text=np.repeat(teacher.negative.text, 4, axis=0), lengths=np.repeat(teacher.negative.lengths, 4))
    plain = (noisy - image) / wide(time + 0.05) if prediction == "x0" else noise - image

    of_teacher, without = (np.asarray(apply(model, teacher.params, x)) for x in (inputs, nothing))
    own = np.asarray(apply(model, params, nothing))
    expected = {
        "prediction": np.where(wide(dropped), of_teacher, without + 3 * (of_teacher - without)),
        "picture": np.where(wide(dropped), plain, own + 3 * (plain - own)),
    }
    scale = np.ones(4, np.float32) if prediction == "x0" else (time / (time + 0.05)) ** 2
    for rule, target in expected.items():
        given = teacher if rule == "prediction" else teacher._replace(params=None)
        found = pulled(runs[rule], params, batch, given, jnp.ones(4))
        close(found, pulled_to(model, params, inputs, target, scale))


def test_without_dropped_captions_all_pictures_are_led():
    run = distilling("guidance", "distill.rule=picture", "distill.sample.guidance=3", **PLAIN)
    plain, own, time = np.full((4, 8, 8, 3), 2.0), np.full((4, 8, 8, 3), 0.5), jnp.linspace(0.1, 1, 4)
    told = []

    def student(noisy, text, lengths, time, divisor):
        told.append((text.shape, np.asarray(lengths), np.asarray(divisor)))
        return own

    batch = {"time": time}
    found = distillation.guidance_target(run, student, batch, plain, plain, teacher_of(run, words=5))
    np.testing.assert_allclose(found, 0.5 + 3 * 1.5)
    ((shape, lengths, divisor),) = told
    assert shape == (4, 5, 16) and lengths.tolist() == [2] * 4
    np.testing.assert_allclose(divisor, time + 0.05)
    kept = distillation.guidance_target(run, student, batch | {"dropped": jnp.ones(4, bool)}, plain, plain, teacher_of(run))
    assert np.array_equal(kept, plain)


def test_guidance_of_one_asks_once():
    run = distilling("guidance", "distill.sample.guidance=1", **PLAIN)
    asked = []
    batch = batch_of(run) | {"time": jnp.ones(4)}
    model = lambda *arguments, divisor: asked.append(arguments) or arguments[0]  # noqa: E731
    found = distillation.guided(run, model, batch, batch["image"], jnp.ones(4), teacher_of(run).negative)
    assert np.array_equal(found, batch["image"]) and len(asked) == 1 and asked[0][1] is batch["text"]


# --- segments ---------------------------------------------------------------------------------------------------------

SEGMENTS = ["distill.sample.steps=12", "distill.sample.schedule=shifted", "distill.sample.shift=0.8", "flow.noise_scale=1.5"]


def points_of(run, count):
    """A batch of trajectories in any shape."""
    draw = np.random.default_rng(0)
    points = draw.normal(size=(count, run.distill.segments, 8, 8, 3)).astype(np.float16)
    return {
        "image": jnp.asarray(points),
        "seed": jnp.arange(5, 5 + count, dtype=jnp.uint32),
        "text": jnp.zeros((count, 2, 16)),
        "lengths": jnp.ones(count, jnp.int32),
        "weight": jnp.ones(count),
    }


def whole_way(batch, scale):
    """[b, segments + 1, …]: the noise of each seed, and the points."""
    noise = [scale * np.asarray(jax.random.normal(jax.random.key(int(seed)), (8, 8, 3))) for seed in batch["seed"]]
    return np.concatenate([np.stack(noise)[:, None], np.asarray(batch["image"], np.float64)], axis=1)


def cuts(segments):
    u = np.linspace(1, 0, 13)[:-1]
    return np.append(np.exp(0.8) / (np.exp(0.8) + 1 / u - 1), 0)[:: 12 // segments]


def test_lines_through_segments():
    run = distilling("trajectories", "distill.segments=3", *SEGMENTS, **PLAIN)
    batch, segment, place = points_of(run, 6), np.array([0, 1, 2, 2, 1, 0]), np.float32([0, 1, 0, 1, 0.25, 0.7])
    found = on_segments(run, batch, jnp.asarray(segment), jnp.asarray(place))
    way, times = whole_way(batch, 1.5), cuts(3)
    rows = np.arange(6)
    begin, end, later, sooner = way[rows, segment], way[rows, segment + 1], times[segment], times[segment + 1]
    np.testing.assert_allclose(found["time"], sooner + (later - sooner) * place, rtol=1e-6)
    np.testing.assert_allclose(flow.mix(found["image"], found["noise"], found["time"]), end + wide(place) * (begin - end), atol=1e-5)
    np.testing.assert_allclose(found["noise"] - found["image"], (begin - end) / wide(later - sooner), atol=1e-5)
    assert all(found[name] is batch[name] for name in ("text", "lengths", "weight"))


def test_one_segment_is_the_pair_itself():
    run = distilling("trajectories", *SEGMENTS, **PLAIN)
    batch = points_of(run, 4)
    found = on_segments(run, batch, jnp.zeros(4, int), jnp.linspace(0, 1, 4))
    assert np.array_equal(found["image"], batch["image"][:, 0].astype(jnp.float32))
    np.testing.assert_allclose(found["noise"], 1.5 * noise_of(batch["seed"], (8, 8, 3)), atol=1e-6)
    np.testing.assert_allclose(found["time"], np.linspace(0, 1, 4), atol=1e-7)


def test_halves_are_near_enough():
    """What is lost of a point: within the range of pictures and a little beyond, a sixteenth of one of 256 levels."""
    values = np.linspace(-2, 2, 100_001, dtype=np.float32)
    lost = np.abs(values.astype(np.float16).astype(np.float32) - values).max()
    assert lost <= 2 / 255 / 16 < 1.01 * lost


def test_segments_are_drawn_alike_and_times_by_the_law():
    run = distilling("trajectories", "distill.segments=4", "flow.time_law=uniform", *SEGMENTS, **PLAIN)
    batch, times = points_of(run, 500), cuts(4)
    drawn = with_noise(run, batch, jax.random.key(1))
    time = np.asarray(drawn["time"], np.float64)
    segment = 4 - np.searchsorted(times[::-1], time)
    counts = np.bincount(segment, minlength=4)
    assert len(counts) == 4 and np.abs(counts - 125).max() < 5 * np.sqrt(500 * 3 / 16)
    place = (time - times[segment + 1]) / (times[segment] - times[segment + 1])
    assert np.abs(np.sort(place) - (np.arange(500) + 0.5) / 500).max() < 0.08
    assert abs(np.corrcoef(place, segment)[0, 1]) < 0.2
    # The line is the one of that segment and of no other.
    way, rows = whole_way(batch, 1.5), np.arange(500)
    secant = (way[rows, segment] - way[rows, segment + 1]) / wide(times[segment] - times[segment + 1])
    np.testing.assert_allclose(drawn["noise"] - drawn["image"], secant, atol=1e-4)
    again = with_noise(run, batch, jax.random.key(1))
    assert same(again, drawn)

    begins = with_noise(config.override(run, ["flow.time_law=noise"]), batch, jax.random.key(1))
    np.testing.assert_allclose(begins["time"], times[segment], rtol=1e-6)


def test_validation_goes_through_segments_and_places(monkeypatch):
    run = distilling("trajectories", "distill.segments=3", "flow.time_law=uniform", *SEGMENTS, **PLAIN)
    monkeypatch.setattr(step, "picture_losses", lambda run, params, batch, teacher=None: batch["time"])
    batch, times = points_of(run, 7), cuts(3)
    later, sooner = times[np.arange(7) % 3], times[np.arange(7) % 3 + 1]
    found = np.asarray(validation_losses(run, {}, batch, jnp.int32(0)))
    place = (found - sooner[:, None]) / (later - sooner)[:, None]
    assert (np.floor(place * 10) == np.arange(10)).all()
    assert len(np.unique(np.round(place * 10 % 1, 4))) > 60, "each at a place of its own"
    noise = np.asarray(validation_losses(config.override(run, ["flow.time_law=noise"]), {}, batch, jnp.int32(0)))
    np.testing.assert_allclose(noise, np.repeat(later[:, None], 10, axis=1), rtol=1e-6)


# --- mean velocities --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mean():
    return distilling("mean_flow", "distill.sample.guidance=2", "distill.difference=0", **MEAN)


@pytest.fixture(scope="module")
def mean_batch(mean):
    """At times that float32 holds exactly, and of lengths that it does: none, some, all of the way, some."""
    batch = with_noise(mean, batch_of(mean), jax.random.key(3))
    time = np.array([0.5, 0.25, 0.75, 0.875], np.float32)
    return batch | {"time": jnp.asarray(time), "until": jnp.asarray(time - np.float32([0, 0.125, 0.75, 0.25]))}


def test_mean_velocities_against_finite_differences(mean, mean_batch):
    model, params, teacher = mean.model, toy_params(mean.model), teacher_of(mean)
    image, noise, time = (np.asarray(mean_batch[name]) for name in ("image", "noise", "time"))
    length = time - np.asarray(mean_batch["until"])
    noisy = (1 - wide(time)) * image + wide(time) * noise

    def at(params, x, t, length, text=mean_batch["text"], lengths=mean_batch["lengths"]):
        found = apply(model, params, dict(image=x, text=text, lengths=lengths, time=t, guidance=length, divisor=t))
        return np.asarray(found, np.float64)

    none = np.zeros(4, np.float32)
    without = at(teacher.params, noisy, time, none, np.repeat(teacher.negative.text, 4, axis=0), np.repeat(teacher.negative.lengths, 4))
    along = without + 2 * (at(teacher.params, noisy, time, none) - without)
    h = np.float32(2.0**-15)  # the sinusoids' fastest turns by 0.03 in it, and float32 holds time ± h
    ahead, behind = (at(params, np.float32(noisy + s * h * along), time + s * h, length + s * h) for s in (1, -1))
    change = (ahead - behind) / (2 * np.float64(h))
    expected = np.square(at(params, noisy, time, length) - along + wide(length) * change).mean(axis=(1, 2, 3))
    assert (np.square(wide(length) * change).mean(axis=(1, 2, 3))[1:] > 0.1).all(), "the derivatives are seen"

    losses, gradient = pulled(mean, params, mean_batch, teacher, jnp.ones(4))
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(losses[1:], expected[1:], rtol=0.02)

    # The target is a constant to the gradient. The same tangents, from a call of its own:
    @jax.jit
    def moved(x, t, length):
        f = lambda x, t, length: bind(model, mean.compute, params)(  # noqa: E731
            x, mean_batch["text"], mean_batch["lengths"], t, length, divisor=t
        )
        return jax.jvp(f, (x, t, length), (jnp.asarray(along, jnp.float32), jnp.ones(4), jnp.ones(4)))[1]

    target = np.float32(along - wide(length) * np.asarray(moved(noisy, time, length)))
    inputs = dict(image=noisy, text=mean_batch["text"], lengths=mean_batch["lengths"], time=time, guidance=length, divisor=time)
    close(gradient, pulled_to(model, params, inputs, target, np.ones(4, np.float32))[1], rtol=2e-3)


def test_mean_velocities_by_differences(mean, mean_batch):
    """A step's way is the teacher's over the first part of it, and the student's over the rest. The lengths of the batch: none, all of the part, more, more."""
    run, model, params, teacher = config.override(mean, ["distill.difference=0.125"]), mean.model, toy_params(mean.model), teacher_of(mean)
    image, noise, time, until = (np.asarray(mean_batch[name]) for name in ("image", "noise", "time", "until"))
    noisy = (1 - wide(time)) * image + wide(time) * noise

    def at(params, x, t, length, text=mean_batch["text"], lengths=mean_batch["lengths"]):
        return np.asarray(apply(model, params, dict(image=x, text=text, lengths=lengths, time=t, guidance=length, divisor=t)))

    none = np.zeros(4, np.float32)
    without = at(teacher.params, noisy, time, none, np.repeat(teacher.negative.text, 4, axis=0), np.repeat(teacher.negative.lengths, 4))
    along = without + 2 * (at(teacher.params, noisy, time, none) - without)
    part = np.array([0, 0.125, 0.125, 0.125], np.float32)
    rest = wide(time - part - until) * at(params, noisy - wide(part) * along, time - part, time - part - until)
    target = np.concatenate([along[:1], ((wide(part) * along + rest) / wide(np.maximum(time - until, 1e-9)))[1:]])
    assert np.abs(target[1] - along[1]).max() < 1e-6 and np.abs(target[2:] - along[2:]).max() > 0.01
    losses, gradient = pulled(run, params, mean_batch, teacher, jnp.ones(4))
    np.testing.assert_allclose(losses, np.square(at(params, noisy, time, time - until) - target).mean(axis=(1, 2, 3)), rtol=1e-4)
    inputs = dict(image=noisy, text=mean_batch["text"], lengths=mean_batch["lengths"], time=time, guidance=time - until, divisor=time)
    close(gradient, pulled_to(model, params, inputs, target, np.ones(4, np.float32))[1], rtol=2e-3)


def test_a_small_difference_is_nearly_the_derivative(mean, mean_batch):
    """Where the student hears the low frequencies of time alone. What is missed of a step's mean is missed of its part, so by the square of their ratio."""
    params, teacher = toy_params(mean.model), teacher_of(mean)
    kernel = params["modulation"]["proj_in"]["kernel"]
    width = mean.model.approximator_dim // 4
    slow = np.concatenate([np.tile(np.arange(width // 2) >= width // 4, 4), np.ones(2 * width, bool)])
    params = params | {
        "modulation": params["modulation"] | {"proj_in": params["modulation"]["proj_in"] | {"kernel": kernel * slow[:, None]}}
    }
    exact, _ = pulled(mean, params, mean_batch, teacher, jnp.ones(4))
    part = np.float32(2**-7)
    near, _ = pulled(config.override(mean, [f"distill.difference={part}"]), params, mean_batch, teacher, jnp.ones(4))
    length = np.asarray(mean_batch["time"] - mean_batch["until"])
    np.testing.assert_allclose(near * np.where(length > 0, length / part, 1) ** 2, exact, rtol=0.05)


def test_every_loss_pulls_alike(mean):
    """A step's gradient is that of the losses, each over itself; what it reports is their plain mean."""
    params, teacher, batch = toy_params(mean.model), teacher_of(mean), batch_of(mean)
    weight = jnp.array([0, 1, 2, 1.0])
    _, metrics = step_of(mean)(init_state(mean, params), batch | {"weight": weight}, None, None, teacher)
    drawn = with_noise(mean, batch | {"weight": weight}, jax.random.fold_in(jax.random.key(mean.train.seed), 0))
    losses, _ = pulled(mean, params, drawn, teacher, jnp.ones(4))
    np.testing.assert_allclose(metrics["loss"], losses[1:].mean(), rtol=1e-3)
    _, gradient = pulled(mean, params, drawn, teacher, weight / (losses + 1e-3) / 4)
    norm = np.sqrt(sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-3)


def test_a_model_of_one_picture_has_straight_ways(mean, mean_batch):
    """x̂ is the same everywhere, so every mean velocity is the velocity, at times below epsilon too."""
    head = {name: {part: 0 * x for part, x in leaves.items()} for name, leaves in toy_params(mean.model)["head"].items()}
    assert {"kernel", "bias"} == head["linear"].keys()
    head["linear"]["bias"] = head["linear"]["bias"] + 0.3
    params = toy_params(mean.model) | {"head": head}
    time = jnp.array([0.5, 0.08, 1, 0.02])
    batch = mean_batch | {"time": time, "until": time - jnp.array([0.3, 0.08, 0, 0.015])}
    for difference in (0, 0.05):
        run = config.override(mean, [f"distill.difference={difference}"])
        losses, _ = pulled(run, params, batch, Teacher(params, teacher_of(mean).negative), jnp.ones(4))
        np.testing.assert_allclose(losses, 0, atol=1e-8)


def test_errors_at_small_times_weigh_less(mean, mean_batch):
    """Those of pictures: a velocity is not divided by the time."""
    params, teacher, time = toy_params(mean.model), teacher_of(mean), np.array([0.04, 0.02, 0.01, 0.3], np.float32)
    batch = mean_batch | {"time": jnp.asarray(time), "until": jnp.asarray(time)}  # of no length, where u = v
    for prediction in ("x0", "velocity"):
        run = replace(mean, model=replace(mean.model, prediction=prediction))
        losses, _ = pulled(run, params, batch, teacher, jnp.ones(4))
        image, noise = (np.asarray(batch[name]) for name in ("image", "noise"))
        inputs = dict(image=(1 - wide(time)) * image + wide(time) * noise, text=batch["text"], lengths=batch["lengths"], time=time)
        inputs |= dict(guidance=0 * time, divisor=np.maximum(time, 0.05) if prediction == "x0" else time)
        own, theirs, without = (np.asarray(apply(run.model, p, inputs | more)) for p, more in (
            (params, {}), (teacher.params, {}),
            (teacher.params, dict(text=np.repeat(teacher.negative.text, 4, axis=0), lengths=np.repeat(teacher.negative.lengths, 4))),
        ))  # fmt: skip
        np.testing.assert_allclose(losses, np.square(own - without - 2 * (theirs - without)).mean(axis=(1, 2, 3)), rtol=1e-3)


def test_steps_end_between_zero_and_their_begin():
    time = jax.random.uniform(jax.random.key(1), (4000,))
    until = np.asarray(distillation.until(jax.random.key(2), time))
    assert (until >= 0).all() and (until <= time).all()
    some = until < time
    assert abs(some.mean() - 0.5) < 0.04
    share = np.sort((until / np.asarray(time))[some])
    assert np.abs(share - (np.arange(len(share)) + 0.5) / len(share)).max() < 0.05
    assert (
        abs(np.corrcoef(some, time)[0, 1]) < 0.08 and abs(np.corrcoef((until / np.asarray(time))[some], np.asarray(time)[some])[0, 1]) < 0.1
    )


def test_ends_are_drawn_anew_and_beside_what_was_drawn(mean, monkeypatch):
    batch = batch_of(config.override(mean, ["data.batch=64"]))
    drawn = [with_noise(mean, batch, jax.random.key(i)) for i in (1, 2)]
    other = with_noise(config.override(mean, ["distill.kind=none", "distill.teacher="]), batch, jax.random.key(1))
    assert "until" not in other and same({name: drawn[0][name] for name in other}, other)
    assert not np.array_equal(drawn[0]["until"] < drawn[0]["time"], drawn[1]["until"] < drawn[1]["time"])
    monkeypatch.setattr(step, "picture_losses", lambda run, params, batch, teacher: jnp.stack([batch["time"], batch["until"]], axis=-1))
    time, until = np.asarray(validation_losses(mean, {}, batch, jnp.int32(0)))
    assert (until <= time).all() and 0.4 < (until < time).mean() < 0.6 and (np.floor(time * 10) == np.arange(10)).all()


@pytest.mark.parametrize("solver", ["mean_flow", "euler"])
def test_pictures_in_steps_whose_length_is_told(mean, solver):
    """Against a loop; with the modulation made beforehand, as a pipeline does it, and without. Other solvers tell 0."""
    settings = config.Sample(solver=solver, steps=3, guidance=2.0, schedule="shifted", shift=0.7, batch=2)
    run, params, seeds, prompts = mean, toy_params(mean.model), np.array([3, 4], np.uint32), ["a one", "a two"]
    pipeline = _pipeline(run)
    text, lengths = pipeline.encoder(prompts)
    none, no_lengths = (np.repeat(x, 2, axis=0) for x in pipeline.encoder([""]))
    times = times_of(settings, 4)
    x = noise = np.stack([np.asarray(jax.random.normal(jax.random.key(int(seed)), (8, 8, 3))) for seed in seeds])
    for t, after in zip(times[:-1], times[1:]):
        told = np.full(2, t - after if solver == "mean_flow" else 0, np.float32)
        here = dict(image=x, time=np.full(2, t), guidance=told, divisor=np.full(2, t))
        positive, negative = (
            np.asarray(apply(run.model, params, here | dict(text=a, lengths=b))) for a, b in ((text, lengths), (none, no_lengths))
        )
        x = np.float32(x + (after - t) * (negative + 2 * (positive - negative)))
    assert np.abs(x - noise).max() > 0.1
    (found,) = pipeline.values(prompts, seeds, 8, 8, settings)
    np.testing.assert_allclose(found, x, atol=2e-3)
    whole = paint(
        params, seeds, Condition(text, lengths), Condition(none, no_lengths), model=run.model, compute=run.compute, settings=settings,
        noise_scale=1.0, height=8, width=8,
    )  # fmt: skip
    np.testing.assert_allclose(whole, x, atol=2e-3)


_PIPELINES = {}


def _pipeline(run):
    """One for both solvers, whose times are the same: it must not take the one's modulation for the other's."""
    return _PIPELINES.setdefault(run, Pipeline(run, dict(toy_params(run.model))))


# --- what a config may not say ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ("distill.kind=trajectories distill.segments=0", "segments=0 must be at least 1"),
        ("distill.kind=trajectories distill.trajectories=0", "trajectories=0 must be at least 1"),
        ("distill.kind=trajectories distill.segments=3", "steps=10 does not divide into distill.segments=3"),
        ("distill.kind=guidance distill.segments=2", "are of distill.kind=trajectories, not of guidance"),
        ("distill.path=somewhere", "are of distill.kind=trajectories, not of none"),
        ("distill.teacher=somewhere", "teacher=somewhere teaches nothing yet: say what, by distill.kind"),
        ("flow.time_law=noise", "time_law=noise teaches no time but 1, and distill.kind=none"),
        ("distill.kind=guidance distill.teacher=x flow.time_law=noise", "time_law=noise teaches no time but 1"),
        ("distill.kind=guidance", "kind=guidance learns from a teacher: give distill.teacher"),
        ("distill.kind=mean_flow", "kind=mean_flow learns from a teacher"),
        ("distill.kind=mean_flow init=x distill.sample.unguided_steps=1", "learns one guidance for all times"),
        ("distill.kind=guidance init=x distill.sample.guidance_interval=0,0.9", "learns one guidance for all times"),
        ("distill.kind=trajectories", "kind=trajectories learns from a teacher"),
        ("distill.kind=trajectories init=x flow.coupling=optimal_transport", "pairs and times of its own"),
        ("distill.kind=mean_flow init=x flow.time_law=uniform flow.time_weight=parabola", "pairs and times of its own"),
        ("distill.kind=trajectories init=x data.other_sides=16", "squares of data.side alone"),
        ("distill.kind=trajectories init=x data.bucket_step=8", "squares of data.side alone"),
        ("distill.kind=guidance init=x distill.sample.unconditional=masked", "distill.sample.unconditional=masked leaves no text token"),
        (
            "distill.kind=mean_flow init=x distill.difference=0 compute.attention=cudnn",
            "differentiates forwards, which compute.attention=cudnn",
        ),
        ("distill.kind=mean_flow init=x distill.difference=0 compute.attention=auto", "differentiates forwards"),
        ("distill.kind=mean_flow init=x distill.difference=1", "difference=1.0 must lie between 0 and 1"),
        (
            "distill.kind=mean_flow init=x model.modulation=none compute.attention=xla",
            "in place of the guidance number, which this one does not",
        ),
        ("distill.kind=mean_flow init=x model.modulation=per_block compute.attention=xla", "in place of the guidance number"),
    ],
)
def test_what_cannot_be_is_said(changes, sentence):
    with pytest.raises(config.ConfigError, match=sentence):
        toy_run("unused", "unused", *changes.split())


@pytest.mark.parametrize(
    "changes",
    [
        "distill.kind=guidance distill.rule=picture",
        "distill.kind=guidance init=x flow.coupling=optimal_transport flow.time_law=uniform flow.time_weight=parabola",
        "distill.kind=trajectories init=x flow.time_law=noise distill.segments=5 distill.path=somewhere",
        "distill.kind=mean_flow init=x compute.attention=auto model.modulation=shared model.guidance_embed=true",
        "distill.kind=mean_flow init=x distill.difference=0 compute.attention=pieces",
    ],
)
def test_what_can_be(changes):
    toy_run("unused", "unused", *changes.split())
