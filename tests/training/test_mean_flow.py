"""Mean velocities against finite differences, separate calls of the models and closed forms."""

from dataclasses import replace
from itertools import pairwise

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
    """A batch whose times and lengths are exact in float32; lengths are none, some, all, some."""
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

    def predict(params, x, t, length, text=mean_batch["text"], lengths=mean_batch["lengths"]):
        result = apply(
            model,
            params,
            dict(image=x, text=text, lengths=lengths, time=t, guidance=length, divisor=t),
        )
        return np.asarray(result, np.float64)

    zero = np.zeros(4, np.float32)
    unconditional = predict(
        teacher.params,
        noisy,
        time,
        zero,
        np.repeat(teacher.negative_condition.text, 4, axis=0),
        np.repeat(teacher.negative_condition.lengths, 4),
    )
    velocity = unconditional + 2 * (predict(teacher.params, noisy, time, zero) - unconditional)
    h = np.float32(
        2.0**-15
    )  # the fastest sinusoid changes by 0.03 rad, and time ± h is exact in float32
    ahead, behind = (
        predict(params, np.float32(noisy + s * h * velocity), time + s * h, length + s * h)
        for s in (1, -1)
    )
    change = (ahead - behind) / (2 * np.float64(h))
    expected = np.square(
        predict(params, noisy, time, length) - velocity + wide(length) * change
    ).mean(axis=(1, 2, 3))
    assert (np.square(wide(length) * change).mean(axis=(1, 2, 3))[1:] > 0.1).all(), (
        "the derivatives must matter"
    )

    losses, gradient = pulled(mean, params, mean_batch, teacher, jnp.ones(4))
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(losses[1:], expected[1:], rtol=0.02)

    # The gradient treats the target as a constant. A separate call gives the same tangents.
    @jax.jit
    def moved(x, t, length):
        def f(x, t, length):
            model_of_params = bind_model(model, mean.compute, params)
            text, lengths = mean_batch["text"], mean_batch["lengths"]
            return model_of_params(x, text, lengths, t, length, divisor=t)

        return jax.jvp(
            f, (x, t, length), (jnp.asarray(velocity, jnp.float32), jnp.ones(4), jnp.ones(4))
        )[1]

    target = np.float32(velocity - wide(length) * np.asarray(moved(noisy, time, length)))
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
    """The teacher moves over the first part of a step, and the student over the rest.

    The lengths of the batch are none, exactly that part, and twice more.
    """
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

    def predict(params, x, t, length, text=mean_batch["text"], lengths=mean_batch["lengths"]):
        return np.asarray(
            apply(
                model,
                params,
                dict(image=x, text=text, lengths=lengths, time=t, guidance=length, divisor=t),
            )
        )

    zero = np.zeros(4, np.float32)
    unconditional = predict(
        teacher.params,
        noisy,
        time,
        zero,
        np.repeat(teacher.negative_condition.text, 4, axis=0),
        np.repeat(teacher.negative_condition.lengths, 4),
    )
    velocity = unconditional + 2 * (predict(teacher.params, noisy, time, zero) - unconditional)
    part = np.array([0, 0.125, 0.125, 0.125], np.float32)
    rest = wide(time - part - until) * predict(
        params, noisy - wide(part) * velocity, time - part, time - part - until
    )
    target = np.concatenate(
        [velocity[:1], ((wide(part) * velocity + rest) / wide(np.maximum(time - until, 1e-9)))[1:]]
    )
    assert np.abs(target[1] - velocity[1]).max() < 1e-6
    assert np.abs(target[2:] - velocity[2:]).max() > 0.01
    losses, gradient = pulled(run, params, mean_batch, teacher, jnp.ones(4))
    np.testing.assert_allclose(
        losses,
        np.square(predict(params, noisy, time, time - until) - target).mean(axis=(1, 2, 3)),
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
    """For a student of low frequencies of time, errors scale with the squared ratio of lengths."""
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


def test_every_loss_has_the_same_influence(mean):
    """The gradient is that of losses divided by themselves; the reported loss is their mean."""
    params, teacher, batch = toy_params(mean.model), teacher_of(mean), batch_of(mean)
    weight = jnp.array([0, 1, 2, 1.0])
    _, metrics = step_of(mean)(
        init_state(mean, params), batch | {"weight": weight}, None, None, teacher
    )
    noisy_batch = add_noise_and_times(
        mean, batch | {"weight": weight}, jax.random.fold_in(jax.random.key(mean.train.seed), 0)
    )
    losses, _ = pulled(mean, params, noisy_batch, teacher, jnp.ones(4))
    np.testing.assert_allclose(metrics["loss"], losses[1:].mean(), rtol=1e-3)
    _, gradient = pulled(mean, params, noisy_batch, teacher, weight / (losses + 1e-3) / 4)
    norm = np.sqrt(sum(float(jnp.square(x).sum()) for x in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-3)


def test_a_model_of_one_image_has_straight_trajectories(mean, mean_batch):
    """x̂ is constant, so every mean velocity is the velocity, also at times below min_divisor."""
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


def test_errors_of_images_at_small_times_have_less_weight(mean, mean_batch):
    """A predicted velocity is not divided by the time."""
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
        empty_text = dict(
            text=np.repeat(teacher.negative_condition.text, 4, axis=0),
            lengths=np.repeat(teacher.negative_condition.lengths, 4),
        )
        own, theirs, without = (
            np.asarray(apply(run.model, model_params, inputs | changes))
            for model_params, changes in (
                (params, {}),
                (teacher.params, {}),
                (teacher.params, empty_text),
            )
        )
        np.testing.assert_allclose(
            losses,
            np.square(own - without - 2 * (theirs - without)).mean(axis=(1, 2, 3)),
            rtol=1e-3,
        )


def test_end_times_lie_between_zero_and_the_time():
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


def test_end_times_are_random_and_do_not_change_noise_and_times(mean, monkeypatch):
    batch = batch_of(config.override(mean, ["data.batch_size=64"]))
    batches = [add_noise_and_times(mean, batch, jax.random.key(i)) for i in (1, 2)]
    other = add_noise_and_times(
        config.override(mean, ["distill.kind=none", "distill.teacher="]), batch, jax.random.key(1)
    )
    assert "until" not in other
    assert same({name: batches[0][name] for name in other}, other)
    assert not np.array_equal(
        batches[0]["until"] < batches[0]["time"], batches[1]["until"] < batches[1]["time"]
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
def test_the_mean_flow_solver_passes_step_lengths_to_the_network(mean, solver):
    """Compare with a loop, with and without precomputed modulation. Other solvers pass 0."""
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
    for t, after in pairwise(times):
        length = np.full(2, t - after if solver == "mean_flow" else 0, np.float32)
        here = dict(image=x, time=np.full(2, t), guidance=length, divisor=np.full(2, t))
        positive, negative = (
            np.asarray(apply(run.model, params, here | dict(text=a, lengths=b)))
            for a, b in ((text, lengths), (none, no_lengths))
        )
        x = np.float32(x + (after - t) * (negative + 2 * (positive - negative)))
    assert np.abs(x - noise).max() > 0.1
    (result,) = pipeline.generate_arrays(prompts, seeds.tolist(), 8, 8, settings)
    np.testing.assert_allclose(result, x, atol=2e-3)
    images = generate_images(
        params,
        seeds,
        TextCondition(text, lengths),
        TextCondition(none, no_lengths),
        model=run.model,
        compute=run.compute,
        settings=settings,
        noise_scale=1.0,
        height=8,
        width=8,
    )
    np.testing.assert_allclose(images, x, atol=2e-3)


_PIPELINES = {}


def _pipeline(run):
    """Return one pipeline for both solvers: it must not reuse the modulation of the other."""
    return _PIPELINES.setdefault(run, Pipeline(run, dict(toy_params(run.model))))
