"""Distillation targets: what a student learns from a teacher. Pure functions on arrays.

For `distill.kind` "guidance" and "mean_flow" the teacher predicts in every step; for "trajectories"
its samples are stored before training (`training/trajectories.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped

from radiance import config
from radiance.flow import objective
from radiance.flow.guidance import TextCondition, apply_guidance
from radiance.flow.objective import Images
from radiance.flow.sampler import sample_noise
from radiance.flow.schedules import make_time_schedule
from radiance.model.transformer import Params, Transformer, bind_model

INTERVAL_FRACTION = 0.5  # fraction of mean_flow's steps with a length; the others are 0 long
LOSS_EPSILON = 1e-3  # added to the losses that mean_flow divides its own by
MIN_TIME = 1e-6  # least time that is a divisor


class Teacher(NamedTuple):
    """Inputs of a distillation step besides its batch.

    Attributes:
        params: The teacher's parameters; None if no teacher predicts.
        negative_condition: Condition [1, l, e] that guidance leads away from.
    """

    params: Params | None
    negative_condition: TextCondition


# --- velocities -----------------------------------------------------------------------------------


def predict_velocity(
    model: Transformer,
    batch: dict[str, Array],
    noisy: Images,
    divisor: Float32[Array, " b"],
    condition: TextCondition | None = None,
) -> Images:
    """Predict velocities at the batch's times.

    Args:
        model: The network.
        batch: A batch with "text", "lengths" and "time".
        noisy: Images mixed with noise.
        divisor: Divisor of image − x̂ for x0 models.
        condition: One condition [1, l, e] for all images, in place of the batch's texts.

    Returns:
        Velocities.
    """
    if condition is None:
        text, lengths = batch["text"], batch["lengths"]
    else:
        text = jnp.broadcast_to(condition.text, (len(noisy), *condition.text.shape[1:]))
        lengths = jnp.broadcast_to(condition.lengths, (len(noisy),))
    return model(noisy, text, lengths, batch["time"], divisor=divisor)


def predict_guided_velocity(
    run: config.Config,
    model: Transformer,
    batch: dict[str, Array],
    noisy: Images,
    divisor: Float32[Array, " b"],
    negative_condition: TextCondition,
) -> Images:
    """Predict guided velocities (`distill.sample`); rows with a dropped caption stay unguided.

    Args:
        run: The run's settings.
        model: The network.
        batch: A batch with "text", "lengths", "time" and possibly "dropped".
        noisy: Images mixed with noise.
        divisor: Divisor of image − x̂ for x0 models.
        negative_condition: Condition [1, l, e] that guidance leads away from.

    Returns:
        Velocities.
    """
    positive_velocity = predict_velocity(model, batch, noisy, divisor)
    if run.distill.sample.guidance_scale == 1:
        return positive_velocity
    negative_velocity = predict_velocity(model, batch, noisy, divisor, negative_condition)
    guided_velocity = apply_guidance(positive_velocity, negative_velocity, run.distill.sample)
    return _restore_dropped(batch, positive_velocity, guided_velocity)


def _restore_dropped(
    batch: dict[str, Array], unguided_velocity: Images, guided_velocity: Images
) -> Images:
    """Replace guided velocities by unguided ones in rows with a dropped caption."""
    if "dropped" not in batch:
        return guided_velocity
    return jnp.where(add_pixel_axes(batch["dropped"]), unguided_velocity, guided_velocity)


def _predict_teacher_velocity(
    run: config.Config,
    batch: dict[str, Array],
    noisy: Images,
    divisor: Float32[Array, " b"],
    teacher: Teacher,
) -> Images:
    """Predict the teacher's guided velocities."""
    assert teacher.params is not None
    network = bind_model(run.model, run.compute, teacher.params)
    return predict_guided_velocity(run, network, batch, noisy, divisor, teacher.negative_condition)


# --- guidance distillation ------------------------------------------------------------------------


