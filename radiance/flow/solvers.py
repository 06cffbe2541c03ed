"""ODE solvers for the flow."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32

ImageArray = Float32[Array, "b height width c"]


TrajectoryArray = Float32[Array, "steps+1 b height width c"]  # the noise first, the image last


def integrate_velocity(
    velocity: Callable[[ImageArray, Array, Array, Array], ImageArray],
    noise: ImageArray,
    times: Float32[np.ndarray, " steps+1"],
    solver: str,
    guidance_mask: np.ndarray | None = None,
    return_trajectory: bool = False,
) -> ImageArray | TrajectoryArray:
    """Follows dx/dt = velocity(x, t, index of t in times, guided) from the first time to the last; with `way` x at every time.

    euler, and mean_flow, whose velocity is the mean one of the step; heun (one more evaluation a step, except where it would be at time 0);
    dpmpp_2m (DPM-Solver++ 2M, arXiv 2211.01095, for α = 1 − t, σ = t: second order at one evaluation a step; the steps at times 1 and 0,
    where λ is infinite, and the one after time 1 are of first order).
    """
    num_steps = len(times) - 1
    guidance_mask = np.zeros((num_steps, 2), bool) if guidance_mask is None else guidance_mask
    scan_inputs = (
        jnp.arange(num_steps),
        jnp.asarray(times[:-1]),
        jnp.asarray(times[1:]),
        jnp.asarray(guidance_mask),
    )

    def euler(carry, step):
        x, solver_state = carry
        i, t, t_next, is_guided = step
        return x + (t_next - t) * velocity(x, t, i, is_guided[0]), solver_state

    def heun(carry, step):
        x, solver_state = carry
        i, t, t_next, is_guided = step
        start_velocity = velocity(x, t, i, is_guided[0])
        euler_x = x + (t_next - t) * start_velocity
        mean_velocity = jax.lax.cond(
            t_next > 0,
            lambda: (start_velocity + velocity(euler_x, t_next, i + 1, is_guided[1])) / 2,
            lambda: start_velocity,
        )
        return x + (t_next - t) * mean_velocity, solver_state

    def dpmpp_2m(carry, step):
        x, (previous_x0, previous_t) = carry
        i, t, t_next, is_guided = step
        x0 = x - t * velocity(x, t, i, is_guided[0])
        # λ = log(α/σ); at t = 1 and t = 0 it is infinite, and there the second-order term is left out.
        log_snr = [jnp.log((1 - s) / s) for s in (previous_t, t, t_next)]
        ratio = (log_snr[1] - log_snr[0]) / (log_snr[2] - log_snr[1])
        is_second_order = (i > 0) & (previous_t < 1) & (t_next > 0)
        weight = jnp.where(is_second_order, 1 / (2 * jnp.where(is_second_order, ratio, 1)), 0)
        extrapolated_x0 = (1 + weight) * x0 - weight * previous_x0
        decay = t_next * (1 - t) / (t * jnp.maximum(1 - t_next, 1e-12))  # e^(λ(t) − λ(t_next))
        return t_next / t * x + (1 - t_next) * (1 - decay) * extrapolated_x0, (x0, t)

    solvers = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "mean_flow": euler}

    def solver_step(carry, step):
        carry = solvers[solver](carry, step)
        return carry, carry[0] if return_trajectory else None

    (x, _), trajectory = jax.lax.scan(solver_step, (noise, (noise, jnp.float32(1))), scan_inputs)
    return jnp.concatenate([noise[None], trajectory]) if return_trajectory else x
