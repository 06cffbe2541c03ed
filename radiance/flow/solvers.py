"""ODE solvers of the flow. A solver is a function of one step, and an entry of `SOLVERS`.

No solver evaluates the model at time 0, where x0 models divide by 0.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32

from radiance.flow.objective import Images

Trajectory = Float32[Array, "times b height width c"]  # from the noise to the image

# Velocity at (x, time, index of the time, whether guidance is on).
Velocity = Callable[[Images, jax.Array, jax.Array, jax.Array], Images]


class SolverStep(NamedTuple):
    """One step of a solver; the fields are scalars."""

    start: jax.Array  # index of the first time
    t: jax.Array
    t_next: jax.Array
    is_guided: jax.Array  # [2], at the first and at the second time


class SolverState(NamedTuple):
    """The previous step's result, which multistep solvers read."""

    x0: Images
    t: jax.Array


Solver = Callable[[Velocity, Images, SolverState, SolverStep], tuple[Images, SolverState]]


def integrate_velocity(
    velocity: Velocity,
    noise: Images,
    times: Float32[np.ndarray, " times"],
    solver: str,
    guidance_mask: Bool[np.ndarray, "steps 2"] | None = None,
    return_trajectory: bool = False,
) -> Images | Trajectory:
    """Integrate dx/dt = velocity from the first time to the last.

    Args:
        velocity: See `Velocity`.
        noise: The value x at the first time.
        times: Falling times.
        solver: A key of `SOLVERS`.
        guidance_mask: Whether guidance is on at the start and at the end of each step.
        return_trajectory: Whether to return x at every time.

    Returns:
        The value x at the last time, or at every time.
    """
    num_steps = len(times) - 1
    guidance_mask = np.zeros((num_steps, 2), bool) if guidance_mask is None else guidance_mask
    steps = SolverStep(
        jnp.arange(num_steps),
        jnp.asarray(times[:-1]),
        jnp.asarray(times[1:]),
        jnp.asarray(guidance_mask),
    )

    def apply_solver(carry, step):
        x, state = SOLVERS[solver](velocity, carry[0], carry[1], step)
        return (x, state), x if return_trajectory else None

    initial_state = SolverState(noise, jnp.float32(1))
    (x, _), trajectory = jax.lax.scan(apply_solver, (noise, initial_state), steps)
    return x if trajectory is None else jnp.concatenate([noise[None], trajectory])


def step_euler(
    velocity: Velocity, x: Images, state: SolverState, step: SolverStep
) -> tuple[Images, SolverState]:
    """Take a step along the velocity at its start."""
    start, t, t_next, is_guided = step
    return x + (t_next - t) * velocity(x, t, start, is_guided[0]), state


def step_heun(
    velocity: Velocity, x: Images, state: SolverState, step: SolverStep
) -> tuple[Images, SolverState]:
    """Take a step along the mean of the velocities at its start and at the end of Euler's step.

    A step to time 0 is Euler's.
    """
    start, t, t_next, is_guided = step
    start_velocity = velocity(x, t, start, is_guided[0])
    euler_x = x + (t_next - t) * start_velocity
    mean_velocity = jax.lax.cond(
        t_next > 0,
        lambda: (start_velocity + velocity(euler_x, t_next, start + 1, is_guided[1])) / 2,
        lambda: start_velocity,
    )
    return x + (t_next - t) * mean_velocity, state


def step_dpmpp_2m(
    velocity: Velocity, x: Images, state: SolverState, step: SolverStep
) -> tuple[Images, SolverState]:
    """Take a step of DPM-Solver++ 2M (arXiv 2211.01095) for α = 1 − t, σ = t.

    It is of second order with one evaluation. With λ = log(α/σ), which is infinite at the times 1
    and 0, steps that begin or end there and the step after time 1 are of first order.
    """
    start, t, t_next, is_guided = step
    x0 = x - t * velocity(x, t, start, is_guided[0])

    # Extrapolation of x0 from this step and the previous one
    log_snr = [jnp.log((1 - s) / s) for s in (state.t, t, t_next)]
    ratio = (log_snr[1] - log_snr[0]) / (log_snr[2] - log_snr[1])
    is_second_order = (start > 0) & (state.t < 1) & (t_next > 0)
    weight = jnp.where(is_second_order, 1 / (2 * jnp.where(is_second_order, ratio, 1)), 0)
    extrapolated_x0 = (1 + weight) * x0 - weight * state.x0

    decay = t_next * (1 - t) / (t * jnp.maximum(1 - t_next, 1e-12))  # e^(λ(t) − λ(t_next))
    x = t_next / t * x + (1 - t_next) * (1 - decay) * extrapolated_x0
    return x, SolverState(x0, t)


SOLVERS: dict[str, Solver] = {
    "euler": step_euler,
    "heun": step_heun,
    "dpmpp_2m": step_dpmpp_2m,
    "mean_flow": step_euler,  # the network predicts the mean velocity of the step
}
