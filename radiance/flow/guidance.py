"""Classifier-free guidance."""

import jax.numpy as jnp
import numpy as np

from radiance.config import Sample
from radiance.flow.schedules import make_time_schedule
from radiance.flow.solvers import ImageArray


def apply_guidance(positive: ImageArray, negative: ImageArray, settings: Sample) -> ImageArray:
    """Guided velocity; `guidance_rescale` pulls its spread back to that of the conditional one (arXiv 2305.08891, eq. 15-16)."""
    v = negative + settings.guidance_scale * (positive - negative)
    if settings.guidance_rescale == 0:
        return v
    stds = [jnp.std(x, axis=(1, 2, 3), keepdims=True) for x in (positive, v)]
    return v * (1 + settings.guidance_rescale * (stds[0] / jnp.maximum(stds[1], 1e-12) - 1))


def count_evaluations(settings: Sample, num_tokens: int) -> int:
    """Of the network, to paint one image of so many tokens; with guidance two at a time."""
    step_evaluations = 1 + make_guidance_mask(
        make_time_schedule(settings, num_tokens), settings
    ).astype(int)
    return int(
        step_evaluations.sum() - step_evaluations[-1, 1]
        if settings.solver == "heun"
        else step_evaluations[:, 0].sum()
    )


def make_guidance_mask(times: np.ndarray, settings: Sample) -> np.ndarray:
    """[steps, 2]: whether guidance is on at the start of a step, and at its end (as at its start where the solver does not look there)."""
    low, high = settings.guidance_interval
    in_interval = (times >= low) & (times <= high) & (settings.guidance_scale != 1)
    is_late = np.arange(len(times) - 1) >= settings.unguided_steps
    at_start = is_late & in_interval[:-1]
    at_end = np.where(
        (settings.solver == "heun") & (times[1:] > 0), is_late & in_interval[1:], at_start
    )
    return np.stack([at_start, at_end], axis=1)