def compute_guidance_target(
    run: config.Config,
    student: Transformer,
    batch: dict[str, Array],
    noisy: Images,
    image_velocity: Images,
    teacher: Teacher,
) -> Images:
    """Compute the guided velocity that `distill.kind=guidance` learns.

    `guidance_target` "prediction" is v⁻ + g·(v⁺ − v⁻) of the teacher. "image" is v⁻ + g·(v − v⁻)
    with v⁻ of the student and v the velocity of the image, as in Chroma's trainer. Both have the
    same mean where v⁺ is the best prediction and student and teacher agree on v⁻.

    Args:
        run: The run's settings.
        student: The trained network.
        batch: A batch with "text", "lengths", "time" and possibly "dropped".
        noisy: Images mixed with noise.
        image_velocity: Velocities of the images.
        teacher: Teacher and negative condition.

    Returns:
        Targets; rows with a dropped caption have the target without guidance.
    """
    divisor = objective.velocity_divisor(run.flow, batch["time"])
    if run.distill.guidance_target == "prediction":
        return _predict_teacher_velocity(run, batch, noisy, divisor, teacher)
    negative_velocity = predict_velocity(student, batch, noisy, divisor, teacher.negative_condition)
    guided_velocity = apply_guidance(image_velocity, negative_velocity, run.distill.sample)
    return _restore_dropped(batch, image_velocity, guided_velocity)


# --- mean flow ------------------------------------------------------------------------------------


