"""Distribution matching along the student's own trajectory (TDM, arXiv 2503.06674).

From captions alone, a student of K steps learns that the states of its trajectory have the
distribution of noisy images of its teacher at the same time. Three networks share frozen base
weights: the teacher is the base with guidance, the student is the base with one LoRA, and the fake
score is the base with another LoRA. Each training step does this:

1. The student's K Euler steps x(t₀) = noise, …, x(t_K) are sampled without a gradient.
2. The fake score learns the flow of the student's images. A segment m of the trajectory is chosen
   for each row, and its end is mixed with fresh noise ξ to a time τ between tₘ₊₁ and 1, or tₘ
   (`distill.noise_limit`):

       x_τ = c·x(tₘ₊₁) + √(τ² − c²·tₘ₊₁²)·ξ,   c = (1 − τ) / (1 − tₘ₊₁)

   The loss is the flow's own, for the image x̂₀ = x(tₘ) − tₘ·v that the student predicts there.
3. The student learns from the difference of both scores at another such x_τ. Its image is moved
   from what the fake score predicts towards what the teacher predicts:

       loss = mean(√(d² + ε²) − ε) / mean|x̂₀ − x_teacher|,
       d = x̂₀ − stop_gradient(x̂₀ + x_teacher(x_τ) − x_fake(x_τ))

   Only the student's evaluation at (x(tₘ), tₘ) has a gradient.

docs/explanation/distribution_matching.md explains why, and where this differs from others.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, PRNGKeyArray

from radiance import config
from radiance.flow import objective
from radiance.flow.distillation import (
    add_pixel_axes,
    clamp_time,
    compute_segment_times,
    predict_guided_velocity,
    predict_velocity,
    select_segments,
)
from radiance.flow.guidance import TextCondition
from radiance.flow.objective import Images
from radiance.flow.sampler import sample_from_noise
from radiance.model.transformer import Transformer

MIN_TIME = 0.025  # least time of an image that is mixed with noise: below it scores hardly differ
HUBER_WIDTH = 1e-3  # errors above it count by their size, those below it by their square

Batch = dict[str, Array]


def count_tokens(run: config.Config) -> int:
    """Return the number of image tokens of a student's sample."""
    return (run.data.resolution // run.model.patch) ** 2


def sample_student_trajectory(
    run: config.Config, student: Transformer, batch: Batch, noise: Images
) -> Float32[Array, "b times height width c"]:
    """Sample the student's states at the boundaries of its segments, one Euler step for each.

    Args:
        run: The run's settings.
        student: The student.
        batch: A batch with "text" and "lengths".
        noise: Scaled noise.

    Returns:
        The states, from the noise to the image.
    """
    trajectory = sample_from_noise(
        student,
        noise,
        compute_segment_times(run, count_tokens(run)),
        config.Sample(solver="euler", steps=run.distill.segments, guidance_scale=1),
        TextCondition(batch["text"], batch["lengths"]),
        return_trajectory=True,
    )
    return trajectory.swapaxes(0, 1)


def renoise_trajectories(run: config.Config, batch: Batch, key: PRNGKeyArray) -> Batch:
    """Choose a segment and a time τ for each row, and mix the segment's end with noise up to τ.

    Args:
        run: The run's settings.
        batch: A batch with "trajectory", the output of `sample_student_trajectory`.
        key: Random key.

    Returns:
        The batch with "begin" and "begin_time", the state and time at which the segment begins;
        "image", the image that the student predicts there; "time", which is τ; and "noise", so that
        image and noise mix to x_τ.
    """
    segment_key, time_key, noise_key = jax.random.split(key, 3)
    trajectory = batch["trajectory"]
    segment_index = jax.random.randint(segment_key, (len(trajectory),), 0, run.distill.segments)
    boundary_times = jnp.asarray(compute_segment_times(run, count_tokens(run)))
    segments = select_segments(trajectory, boundary_times, segment_index)
    least_time = jnp.maximum(segments.end_time, MIN_TIME)
    latest_time = segments.begin_time if run.distill.noise_limit == "segment" else boundary_times[0]
    position = jax.random.uniform(time_key, least_time.shape)
    time = least_time + (latest_time - least_time) * position
    fresh_noise = run.flow.noise_scale * jax.random.normal(noise_key, segments.end.shape)
    noisy = add_noise(segments.end, segments.end_time, fresh_noise, time)
    image, _ = segments.extend()
    return {name: x for name, x in batch.items() if name != "trajectory"} | {
        "begin": segments.begin,
        "begin_time": segments.begin_time,
        "image": image,
        "noise": (noisy - add_pixel_axes(1 - time) * image) / add_pixel_axes(time),
        "time": time,
    }


def add_noise(
    state: Images, state_time: Float32[Array, " b"], noise: Images, time: Float32[Array, " b"]
) -> Images:
    """Mix states of the flow with fresh noise, so that they belong to a later time.

    Args:
        state: States.
        state_time: Their times, less than 1.
        noise: Scaled noise.
        time: The later times.

    Returns:
        c·state + √(time² − c²·state_time²)·noise with c = (1 − time) / (1 − state_time).
    """
    fraction = (1 - time) / (1 - state_time)
    variance = jnp.square(time) - jnp.square(fraction * state_time)
    amplitude = jnp.sqrt(jnp.maximum(variance, 0))
    return add_pixel_axes(fraction) * state + add_pixel_axes(amplitude) * noise


def compute_student_losses(
    run: config.Config,
    student: Transformer,
    fake_score: Transformer,
    teacher: Transformer,
    batch: Batch,
    negative_condition: TextCondition,
) -> Float32[Array, " b"]:
    """Compute the student's losses; see the module.

    Args:
        run: The run's settings; `distill.sample` has the teacher's guidance.
        student: The student.
        fake_score: The network that has learned the student's images.
        teacher: The base.
        batch: Output of `renoise_trajectories`.
        negative_condition: Condition [1, l, e] that guidance leads away from.

    Returns:
        Losses of the images. Their gradient is that of the student alone.
    """
    time, begin_time = batch["time"], batch["begin_time"]
    noisy, divisor = objective.mix(batch["image"], batch["noise"], time), clamp_time(time)
    teacher_velocity = predict_guided_velocity(
        run, teacher, batch, noisy, divisor, negative_condition
    )
    fake_velocity = predict_velocity(fake_score, batch, noisy, divisor)
    teacher_image = noisy - add_pixel_axes(time) * teacher_velocity
    fake_image = noisy - add_pixel_axes(time) * fake_velocity

    velocity = predict_velocity(
        student, batch | {"time": begin_time}, batch["begin"], clamp_time(begin_time)
    )
    image = batch["begin"] - add_pixel_axes(begin_time) * velocity
    target = jax.lax.stop_gradient(image + teacher_image - fake_image)
    distance = jnp.abs(batch["image"] - teacher_image).mean(axis=(1, 2, 3))
    losses = compute_pseudo_huber_losses(image, target)
    return losses / jax.lax.stop_gradient(jnp.maximum(distance, HUBER_WIDTH))


def compute_pseudo_huber_losses(image: Images, target: Images) -> Float32[Array, " b"]:
    """Compute the mean of √(d² + ε²) − ε of each image, where d is the error of a value."""
    errors = jnp.sqrt(jnp.square(image - target) + HUBER_WIDTH**2) - HUBER_WIDTH
    return errors.mean(axis=(1, 2, 3))
