"""What a model is taught by another: targets in place of the images' own velocities. Pure functions on arrays.

Of `distill.kind=guidance` and `mean_flow` the teacher predicts in every step; of `trajectories` it has painted before (`trajectories.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped

from radiance import config
from radiance.flow import objective
from radiance.flow.guidance import apply_guidance
from radiance.flow.sampler import TextCondition, sample_noise
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import Params, Transformer, bind_model

INTERVAL_FRACTION = 0.5  # share of mean_flow's steps that are of some length; the others have none, and teach the velocity itself
LOSS_EPSILON = 1e-3  # added to the losses that mean_flow divides its own by
MIN_TIME = 1e-6  # a time that is divided by


class Teacher(NamedTuple):
    """What a step is given beside its batch."""

    params: Params | None  # None where no teacher predicts
    negative_condition: TextCondition  # [1, l, e]: what guidance leads away from


def predict_velocity(
    model: Transformer,
    batch: dict[str, Array],
    noisy: Array,
    divisor: Array,
    condition: TextCondition | None = None,
) -> Array:
    """At the batch's times; of another text than its own, which is one for all, where that is given."""
    if condition is None:
        return model(noisy, batch["text"], batch["lengths"], batch["time"], divisor=divisor)
    batch_size = len(noisy)
    embeddings = jnp.broadcast_to(condition.text, (batch_size, *condition.text.shape[1:]))
    return model(
        noisy,
        embeddings,
        jnp.broadcast_to(condition.lengths, (batch_size,)),
        batch["time"],
        divisor=divisor,
    )


def predict_guided_velocity(
    run: config.Config,
    model: Transformer,
    batch: dict[str, Array],
    noisy: Array,
    divisor: Array,
    negative_condition: TextCondition,
) -> Array:
    """The model's guided velocity (`distill.sample`); not guided where a caption was dropped."""
    positive_velocity = predict_velocity(model, batch, noisy, divisor)
    if run.distill.sample.guidance_scale == 1:
        return positive_velocity
    return _restore_dropped(
        batch,
        positive_velocity,
        apply_guidance(
            positive_velocity,
            predict_velocity(model, batch, noisy, divisor, negative_condition),
            run.distill.sample,
        ),
    )


def _restore_dropped(
    batch: dict[str, Array], unguided_velocity: Array, guided_velocity: Array
) -> Array:
    """What no caption says stays what it is, for guidance leads away from it."""
    return (
        jnp.where(add_pixel_axes(batch["dropped"]), unguided_velocity, guided_velocity)
        if "dropped" in batch
        else guided_velocity
    )


def compute_guidance_target(
    run: config.Config,
    student: Transformer,
    batch: dict[str, Array],
    noisy: Float32[Array, "b height width c"],
    image_velocity: Float32[Array, "b height width c"],
    teacher: Teacher,
) -> Float32[Array, "b height width c"]:
    """The guided velocity that `distill.kind=guidance` learns.

    rule=prediction: v⁻ + g·(v⁺ − v⁻) of the teacher. rule=image: v⁻ + g·(plain − v⁻), v⁻ the student's and `plain` the velocity of the
    image: as Chroma's trainer does it. The two have one mean where v⁺ is the best prediction and student and teacher agree on v⁻. Rows whose
    caption was dropped keep the target without guidance.
    """
    divisor = objective.velocity_divisor(run.flow, batch["time"])
    if run.distill.guidance_target == "prediction":
        return predict_guided_velocity(
            run,
            bind_model(run.model, run.compute, teacher.params),
            batch,
            noisy,
            divisor,
            teacher.negative_condition,
        )
    guided_velocity = apply_guidance(
        image_velocity,
        predict_velocity(student, batch, noisy, divisor, teacher.negative_condition),
        run.distill.sample,
    )
    return _restore_dropped(batch, image_velocity, guided_velocity)