def compute_mean_flow_losses(
    run: config.Config,
    student: Transformer,
    batch: dict[str, Array],
    noisy: Images,
    teacher: Teacher,
) -> Float32[Array, " b"]:
    """Compute squared errors of the mean velocity u from time t back to r (arXiv 2505.13447).

    For `distill.finite_difference` 0 the target is u = v − (t − r)·du/dt, with the derivative along
    the teacher's guided velocity v (eq. 6, algorithm 1). For a difference δ, (t − r)·u is δ·v plus
    (t − δ − r)·u at the point that v leads to; the former is its limit. The network reads 1000·t
    through sinusoids: its derivative in t is noisy and much larger than a velocity, and the mean of
    two velocities is not. Targets have no gradient. The student reads t − r through its guidance
    input; where that is 0, u = v.

    Sampling follows both velocities, so x0 models divide by the time itself; their errors have the
    weight t² / max(t, ε)².

    Args:
        run: The run's settings.
        student: The trained network.
        batch: A batch with "text", "lengths", "time" (t), "until" (r) and possibly "dropped".
        noisy: Images mixed with noise.
        teacher: Teacher and negative condition.

    Returns:
        Losses of the images.
    """
    time, length = batch["time"], batch["time"] - batch["until"]
    guided_velocity = jax.lax.stop_gradient(
        _predict_teacher_velocity(run, batch, noisy, clamp_time(time), teacher)
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
        mean_velocity = predict_mean_velocity(noisy, time, length)
        finite_step = jnp.minimum(run.distill.finite_difference, length)
        target = _compute_finite_target(
            predict_mean_velocity, noisy, time, length, finite_step, guided_velocity
        )
    losses = objective.mean_squared_errors(mean_velocity, jax.lax.stop_gradient(target))
    if run.model.prediction == "x0":
        losses = losses * jnp.square(time / jnp.maximum(time, run.flow.min_divisor))
    return losses


def _compute_finite_target(
    predict_mean_velocity: Callable[..., Images],
    noisy: Images,
    time: Float32[Array, " b"],
    length: Float32[Array, " b"],
    finite_step: Float32[Array, " b"],
    guided_velocity: Images,
) -> Images:
    """Compute the mean velocity of a finite step with the teacher, then of the remaining step."""
    remaining_velocity = predict_mean_velocity(
        noisy - add_pixel_axes(finite_step) * guided_velocity,
        time - finite_step,
        length - finite_step,
    )
    displacement = add_pixel_axes(finite_step) * guided_velocity + (
        add_pixel_axes(length - finite_step) * remaining_velocity
    )
    return jnp.where(
        add_pixel_axes(length) > 0,
        displacement / add_pixel_axes(jnp.maximum(length, 1e-9)),
        guided_velocity,
    )


def add_pixel_axes(x: Shaped[Array, " b"]) -> Shaped[Array, "b 1 1 1"]:
    """Add axes for height, width and channels to one value per image."""
    return x[:, None, None, None]


def normalize_losses(losses: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """Divide losses by their own values, so that each has a gradient of about the same size.

    This is MeanFlow's adaptive weight with p = 1.
    """
    return losses / jax.lax.stop_gradient(losses + LOSS_EPSILON)


def clamp_time(time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """Raise times to at least `MIN_TIME`, so that they can be divisors."""
    return jnp.maximum(time, MIN_TIME)


def sample_end_times(key: Array, time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """Sample the ends of mean_flow's steps.

    Args:
        key: Random key.
        time: Start of each step.

    Returns:
        Ends: uniform in [0, time] for a fraction `INTERVAL_FRACTION` of the steps, else `time`.
    """
    end_key, interval_key = jax.random.split(key)
    earlier_times = time * jax.random.uniform(end_key, time.shape)
    has_length = jax.random.bernoulli(interval_key, INTERVAL_FRACTION, time.shape)
    return jnp.where(has_length, earlier_times, time)


# --- trajectories ---------------------------------------------------------------------------------


def compute_segment_times(run: config.Config, tokens: int) -> Float32[np.ndarray, " boundaries"]:
    """Compute the times that divide the teacher's trajectory into segments.

    Args:
        run: The run's settings.
        tokens: Number of image tokens.

    Returns:
        Falling times of the teacher's schedule from 1 to 0, one more than there are segments.
    """
    sample, segments = run.distill.sample, run.distill.segments
    return make_time_schedule(sample, tokens)[:: sample.steps // segments]


class Segments(NamedTuple):
    """A segment of a trajectory for each row: states and times of its ends."""

    begin: Images
    end: Images
    begin_time: Float32[Array, " b"]
    end_time: Float32[Array, " b"]

    def extend(self) -> tuple[Images, Images]:
        """Return the line through both ends at time 0, an image, and at time 1, noise."""
        slope = (self.begin - self.end) / add_pixel_axes(self.begin_time - self.end_time)
        image = self.end - add_pixel_axes(self.end_time) * slope
        return image, self.end + add_pixel_axes(1 - self.end_time) * slope


def select_segments(
    points: Float32[Array, "b boundaries height width c"],
    boundary_times: Float32[Array, " boundaries"],
    segment_index: Int32[Array, " b"],
) -> Segments:
    """Select a segment of each row's trajectory.

    Args:
        points: States at the boundaries of the segments, from the noise to the image.
        boundary_times: Their times.
        segment_index: Segment of each row; 0 begins at the noise.

    Returns:
        The segments.
    """
    rows = jnp.arange(len(points))
    return Segments(
        points[rows, segment_index],
        points[rows, segment_index + 1],
        boundary_times[segment_index],
        boundary_times[segment_index + 1],
    )


def make_segment_batch(
    run: config.Config,
    batch: dict[str, Array],
    segment_index: Int32[Array, " b"],
    position: Float32[Array, " b"],
) -> dict[str, Array]:
    """Make images, noise and times whose straight lines pass through the ends of segments.

    A loss on images and noise is then one on segments too. With one segment, image and noise are
    those of the trajectory.

    Args:
        run: The run's settings.
        batch: A batch of trajectories: "image" [b, segments, height, width, c], "seed", "text",
            "lengths" and "weight".
        segment_index: Segment of each row; 0 begins at the noise.
        position: Position of each row's time in its segment, from 0 (end) to 1 (begin).

    Returns:
        The batch with "image", "noise" and "time".
    """
    points = batch["image"].astype(jnp.float32)
    _, _, height, width, channels = points.shape
    noise = run.flow.noise_scale * sample_noise(batch["seed"], (height, width, channels))
    points = jnp.concatenate([noise[:, None], points], axis=1)
    num_tokens = (height // run.model.patch) * (width // run.model.patch)
    segment = select_segments(
        points, jnp.asarray(compute_segment_times(run, num_tokens)), segment_index
    )
    image, noise = segment.extend()
    segment_arrays = {
        "image": image,
        "noise": noise,
        "time": segment.end_time + (segment.begin_time - segment.end_time) * position,
    }
    return {name: batch[name] for name in ("text", "lengths", "weight")} | segment_arrays
