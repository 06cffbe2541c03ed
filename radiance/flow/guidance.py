"""Classifier-free guidance (arXiv 2207.12598): v⁻ + g·(v⁺ − v⁻)."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from radiance.config import Sample
from radiance.flow.objective import Images
from radiance.flow.schedules import make_time_schedule
from radiance.model.modulation import ModulationVectors
from radiance.model.transformer import Transformer


class TextCondition(NamedTuple):
    """Encoded prompts: embeddings, number of real tokens, and pooled vectors of some models."""

    text: Float[Array, "b l e"]
    lengths: Int[Array, " b"]
    pooled: Float[Array, "b p"] | None = None


def apply_guidance(positive: Images, negative: Images, settings: Sample) -> Images:
    """Combine two velocities to the guided velocity.

    Args:
        positive: Velocities for the prompts.
        negative: Velocities that guidance leads away from.
        settings: The guidance scale, and `guidance_rescale`, by which the standard deviation is
            brought back to that of `positive` (arXiv 2305.08891, eq. 15-16).

    Returns:
        Guided velocities.
    """
    guided = negative + settings.guidance_scale * (positive - negative)
    if settings.guidance_rescale == 0:
        return guided
    stds = [jnp.std(x, axis=(1, 2, 3), keepdims=True) for x in (positive, guided)]
    return guided * (1 + settings.guidance_rescale * (stds[0] / jnp.maximum(stds[1], 1e-12) - 1))


def make_guidance_mask(
    times: Float32[np.ndarray, " times"], settings: Sample
) -> Bool[np.ndarray, "steps 2"]:
    """Determine at which evaluations guidance is on.

    Args:
        times: Times of the schedule.
        settings: Sampling settings.

    Returns:
        Whether it is on at the start and at the end of each step; where the solver does not
        evaluate the model at the end, the value of the start.
    """
    low, high = settings.guidance_interval
    in_interval = (times >= low) & (times <= high) & (settings.guidance_scale != 1)
    is_late = np.arange(len(times) - 1) >= settings.unguided_steps
    at_start = is_late & in_interval[:-1]
    evaluates_end = (settings.solver == "heun") & (times[1:] > 0)
    at_end = np.where(evaluates_end, is_late & in_interval[1:], at_start)
    return np.stack([at_start, at_end], axis=1)


def count_evaluations(settings: Sample, num_tokens: int) -> int:
    """Count the network evaluations (NFE) for one image; a guided evaluation counts twice.

    Args:
        settings: Sampling settings.
        num_tokens: Number of image tokens, for schedules that depend on the resolution.

    Returns:
        Number of evaluations.
    """
    guidance_mask = make_guidance_mask(make_time_schedule(settings, num_tokens), settings)
    evaluations = 1 + guidance_mask.astype(int)
    if settings.solver == "heun":
        return int(evaluations.sum() - evaluations[-1, 1])
    return int(evaluations[:, 0].sum())


def stack_conditions(positive: TextCondition, negative: TextCondition) -> TextCondition:
    """Concatenate the rows of two conditions, so that one call of the model evaluates both."""
    pooled = None
    if positive.pooled is not None and negative.pooled is not None:
        pooled = jnp.concatenate([positive.pooled, negative.pooled])
    return TextCondition(
        jnp.concatenate([positive.text, negative.text]),
        jnp.concatenate([positive.lengths, negative.lengths]),
        pooled,
    )


@dataclass(frozen=True)
class GuidedVelocity:
    """The model's velocity as a solver calls it, with guidance where it is on.

    Attributes:
        model: The network.
        settings: Sampling settings.
        positive: The positive condition.
        condition: The positive condition, followed by the negative one if guidance is on anywhere.
        vectors: Modulation vectors of `condition` at each time, with a leading axis for the times.
        guidance_mask: Output of `make_guidance_mask`.
    """

    model: Transformer
    settings: Sample
    positive: TextCondition
    condition: TextCondition
    vectors: ModulationVectors
    guidance_mask: np.ndarray

    def __call__(self, x: Images, t: jax.Array, index: jax.Array, is_guided: jax.Array) -> Images:
        """Compute the velocity at `x`; see `solvers.Velocity`."""
        vectors = jax.tree.map(lambda v: v[index], self.vectors)
        if self.guidance_mask.all():
            return self._compute_guided(x, t, vectors)
        if not self.guidance_mask.any():
            return self._compute_conditional(x, t, vectors)
        return jax.lax.cond(
            is_guided, self._compute_guided, self._compute_conditional, x, t, vectors
        )

    def _compute_guided(self, x: Images, t: jax.Array, vectors: ModulationVectors) -> Images:
        """Evaluate both conditions in one call of the model, and combine the velocities."""
        velocity = self._evaluate(jnp.concatenate([x, x]), t, self.condition, vectors)
        positive, negative = jnp.split(velocity, 2)
        return apply_guidance(positive, negative, self.settings)

    def _compute_conditional(self, x: Images, t: jax.Array, vectors: ModulationVectors) -> Images:
        """Evaluate the positive condition alone, whose vectors are in the first rows."""
        if vectors.output.shape[0] != 1:  # one row is for all samples
            b = len(x)
            double_image, double_text, single = (v[:, :b] for v in vectors[:3])
            vectors = ModulationVectors(double_image, double_text, single, vectors.output[:b])
        return self._evaluate(x, t, self.positive, vectors)

    def _evaluate(
        self, x: Images, t: jax.Array, condition: TextCondition, vectors: ModulationVectors
    ) -> Images:
        time = jnp.full(len(x), t)
        return self.model(
            x,
            condition.text,
            condition.lengths,
            time,
            divisor=jnp.maximum(time, self.settings.min_divisor),
            vectors=vectors,
        )
