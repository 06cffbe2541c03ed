"""From noise to a picture: schedules of times, solvers of the flow's equation, and guidance. One compiled scan.

No solver evaluates the model at time 0, where x0 models divide by 0.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int
from scipy.stats import beta

from radiance.config import Compute, ConfigError, Model, Sample
from radiance.flow import mix, resolution_shift, shift_time
from radiance.model.modulation import Vectors
from radiance.model.transformer import Params, Transformer, bind, bind_modulation
from radiance.sharding import ROWS, constrained

Image = Float32[Array, "b height width c"]
Way = Float32[Array, "steps+1 b height width c"]  # the noise first, the picture last


class Condition(NamedTuple):
    """What a picture is asked to show."""

    text: Float[Array, "b l e"]
    lengths: Int[Array, " b"]
    pooled: Float[Array, "b p"] | None = None


class Known(NamedTuple):
    """What painting starts from beside noise."""

    image: Image
    mask: Float32[Array, "b height width 1"]  # 1 where it is painted anew, 0 where it stays


@partial(jax.jit, static_argnames=("model", "compute", "settings", "noise_scale", "height", "width", "strength", "way"))
def paint(
    params: Params,
    seeds: Int[Array, " b"],
    positive: Condition,
    negative: Condition | None,
    *,
    model: Model,
    compute: Compute,
    settings: Sample,
    noise_scale: float,
    height: int,
    width: int,
    vectors: Vectors | None = None,
    known: Known | None = None,
    strength: float = 1.0,
    way: bool = False,
) -> Image | Way:
    """Pictures from seeds. A picture's noise depends on its seed and size alone, not on its neighbours in the batch.

    vectors: what `modulations` gave for these settings; `params` need no modulation then. known: pictures to start from, and strength, the time
    at which: the nearer to 0, the less of them is lost. way: also what lies between noise and pictures.
    """
    noise = noise_of(seeds, (height, width, model.channels))
    times = times_of(settings, (height // model.patch) * (width // model.patch), strength)
    noise = constrained(noise_scale * noise, ROWS)
    return sample(bind(model, compute, params), noise, times, settings, positive, negative, vectors, known, way)


def noise_of(seeds: Int[Array, " b"], shape: tuple[int, int, int]) -> Image:
    """Standard normal noise; each picture's follows from its seed and its shape [height, width, c]."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@partial(jax.jit, static_argnames=("model", "compute"))
def modulations(
    modulation: Params, times: Float32[Array, " t"], lengths: Float32[Array, " t"] | None = None, *, model: Model, compute: Compute
) -> Vectors:
    """The modulation of the network at each time, with a leading axis for the times; of models that read no pooled text.

    lengths: of the steps, for `mean_flow` (`lengths_of`).
    """
    network = bind_modulation(model, compute, modulation)
    lengths = jnp.zeros_like(times) if lengths is None else lengths
    return jax.lax.map(lambda at: network(at[0][None], at[1][None], None), (times, lengths))


def lengths_of(settings: Sample, times: Float32[np.ndarray, " steps+1"]) -> Float32[np.ndarray, " steps+1"] | None:
    """Of the step that begins at each time, where the solver tells the network: in place of the guidance number."""
    return np.append(-np.diff(times), np.float32(0)) if settings.solver == "mean_flow" else None


def times_of(settings: Sample, tokens: int, strength: float = 1.0) -> Float32[np.ndarray, " steps+1"]:
    """Falling times from 1 to 0; with a `strength` below 1 from there, and along what is left of them.

    uniform; shifted by e^μ, with `settings.shift` as μ or FLUX's by the number of image tokens; or quantiles of a Beta law
    (arXiv 2407.12173).
    """
    uniform = np.linspace(1, 0, settings.steps + 1)
    if settings.schedule == "shifted":
        mu = resolution_shift(tokens) if settings.shift is None else settings.shift
        times = np.concatenate([shift_time(uniform[:-1], mu), [0.0]])
    elif settings.schedule == "beta":
        times = beta.ppf(uniform, *settings.beta)
    else:
        times = uniform
    times = times.astype(np.float32)
    if (np.diff(times) >= 0).any():
        raise ConfigError(
            f"sample.schedule={settings.schedule} with sample.steps={settings.steps} repeats a time: take fewer steps or a milder schedule."
        )
    return np.concatenate([np.float32([strength]), times[times < np.float32(strength)]])


