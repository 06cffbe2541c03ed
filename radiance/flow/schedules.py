"""Time schedules for sampling."""

import numpy as np
from jaxtyping import Float32
from scipy.special import betaincinv

from radiance.base.errors import ConfigError
from radiance.config import Sample
from radiance.flow.timesteps import resolution_shift, shift_times


def make_time_schedule(
    settings: Sample, num_tokens: int, strength: float = 1.0
) -> Float32[np.ndarray, " times"]:
    """Make the times of the solver's steps.

    The schedule is uniform; shifted by e^μ, with `settings.shift` as μ, or FLUX's μ by the number
    of image tokens; or quantiles of a Beta distribution (arXiv 2407.12173).

    Args:
        settings: Sampling settings.
        num_tokens: Number of image tokens.
        strength: The first time; the schedule keeps its later times.

    Returns:
        Falling times, one more than there are steps; the last is 0.

    Raises:
        ConfigError: If a time occurs twice.
    """
    times = np.linspace(1, 0, settings.steps + 1)
    if settings.schedule == "shifted":
        mu = resolution_shift(num_tokens) if settings.shift is None else settings.shift
        times = np.append(shift_times(times[:-1], mu), 0.0)
    elif settings.schedule == "beta":
        times = betaincinv(*settings.beta, times)
    times = times.astype(np.float32)
    if not (np.diff(times) < 0).all():  # also where a time is NaN
        raise ConfigError(
            f"sample.schedule={settings.schedule} with sample.steps={settings.steps} repeats a "
            "time: use fewer steps or a milder schedule."
        )
    first_time = np.array([strength], np.float32)
    return np.concatenate([first_time, times[times < first_time]])


def compute_step_lengths(
    settings: Sample, times: Float32[np.ndarray, " times"]
) -> Float32[np.ndarray, " times"] | None:
    """Compute the step lengths that the MeanFlow solver passes through the guidance input.

    Args:
        settings: Sampling settings.
        times: Times of the schedule.

    Returns:
        Length of the step that begins at each time, 0 for the last; None for other solvers.
    """
    return np.append(-np.diff(times), np.float32(0)) if settings.solver == "mean_flow" else None
