"""What a model is taught by another: targets in place of the pictures' own velocities. Pure functions on arrays.

Of `distill.kind=guidance` and `mean_flow` the teacher predicts in every step; of `trajectories` it has painted before (`trajectories.py`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32, Shaped

from radiance import config, flow
from radiance.model.transformer import Params, Transformer, bind
from radiance.sampling import Condition, guide, noise_of, times_of

WHOLE = 0.5  # share of mean_flow's steps that are of some length; the others have none, and teach the velocity itself
EVEN = 1e-3  # added to the losses that mean_flow divides its own by
LEAST = 1e-6  # a time that is divided by


class Teacher(NamedTuple):
    """What a step is given beside its batch."""

    params: Params | None  # None where no teacher predicts
    negative: Condition  # [1, l, e]: what guidance leads away from


def velocity(model: Transformer, batch: dict[str, Array], noisy: Array, divisor: Array, text: Condition | None = None) -> Array:
    """At the batch's times; of another text than its own, which is one for all, where that is given."""
    if text is None:
        return model(noisy, batch["text"], batch["lengths"], batch["time"], divisor=divisor)
    count = len(noisy)
    embeddings = jnp.broadcast_to(text.text, (count, *text.text.shape[1:]))
    return model(noisy, embeddings, jnp.broadcast_to(text.lengths, (count,)), batch["time"], divisor=divisor)


def guided(run: config.Config, model: Transformer, batch: dict[str, Array], noisy: Array, divisor: Array, negative: Condition) -> Array:
    """The model's guided velocity (`distill.sample`); not guided where a caption was dropped."""
    positive = velocity(model, batch, noisy, divisor)
    if run.distill.sample.guidance == 1:
        return positive
    return _but_for_dropped(batch, positive, guide(positive, velocity(model, batch, noisy, divisor, negative), run.distill.sample))


def _but_for_dropped(batch: dict[str, Array], plain: Array, led: Array) -> Array:
    """What no caption says stays what it is, for guidance leads away from it."""
    return jnp.where(wide(batch["dropped"]), plain, led) if "dropped" in batch else led


def guidance_target(
    run: config.Config,
    student: Transformer,
    batch: dict[str, Array],
    noisy: Float32[Array, "b height width c"],
    plain: Float32[Array, "b height width c"],
    teacher: Teacher,
) -> Float32[Array, "b height width c"]:
    """The guided velocity that `distill.kind=guidance` learns.

    rule=prediction: v⁻ + g·(v⁺ − v⁻) of the teacher. rule=picture: v⁻ + g·(plain − v⁻), v⁻ the student's and `plain` the velocity of the
    picture: as Chroma's trainer does it. The two have one mean where v⁺ is the best prediction and student and teacher agree on v⁻. Rows whose
    caption was dropped keep the target without guidance.
    """
    divisor = flow.bounded(run.flow, batch["time"])
    if run.distill.rule == "prediction":
        return guided(run, bind(run.model, run.compute, teacher.params), batch, noisy, divisor, teacher.negative)
    led = guide(plain, velocity(student, batch, noisy, divisor, teacher.negative), run.distill.sample)
    return _but_for_dropped(batch, plain, led)


def mean_flow_losses(
    run: config.Config, student: Transformer, batch: dict[str, Array], noisy: Float32[Array, "b height width c"], teacher: Teacher
) -> Float32[Array, " b"]:
    """Squared error of the mean velocity u over the step from `time` back to `until` (MeanFlow, arXiv 2505.13447).

    With distill.difference=0 as there (eq. 6, algorithm 1): u = v − (t − r)·du/dt, the derivative taken along the teacher's guided velocity v.
    With a difference δ: (t − r)·u is δ·v and the rest of the way, (t − δ − r)·u at the point that v leads to, of which the former is the
    limit. The network reads 1000·t through sinusoids, so that derivatives in t are far larger than velocities and say little; the mean of two
    velocities is not. The right side is a constant to the gradient. The student reads t − r in place of the guidance number: where that
    is 0, u = v. Both are gone along, so pictures are divided by the time itself, as in sampling; the error of x0 models is weighed by
    t² / max(t, ε)² instead.
    """
    time, length = batch["time"], batch["time"] - batch["until"]
    along = jax.lax.stop_gradient(guided(run, bind(run.model, run.compute, teacher.params), batch, noisy, divided(time), teacher.negative))

    def mean(x, time, length):
        return student(x, batch["text"], batch["lengths"], time, length, divisor=divided(time))

    if run.distill.difference == 0:
        found, change = jax.jvp(mean, (noisy, time, length), (along, jnp.ones_like(time), jnp.ones_like(time)))
        target = along - wide(length) * change
    else:
        found, part = mean(noisy, time, length), jnp.minimum(run.distill.difference, length)
        rest = mean(noisy - wide(part) * along, time - part, length - part)
        target = jnp.where(wide(length) > 0, (wide(part) * along + wide(length - part) * rest) / wide(jnp.maximum(length, 1e-9)), along)
    losses = flow.squared_error(found, jax.lax.stop_gradient(target))
    return losses * jnp.square(time / jnp.maximum(time, run.flow.epsilon)) if run.model.prediction == "x0" else losses


def wide(x: Shaped[Array, " b"]) -> Shaped[Array, "b 1 1 1"]:
    """One of each picture, beside its pixels."""
    return x[:, None, None, None]


def evened(losses: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """Losses of which each pulls about as hard as another: MeanFlow's adaptive weight with p = 1."""
    return losses / jax.lax.stop_gradient(losses + EVEN)


def divided(time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """The time, where something can be divided by it."""
    return jnp.maximum(time, LEAST)


def until(key: Array, time: Float32[Array, " b"]) -> Float32[Array, " b"]:
    """Ends of mean_flow's steps: of a part of them anywhere between 0 and their beginning, of the rest at their beginning itself."""
    times_key, whole_key = jax.random.split(key)
    other = time * jax.random.uniform(times_key, time.shape)
    return jnp.where(jax.random.bernoulli(whole_key, WHOLE, time.shape), other, time)


def segment_times(run: config.Config, tokens: int) -> Float32[np.ndarray, " segments+1"]:
    """Falling, from 1 to 0: those of the teacher's schedule that its way is cut at."""
    sample, segments = run.distill.sample, run.distill.segments
    return times_of(sample, tokens)[:: sample.steps // segments]


def on_segments(run: config.Config, batch: dict[str, Array], segment: Int32[Array, " b"], place: Float32[Array, " b"]) -> dict[str, Array]:
    """The batch with a picture, noise and a time of each row: so that the straight line between the two is the one through the ends of a
    segment of its trajectory, and the time lies on it, from the segment's end (place 0) to its begin (1).

    So every loss on pictures and noise is one on segments too. Of one segment, picture and noise are the trajectory's own.
    """
    points = batch["image"].astype(jnp.float32)
    count, segments, height, width, channels = points.shape
    noise = run.flow.noise_scale * noise_of(batch["seed"], (height, width, channels))
    points = jnp.concatenate([noise[:, None], points], axis=1)
    ends = jnp.asarray(segment_times(run, (height // run.model.patch) * (width // run.model.patch)))
    rows = jnp.arange(count)
    (begin, end), (later, sooner) = (points[rows, segment], points[rows, segment + 1]), (ends[segment], ends[segment + 1])

    slope = (begin - end) / wide(later - sooner)
    lines = {"image": end - wide(sooner) * slope, "noise": end + wide(1 - sooner) * slope, "time": sooner + (later - sooner) * place}
    return {n: batch[n] for n in ("text", "lengths", "weight")} | lines