def sample(
    model: Transformer,
    noise: Image,
    times: Float32[np.ndarray, " steps+1"],
    settings: Sample,
    positive: Condition,
    negative: Condition | None = None,
    vectors: Vectors | None = None,
    known: Known | None = None,
    way: bool = False,
) -> Image | Way:
    """Pictures (about [-1, 1]) from `noise`, which is already scaled, along `times`; with `way` all of the way there.

    known: pictures that are mixed with the noise at the first time. Where their mask is 0 they follow the line between the two, whose velocity is
    constant, so that every solver ends on them, and what is painted beside them sees them as noisy as itself.

    vectors: the modulation at each of the times, if it is at hand. negative: what guidance leads away from, with as many text tokens; needed unless `settings.guidance` is 1. Guidance is
    v⁻ + g·(v⁺ − v⁻) (arXiv 2207.12598), both halves in one call of the model.
    """
    use = _guided(times, settings)
    if use.any() and negative is None:
        raise ValueError("Guidance other than 1 needs a negative condition: that of the empty prompt, for instance.")
    both = Condition(*(None if p is None else jnp.concatenate([p, n]) for p, n in zip(positive, negative))) if use.any() else positive

    # Modulation depends on nothing that changes from picture to picture (but a pooled text): one evaluation serves the run.
    def modulation(at):
        rows = 1 if both.pooled is None else len(both.pooled)
        return model.modulation(jnp.full((rows,), at[0]), jnp.full((rows,), at[1]), both.pooled)

    if vectors is None:
        lengths = lengths_of(settings, times)
        vectors = jax.lax.map(modulation, (jnp.asarray(times), jnp.zeros(len(times)) if lengths is None else jnp.asarray(lengths)))

    def at_time(x, t, condition, vectors):
        time = jnp.full(len(x), t)
        return model(x, condition.text, condition.lengths, time, divisor=jnp.maximum(time, settings.floor), vectors=vectors)

    def conditional(x, t, vectors):
        return at_time(x, t, positive, _first(vectors, len(x)))

    def with_guidance(x, t, vectors):
        return guide(*jnp.split(at_time(jnp.concatenate([x, x]), t, both, vectors), 2), settings)

    def velocity(x, t, i, guided):
        at = jax.tree.map(lambda v: v[i], vectors)
        if use.all() or not use.any():
            return (with_guidance if use.all() else conditional)(x, t, at)
        return jax.lax.cond(guided, with_guidance, conditional, x, t, at)

    if known is None:
        return integrate(velocity, noise, times, settings.solver, use, way)

    def beside(*arguments):
        return known.mask * velocity(*arguments) + (1 - known.mask) * (noise - known.image)

    return integrate(beside, mix(known.image, noise, jnp.full(len(noise), times[0])), times, settings.solver, use, way)


def guide(positive: Image, negative: Image, settings: Sample) -> Image:
    """Guided velocity; `guidance_rescale` pulls its spread back to that of the conditional one (arXiv 2305.08891, eq. 15-16)."""
    v = negative + settings.guidance * (positive - negative)
    if settings.guidance_rescale == 0:
        return v
    spread = [jnp.std(x, axis=(1, 2, 3), keepdims=True) for x in (positive, v)]
    return v * (1 + settings.guidance_rescale * (spread[0] / jnp.maximum(spread[1], 1e-12) - 1))


