"""Mean velocities, against finite differences, separate calls of the models and closed forms; and what is painted with them."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.flow import distillation
from radiance.flow.distillation import Teacher
from radiance.flow.sampler import TextCondition, generate_images
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import bind_model
from radiance.pipeline import Pipeline
from radiance.training import step
from radiance.training.step import add_noise_and_times, compute_validation_losses, init_state
from tests.helpers.distilled_runs import close, distilling, pulled, pulled_to, teacher_of, wide
from tests.helpers.toy_models import apply, toy_params
from tests.helpers.toy_runs import MEAN, batch_of, same, step_of


@pytest.fixture(scope="module")
def mean():
    return distilling(
        "mean_flow", "distill.sample.guidance_scale=2", "distill.finite_difference=0", **MEAN
    )


@pytest.fixture(scope="module")
def mean_batch(mean):
    """At times that float32 holds exactly, and of lengths that it does: none, some, all of the way, some."""
    batch = add_noise_and_times(mean, batch_of(mean), jax.random.key(3))
    time = np.array([0.5, 0.25, 0.75, 0.875], np.float32)
    return batch | {
        "time": jnp.asarray(time),
        "until": jnp.asarray(time - np.float32([0, 0.125, 0.75, 0.25])),
    }


def test_mean_velocities_against_finite_differences(mean, mean_batch):
    model, params, teacher = mean.model, toy_params(mean.model), teacher_of(mean)
    image, noise, time = (np.asarray(mean_batch[name]) for name in ("image", "noise", "time"))
    length = time - np.asarray(mean_batch["until"])
    noisy = (1 - wide(time)) * image + wide(time) * noise

    def at(params, x, t, length, text=mean_batch["text"], lengths=mean_batch["lengths"]):
        found = apply(
            model,
            params,
            dict(image=x, text=text, lengths=lengths, time=t, guidance=length, divisor=t),
        )
        return np.asarray(found, np.float64)

    none = np.zeros(4, np.float32)
    without = at(
        teacher.params,
        noisy,
        time,
        none,
        np.repeat(teacher.negative_condition.text, 4, axis=0),
        np.repeat(teacher.negative_condition.lengths, 4),
    )
    along = without + 2 * (at(teacher.params, noisy, time, none) - without)
    h = np.float32(
        2.0**-15
    )  # the sinusoids' fastest turns by 0.03 in it, and float32 holds time ± h
    ahead, behind = (
        at(params, np.float32(noisy + s * h * along), time + s * h, length + s * h) for s in (1, -1)
    )
    change = (ahead - behind) / (2 * np.float64(h))
    expected = np.square(at(params, noisy, time, length) - along + wide(length) * change).mean(
        axis=(1, 2, 3)
    )
    assert (np.square(wide(length) * change).mean(axis=(1, 2, 3))[1:] > 0.1).all(), (
        "the derivatives are seen"
    )

    losses, gradient = pulled(mean, params, mean_batch, teacher, jnp.ones(4))
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(losses[1:], expected[1:], rtol=0.02)

    # The target is a constant to the gradient. The same tangents, from a call of its own:
    @jax.jit
    def moved(x, t, length):
        f = lambda x, t, length: bind_model(model, mean.compute, params)(
            x, mean_batch["text"], mean_batch["lengths"], t, length, divisor=t
        )
        return jax.jvp(
            f, (x, t, length), (jnp.asarray(along, jnp.float32), jnp.ones(4), jnp.ones(4))
        )[1]

    target = np.float32(along - wide(length) * np.asarray(moved(noisy, time, length)))
    inputs = dict(
        image=noisy,
        text=mean_batch["text"],
        lengths=mean_batch["lengths"],
        time=time,
        guidance=length,
        divisor=time,
    )
    close(gradient, pulled_to(model, params, inputs, target, np.ones(4, np.float32))[1], rtol=2e-3)


def test_mean_velocities_by_differences(mean, mean_batch):
    """A step's way is the teacher's over the first part of it, and the student's over the rest. The lengths of the batch: none, all of the part, more, more."""
    run, model, params, teacher = (
        config.override(mean, ["distill.finite_difference=0.125"]),
        mean.model,
        toy_params(mean.model),
        teacher_of(mean),
    )
    image, noise, time, until = (
        np.asarray(mean_batch[name]) for name in ("image", "noise", "time", "until")
    )
    noisy = (1 - wide(time)) * image + wide(time) * noise

    def at(params, x, t, length, text=mean_batch["text"], lengths=mean_batch["lengths"]):
        return np.asarray(
            apply(
                model,
                params,
                dict(image=x, text=text, lengths=lengths, time=t, guidance=length, divisor=t),
            )
        )

    none = np.zeros(4, np.float32)
    without = at(
        teacher.params,
        noisy,
        time,
        none,
        np.repeat(teacher.negative_condition.text, 4, axis=0),
        np.repeat(teacher.negative_condition.lengths, 4),
    )
    along = without + 2 * (at(teacher.params, noisy, time, none) - without)
    part = np.array([0, 0.125, 0.125, 0.125], np.float32)
    rest = wide(time - part - until) * at(
        params, noisy - wide(part) * along, time - part, time - part - until
    )
    target = np.concatenate(
        [along[:1], ((wide(part) * along + rest) / wide(np.maximum(time - until, 1e-9)))[1:]]
    )
    assert np.abs(target[1] - along[1]).max() < 1e-6
    assert np.abs(target[2:] - along[2:]).max() > 0.01
    losses, gradient = pulled(run, params, mean_batch, teacher, jnp.ones(4))
    np.testing.assert_allclose(
        losses,
        np.square(at(params, noisy, time, time - until) - target).mean(axis=(1, 2, 3)),
        rtol=1e-4,
    )
    inputs = dict(
        image=noisy,
        text=mean_batch["text"],
        lengths=mean_batch["lengths"],
        time=time,
        guidance=time - until,
        divisor=time,
    )
    close(gradient, pulled_to(model, params, inputs, target, np.ones(4, np.float32))[1], rtol=2e-3)


