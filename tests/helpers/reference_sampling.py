"""Reference implementations of the solvers and of guidance, in float64."""

import numpy as np
import pytest

SOLVERS = ["euler", "heun", "dpmpp_2m"]
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def integrate_float64(velocity, x, times, solver):
    """Follow the papers' formulas step by step; velocity is a function of (x, t, step index)."""
    x, x0s, log_snrs = np.float64(x), [], []
    for i, (t, s) in enumerate(zip(np.float64(times[:-1]), np.float64(times[1:]))):
        v = velocity(x, t, i)
        if solver == "euler" or (solver == "heun" and s == 0):
            x = x + (s - t) * v
        elif solver == "heun":
            x = x + (s - t) * (v + velocity(x + (s - t) * v, s, i)) / 2
        else:  # algorithm 2 of arXiv 2211.01095, with α = 1 − t, σ = t, λ = log(α/σ)
            x0s.append(x - t * v)
            log_snrs.append(np.log(1 - t) - np.log(t) if t < 1 else -np.inf)
            if s == 0:
                x = x0s[-1]
                continue
            if i == 0 or not np.isfinite(log_snrs[-2]):
                d = x0s[-1]
                h = np.log(1 - s) - np.log(s) - log_snrs[-1]
            else:
                h = np.log(1 - s) - np.log(s) - log_snrs[-1]
                r = (log_snrs[-1] - log_snrs[-2]) / h
                d = (1 + 1 / (2 * r)) * x0s[-1] - 1 / (2 * r) * x0s[-2]
            x = s / t * x - (1 - s) * np.expm1(-h) * d
    return x


def guide_float64(positive, negative, scale, rescale):
    """Apply guidance and its rescaling."""
    v = np.float64(negative) + scale * (np.float64(positive) - np.float64(negative))
    std_ratio = np.float64(positive).std(axis=(1, 2, 3)) / v.std(axis=(1, 2, 3))
    return v * (rescale * std_ratio + 1 - rescale)[:, None, None, None]


def sample_images(seed, batch=3):
    """Sample noise of different standard deviations, so that a scale shared by the batch shows."""
    return (
        np.random.RandomState(seed).standard_normal((batch, 8, 8, 3)).astype(np.float32)
        * np.float32([1, 2, 0.3])[:batch, None, None, None]
    )