def integrate(
    velocity: Callable[[Image, Array, Array, Array], Image],
    noise: Image,
    times: Float32[np.ndarray, " steps+1"],
    solver: str,
    guided: np.ndarray | None = None,
    way: bool = False,
) -> Image | Way:
    """Follows dx/dt = velocity(x, t, index of t in times, guided) from the first time to the last; with `way` x at every time.

    euler, and mean_flow, whose velocity is the mean one of the step; heun (one more evaluation a step, except where it would be at time 0);
    dpmpp_2m (DPM-Solver++ 2M, arXiv 2211.01095, for α = 1 − t, σ = t: second order at one evaluation a step; the steps at times 1 and 0,
    where λ is infinite, and the one after time 1 are of first order).
    """
    steps = len(times) - 1
    guided = np.zeros((steps, 2), bool) if guided is None else guided
    xs = (jnp.arange(steps), jnp.asarray(times[:-1]), jnp.asarray(times[1:]), jnp.asarray(guided))

    def euler(carry, step):
        x, memory = carry
        i, t, t_next, use = step
        return x + (t_next - t) * velocity(x, t, i, use[0]), memory

    def heun(carry, step):
        x, memory = carry
        i, t, t_next, use = step
        first = velocity(x, t, i, use[0])
        end = x + (t_next - t) * first
        slope = jax.lax.cond(t_next > 0, lambda: (first + velocity(end, t_next, i + 1, use[1])) / 2, lambda: first)
        return x + (t_next - t) * slope, memory

    def dpmpp_2m(carry, step):
        x, (previous, previous_t) = carry
        i, t, t_next, use = step
        clean = x - t * velocity(x, t, i, use[0])
        # λ = log(α/σ); at t = 1 and t = 0 it is infinite, and there the second-order term is left out.
        log_snr = [jnp.log((1 - s) / s) for s in (previous_t, t, t_next)]
        ratio = (log_snr[1] - log_snr[0]) / (log_snr[2] - log_snr[1])
        second = (i > 0) & (previous_t < 1) & (t_next > 0)
        weight = jnp.where(second, 1 / (2 * jnp.where(second, ratio, 1)), 0)
        blend = (1 + weight) * clean - weight * previous
        decay = t_next * (1 - t) / (t * jnp.maximum(1 - t_next, 1e-12))  # e^(λ(t) − λ(t_next))
        return t_next / t * x + (1 - t_next) * (1 - decay) * blend, (clean, t)

    solvers = {"euler": euler, "heun": heun, "dpmpp_2m": dpmpp_2m, "mean_flow": euler}

    def body(carry, step):
        carry = solvers[solver](carry, step)
        return carry, carry[0] if way else None

    (x, _), later = jax.lax.scan(body, (noise, (noise, jnp.float32(1))), xs)
    return jnp.concatenate([noise[None], later]) if way else x


def evaluations(settings: Sample, tokens: int) -> int:
    """Of the network, to paint one picture of so many tokens; with guidance two at a time."""
    each = 1 + _guided(times_of(settings, tokens), settings).astype(int)
    return int(each.sum() - each[-1, 1] if settings.solver == "heun" else each[:, 0].sum())


def _guided(times: np.ndarray, settings: Sample) -> np.ndarray:
    """[steps, 2]: whether guidance is on at the start of a step, and at its end (as at its start where the solver does not look there)."""
    low, high = settings.guidance_interval
    inside = (times >= low) & (times <= high) & (settings.guidance != 1)
    late = np.arange(len(times) - 1) >= settings.unguided_steps
    start = late & inside[:-1]
    end = np.where((settings.solver == "heun") & (times[1:] > 0), late & inside[1:], start)
    return np.stack([start, end], axis=1)


def _first(vectors: Vectors, count: int) -> Vectors:
    """The rows of the conditional half, where there are two."""
    if vectors.output.shape[0] == 1:
        return vectors
    return Vectors(vectors.double_image[:, :count], vectors.double_text[:, :count], vectors.single[:, :count], vectors.output[:count])