def test_a_small_difference_is_nearly_the_derivative(mean, mean_batch):
    """Where the student hears the low frequencies of time alone. What is missed of a step's mean is missed of its part, so by the square of their ratio."""
    params, teacher = toy_params(mean.model), teacher_of(mean)
    kernel = params["modulation"]["proj_in"]["kernel"]
    width = mean.model.approximator_dim // 4
    slow = np.concatenate(
        [np.tile(np.arange(width // 2) >= width // 4, 4), np.ones(2 * width, bool)]
    )
    params = params | {
        "modulation": params["modulation"]
        | {"proj_in": params["modulation"]["proj_in"] | {"kernel": kernel * slow[:, None]}}
    }
    exact, _ = pulled(mean, params, mean_batch, teacher, jnp.ones(4))
    part = np.float32(2**-7)
    near, _ = pulled(
        config.override(mean, [f"distill.finite_difference={part}"]),
        params,
        mean_batch,
        teacher,
        jnp.ones(4),
    )
    length = np.asarray(mean_batch["time"] - mean_batch["until"])
    np.testing.assert_allclose(near * np.where(length > 0, length / part, 1) ** 2, exact, rtol=0.05)


def test_every_loss_pulls_alike(mean):
    """A step's gradient is that of the losses, each over itself; what it reports is their plain mean."""
    params, teacher, batch = toy_params(mean.model), teacher_of(mean), batch_of(mean)
    weight = jnp.array([0, 1, 2, 1.0])
    _, metrics = step_of(mean)(
        init_state(mean, params), batch | {"weight": weight}, None, None, teacher
    )
    drawn = add_noise_and_times(
        mean, batch | {"weight": weight}, jax.random.fold_in(jax.random.key(mean.train.seed), 0)
    )
    losses, _ = pulled(mean, params, drawn, teacher, jnp.ones(4))
    np.testing.assert_allclose(metrics["loss"], losses[1:].mean(), rtol=1e-3)
    _, gradient = pulled(mean, params, drawn, teacher, weight / (losses + 1e-3) / 4)
    norm = np.sqrt(sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-3)


def test_a_model_of_one_image_has_straight_ways(mean, mean_batch):
    """x̂ is the same everywhere, so every mean velocity is the velocity, at times below epsilon too."""
    head = {
        name: {part: 0 * x for part, x in leaves.items()}
        for name, leaves in toy_params(mean.model)["head"].items()
    }
    assert {"kernel", "bias"} == head["linear"].keys()
    head["linear"]["bias"] = head["linear"]["bias"] + 0.3
    params = toy_params(mean.model) | {"head": head}
    time = jnp.array([0.5, 0.08, 1, 0.02])
    batch = mean_batch | {"time": time, "until": time - jnp.array([0.3, 0.08, 0, 0.015])}
    for difference in (0, 0.05):
        run = config.override(mean, [f"distill.finite_difference={difference}"])
        losses, _ = pulled(
            run, params, batch, Teacher(params, teacher_of(mean).negative_condition), jnp.ones(4)
        )
        np.testing.assert_allclose(losses, 0, atol=1e-8)


def test_errors_at_small_times_weigh_less(mean, mean_batch):
    """Those of images: a velocity is not divided by the time."""
    params, teacher, time = (
        toy_params(mean.model),
        teacher_of(mean),
        np.array([0.04, 0.02, 0.01, 0.3], np.float32),
    )
    batch = mean_batch | {
        "time": jnp.asarray(time),
        "until": jnp.asarray(time),
    }  # of no length, where u = v
    for prediction in ("x0", "velocity"):
        run = replace(mean, model=replace(mean.model, prediction=prediction))
        losses, _ = pulled(run, params, batch, teacher, jnp.ones(4))
        image, noise = (np.asarray(batch[name]) for name in ("image", "noise"))
        inputs = dict(
            image=(1 - wide(time)) * image + wide(time) * noise,
            text=batch["text"],
            lengths=batch["lengths"],
            time=time,
        )
        inputs |= dict(
            guidance=0 * time, divisor=np.maximum(time, 0.05) if prediction == "x0" else time
        )
        own, theirs, without = (np.asarray(apply(run.model, p, inputs | more)) for p, more in (
            (params, {}), (teacher.params, {}),
            (teacher.params, dict(text=np.repeat(teacher.negative_condition.text, 4, axis=0), lengths=np.repeat(teacher.negative_condition.lengths, 4))),
        ))  # fmt: skip
        np.testing.assert_allclose(
            losses,
            np.square(own - without - 2 * (theirs - without)).mean(axis=(1, 2, 3)),
            rtol=1e-3,
        )


def test_steps_end_between_zero_and_their_begin():
    time = jax.random.uniform(jax.random.key(1), (4000,))
    until = np.asarray(distillation.sample_end_times(jax.random.key(2), time))
    assert (until >= 0).all()
    assert (until <= time).all()
    some = until < time
    assert abs(some.mean() - 0.5) < 0.04
    share = np.sort((until / np.asarray(time))[some])
    assert np.abs(share - (np.arange(len(share)) + 0.5) / len(share)).max() < 0.05
    assert abs(np.corrcoef(some, time)[0, 1]) < 0.08
    assert abs(np.corrcoef((until / np.asarray(time))[some], np.asarray(time)[some])[0, 1]) < 0.1


def test_ends_are_drawn_anew_and_beside_what_was_drawn(mean, monkeypatch):
    batch = batch_of(config.override(mean, ["data.batch_size=64"]))
    drawn = [add_noise_and_times(mean, batch, jax.random.key(i)) for i in (1, 2)]
    other = add_noise_and_times(
        config.override(mean, ["distill.kind=none", "distill.teacher="]), batch, jax.random.key(1)
    )
    assert "until" not in other
    assert same({name: drawn[0][name] for name in other}, other)
    assert not np.array_equal(
        drawn[0]["until"] < drawn[0]["time"], drawn[1]["until"] < drawn[1]["time"]
    )
    monkeypatch.setattr(
        step,
        "compute_image_losses",
        lambda run, params, batch, teacher: jnp.stack([batch["time"], batch["until"]], axis=-1),
    )
    time, until = np.asarray(compute_validation_losses(mean, {}, batch, jnp.int32(0)))
    assert (until <= time).all()
    assert 0.4 < (until < time).mean() < 0.6
    assert (np.floor(time * 10) == np.arange(10)).all()


@pytest.mark.parametrize("solver", ["mean_flow", "euler"])
def test_images_in_steps_whose_length_is_told(mean, solver):
    """Against a loop; with the modulation made beforehand, as a pipeline does it, and without. Other solvers tell 0."""
    settings = config.Sample(
        solver=solver, steps=3, guidance_scale=2.0, schedule="shifted", shift=0.7, batch_size=2
    )
    run, params, seeds, prompts = (
        mean,
        toy_params(mean.model),
        np.array([3, 4], np.uint32),
        ["a one", "a two"],
    )
    pipeline = _pipeline(run)
    text, lengths = pipeline.encoder(prompts)
    none, no_lengths = (np.repeat(x, 2, axis=0) for x in pipeline.encoder([""]))
    times = make_time_schedule(settings, 4)
    x = noise = np.stack(
        [np.asarray(jax.random.normal(jax.random.key(int(seed)), (8, 8, 3))) for seed in seeds]
    )
    for t, after in zip(times[:-1], times[1:]):
        told = np.full(2, t - after if solver == "mean_flow" else 0, np.float32)
        here = dict(image=x, time=np.full(2, t), guidance=told, divisor=np.full(2, t))
        positive, negative = (
            np.asarray(apply(run.model, params, here | dict(text=a, lengths=b)))
            for a, b in ((text, lengths), (none, no_lengths))
        )
        x = np.float32(x + (after - t) * (negative + 2 * (positive - negative)))
    assert np.abs(x - noise).max() > 0.1
    (found,) = pipeline.generate_arrays(prompts, seeds, 8, 8, settings)
    np.testing.assert_allclose(found, x, atol=2e-3)
    whole = generate_images(
        params, seeds, TextCondition(text, lengths), TextCondition(none, no_lengths), model=run.model, compute=run.compute, settings=settings,
        noise_scale=1.0, height=8, width=8,
    )  # fmt: skip
    np.testing.assert_allclose(whole, x, atol=2e-3)


_PIPELINES = {}


def _pipeline(run):
    """One for both solvers, whose times are the same: it must not take the one's modulation for the other's."""
    return _PIPELINES.setdefault(run, Pipeline(run, dict(toy_params(run.model))))