def compute_mean_flow_losses(
    run: config.Config,
    student: Transformer,
    batch: dict[str, Array],
    noisy: Float32[Array, "b height width c"],
    teacher: Teacher,
) -> Float32[Array, " b"]:
    """Squared error of the mean velocity u over the step from `time` back to `until` (MeanFlow, arXiv 2505.13447).

    With distill.finite_difference=0 as there (eq. 6, algorithm 1): u = v − (t − r)·du/dt, the derivative taken along the teacher's guided velocity v.
    With a difference δ: (t − r)·u is δ·v and the rest of the way, (t − δ − r)·u at the point that v leads to, of which the former is the
    limit. The network reads 1000·t through sinusoids, so that derivatives in t are far larger than velocities and say little; the mean of two
    velocities is not. The right side is a constant to the gradient. The student reads t − r in place of the guidance number: where that
    is 0, u = v. Both are gone along, so images are divided by the time itself, as in sampling; the error of x0 models is weighed by
    t² / max(t, ε)² instead.
    """
    time, length = batch["time"], batch["time"] - batch["until"]
    guided_velocity = jax.lax.stop_gradient(
        predict_guided_velocity(
            run,
            bind_model(run.model, run.compute, teacher.params),
            batch,
            noisy,
            clamp_time(time),
            teacher.negative_condition,
        )
    )

    def predict_mean_velocity(x, time, length):
        return student(x, batch["text"], batch["lengths"], time, length, divisor=clamp_time(time))

    if run.distill.finite_difference == 0:
        mean_velocity, derivative = jax.jvp(
            predict_mean_velocity,
            (noisy, time, length),
            (guided_velocity, jnp.ones_like(time), jnp.ones_like(time)),
        )
        target = guided_velocity - add_pixel_axes(length) * derivative
    else:
        mean_velocity, finite_step = (
            predict_mean_velocity(noisy, time, length),
            jnp.minimum(run.distill.finite_difference, length),
        )
        remaining_velocity = predict_mean_velocity(
            noisy - add_pixel_axes(finite_step) * guided_velocity,
            time - finite_step,
            length - finite_step,
        )
        target = jnp.where(
            add_pixel_axes(length) > 0,
            (
                add_pixel_axes(finite_step) * guided_velocity
                + add_pixel_axes(length - finite_step) * remaining_velocity
            )
            / add_pixel_axes(jnp.maximum(length, 1e-9)),
            guided_velocity,
        )
    losses = objective.mean_squared_errors(mean_velocity, jax.lax.stop_gradient(target))
    return (
        losses * jnp.square(time / jnp.maximum(time, run.flow.min_divisor))
        if run.model.prediction == "x0"
        else losses
    )


def add_pixel_axes(x: Shaped[Array, " b"]) -> Shaped[Array, "b 1 1 1"]:
    """One of each image, beside its pixels."""
    return x[:, None, None, None]


def normalize_losses(losses: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """Losses of which each pulls about as hard as another: MeanFlow's adaptive weight with p = 1."""
    return losses / jax.lax.stop_gradient(losses + LOSS_EPSILON)


def clamp_time(time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """The time, where something can be divided by it."""
    return jnp.maximum(time, MIN_TIME)


def sample_end_times(key: Array, time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """Ends of mean_flow's steps: of a part of them anywhere between 0 and their beginning, of the rest at their beginning itself."""
    end_key, interval_key = jax.random.split(key)
    earlier_times = time * jax.random.uniform(end_key, time.shape)
    return jnp.where(
        jax.random.bernoulli(interval_key, INTERVAL_FRACTION, time.shape), earlier_times, time
    )


def compute_segment_times(run: config.Config, tokens: int) -> Float32[np.ndarray, " segments+1"]:
    """Falling, from 1 to 0: those of the teacher's schedule that its way is cut at."""
    sample, segments = run.distill.sample, run.distill.segments
    return make_time_schedule(sample, tokens)[:: sample.steps // segments]


def make_segment_batch(
    run: config.Config,
    batch: dict[str, Array],
    segment_index: Int32[Array, " b"],
    position: Float32[Array, " b"],
) -> dict[str, Array]:
    """The batch with an image, noise and a time of each row: so that the straight line between the two is the one through the ends of a
    segment of its trajectory, and the time lies on it, from the segment's end (place 0) to its begin (1).

    So every loss on images and noise is one on segments too. Of one segment, image and noise are the trajectory's own.
    """
    points = batch["image"].astype(jnp.float32)
    batch_size, segments, height, width, channels = points.shape
    noise = run.flow.noise_scale * sample_noise(batch["seed"], (height, width, channels))
    points = jnp.concatenate([noise[:, None], points], axis=1)
    boundary_times = jnp.asarray(
        compute_segment_times(run, (height // run.model.patch) * (width // run.model.patch))
    )
    rows = jnp.arange(batch_size)
    (begin, end), (begin_time, end_time) = (
        (points[rows, segment_index], points[rows, segment_index + 1]),
        (boundary_times[segment_index], boundary_times[segment_index + 1]),
    )

    slope = (begin - end) / add_pixel_axes(begin_time - end_time)
    segment_arrays = {
        "image": end - add_pixel_axes(end_time) * slope,
        "noise": end + add_pixel_axes(1 - end_time) * slope,
        "time": end_time + (begin_time - end_time) * position,
    }
    return {name: batch[name] for name in ("text", "lengths", "weight")} | segment_arrays
