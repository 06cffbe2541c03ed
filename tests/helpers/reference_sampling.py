"""Solvers and guidance as their papers write them, in float64, for tests."""

import numpy as np
import pytest

SOLVERS = ["euler", "heun", "dpmpp_2m"]
each_solver = pytest.mark.parametrize("solver", SOLVERS)


def plain(velocity, x, times, solver):
    """The solvers as their papers write them, one step after another. velocity(x, t, number of the step)."""
    x, clean, half_log_snr = np.float64(x), [], []
    for i, (t, s) in enumerate(zip(np.float64(times[:-1]), np.float64(times[1:]))):
        v = velocity(x, t, i)
        if solver == "euler" or (solver == "heun" and s == 0):
            x = x + (s - t) * v
        elif solver == "heun":
            x = x + (s - t) * (v + velocity(x + (s - t) * v, s, i)) / 2
        else:  # algorithm 2 of arXiv 2211.01095, with α = 1 − t, σ = t, λ = log(α/σ)
            clean.append(x - t * v)
            half_log_snr.append(np.log(1 - t) - np.log(t) if t < 1 else -np.inf)
            if s == 0:
                x = clean[-1]
                continue
            if i == 0 or not np.isfinite(half_log_snr[-2]):
                d = clean[-1]
                h = np.log(1 - s) - np.log(s) - half_log_snr[-1]
            else:
                h = np.log(1 - s) - np.log(s) - half_log_snr[-1]
                r = (half_log_snr[-1] - half_log_snr[-2]) / h
                d = (1 + 1 / (2 * r)) * clean[-1] - 1 / (2 * r) * clean[-2]
            x = s / t * x - (1 - s) * np.expm1(-h) * d
    return x


def guided64(positive, negative, scale, rescale):
    v = np.float64(negative) + scale * (np.float64(positive) - np.float64(negative))
    stretch = np.float64(positive).std(axis=(1, 2, 3)) / v.std(axis=(1, 2, 3))
    return v * (rescale * stretch + 1 - rescale)[:, None, None, None]


def sample_images(seed, batch=3):
    """Of unlike spreads, so that a scale shared by the batch is seen."""
    return (
        np.random.RandomState(seed).standard_normal((batch, 8, 8, 3)).astype(np.float32)
        * np.float32([1, 2, 0.3])[:batch, None, None, None]
    )
