"""Time schedules for sampling."""

import numpy as np
from jaxtyping import Float32
from scipy.stats import beta

from radiance.config import ConfigError, Sample
from radiance.flow.timesteps import resolution_shift, shift_times


def compute_step_lengths(
    settings: Sample, times: Float32[np.ndarray, " steps+1"]
) -> Float32[np.ndarray, " steps+1"] | None:
    """Of the step that begins at each time, where the solver tells the network: in place of the guidance number."""
    return np.append(-np.diff(times), np.float32(0)) if settings.solver == "mean_flow" else None


def make_time_schedule(
    settings: Sample, num_tokens: int, strength: float = 1.0
) -> Float32[np.ndarray, " steps+1"]:
    """Falling times from 1 to 0; with a `strength` below 1 from there, and along what is left of them.

    uniform; shifted by e^μ, with `settings.shift` as μ or FLUX's by the number of image tokens; or quantiles of a Beta law
    (arXiv 2407.12173).
    """
    uniform_times = np.linspace(1, 0, settings.steps + 1)
    if settings.schedule == "shifted":
        mu = resolution_shift(num_tokens) if settings.shift is None else settings.shift
        times = np.concatenate([shift_times(uniform_times[:-1], mu), [0.0]])
    elif settings.schedule == "beta":
        times = beta.ppf(uniform_times, *settings.beta)
    else:
        times = uniform_times
    times = times.astype(np.float32)
    if (np.diff(times) >= 0).any():
        raise ConfigError(
            f"sample.schedule={settings.schedule} with sample.steps={settings.steps} repeats a time: take fewer steps or a milder schedule."
        )
    return np.concatenate([np.float32([strength]), times[times < np.float32(strength)]])
