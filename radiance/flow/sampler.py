"""From noise to an image: schedules of times, solvers of the flow's equation, and guidance. One compiled scan.

No solver evaluates the model at time 0, where x0 models divide by 0.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from radiance.config import Compute, Model, Sample
from radiance.distributed.sharding import BATCH_AXES, constrain_sharding
from radiance.flow.guidance import apply_guidance, make_guidance_mask
from radiance.flow.objective import mix
from radiance.flow.schedules import compute_step_lengths, make_time_schedule
from radiance.flow.solvers import ImageArray, TrajectoryArray, integrate_velocity
from radiance.model.modulation import ModulationVectors
from radiance.model.transformer import Params, Transformer, bind_model, bind_modulation


class TextCondition(NamedTuple):
    """What an image is asked to show."""

    text: Float[Array, "b l e"]
    lengths: Int[Array, " b"]
    pooled: Float[Array, "b p"] | None = None


class StartImage(NamedTuple):
    """What painting starts from beside noise."""

    image: ImageArray
    mask: Float32[Array, "b height width 1"]  # 1 where it is painted anew, 0 where it stays


@partial(
    jax.jit,
    static_argnames=(
        "model",
        "compute",
        "settings",
        "noise_scale",
        "height",
        "width",
        "strength",
        "return_trajectory",
    ),
)
def generate_images(
    params: Params,
    seeds: Int[Array, " b"],
    positive: TextCondition,
    negative: TextCondition | None,
    *,
    model: Model,
    compute: Compute,
    settings: Sample,
    noise_scale: float,
    height: int,
    width: int,
    vectors: ModulationVectors | None = None,
    start_image: StartImage | None = None,
    strength: float = 1.0,
    return_trajectory: bool = False,
) -> ImageArray | TrajectoryArray:
    """Images from seeds. An image's noise depends on its seed and size alone, not on its neighbors in the batch.

    vectors: what `modulations` gave for these settings; `params` need no modulation then. known: images to start from, and strength, the time
    at which: the nearer to 0, the less of them is lost. way: also what lies between noise and images.
    """
    noise = sample_noise(seeds, (height, width, model.channels))
    times = make_time_schedule(settings, (height // model.patch) * (width // model.patch), strength)
    noise = constrain_sharding(noise_scale * noise, BATCH_AXES)
    return sample_from_noise(
        bind_model(model, compute, params),
        noise,
        times,
        settings,
        positive,
        negative,
        vectors,
        start_image,
        return_trajectory,
    )


def sample_noise(seeds: Int[Array, " b"], shape: tuple[int, int, int]) -> ImageArray:
    """Standard normal noise; each image's follows from its seed and its shape [height, width, c]."""
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@partial(jax.jit, static_argnames=("model", "compute"))
def compute_modulations(
    modulation: Params,
    times: Float32[Array, " t"],
    step_lengths: Float32[Array, " t"] | None = None,
    *,
    model: Model,
    compute: Compute,
) -> ModulationVectors:
    """The modulation of the network at each time, with a leading axis for the times; of models that read no pooled text.

    lengths: of the steps, for `mean_flow` (`lengths_of`).
    """
    network = bind_modulation(model, compute, modulation)
    step_lengths = jnp.zeros_like(times) if step_lengths is None else step_lengths
    return jax.lax.map(
        lambda step_inputs: network(step_inputs[0][None], step_inputs[1][None], None),
        (times, step_lengths),
    )


def sample_from_noise(
    model: Transformer,
    noise: ImageArray,
    times: Float32[np.ndarray, " steps+1"],
    settings: Sample,
    positive: TextCondition,
    negative: TextCondition | None = None,
    vectors: ModulationVectors | None = None,
    start_image: StartImage | None = None,
    return_trajectory: bool = False,
) -> ImageArray | TrajectoryArray:
    """Images (about [-1, 1]) from `noise`, which is already scaled, along `times`; with `way` all of the way there.

    known: images that are mixed with the noise at the first time. Where their mask is 0 they follow the line between the two, whose velocity is
    constant, so that every solver ends on them, and what is painted beside them sees them as noisy as itself.

    vectors: the modulation at each of the times, if it is at hand. negative: what guidance leads away from, with as many text tokens; needed unless `settings.guidance` is 1. Guidance is
    v⁻ + g·(v⁺ − v⁻) (arXiv 2207.12598), both halves in one call of the model.
    """
    guidance_mask = make_guidance_mask(times, settings)
    if guidance_mask.any() and negative is None:
        raise ValueError(
            "Guidance other than 1 needs a negative condition: that of the empty prompt, for instance."
        )
    stacked_condition = (
        TextCondition(
            *(
                None if positive_part is None else jnp.concatenate([positive_part, n])
                for positive_part, n in zip(positive, negative)
            )
        )
        if guidance_mask.any()
        else positive
    )

    # Modulation depends on nothing that changes from image to image (but a pooled text): one evaluation serves the run.
    def compute_modulation(step_values):
        num_rows = 1 if stacked_condition.pooled is None else len(stacked_condition.pooled)
        return model.modulation(
            jnp.full((num_rows,), step_values[0]),
            jnp.full((num_rows,), step_values[1]),
            stacked_condition.pooled,
        )

    if vectors is None:
        step_lengths = compute_step_lengths(settings, times)
        vectors = jax.lax.map(
            compute_modulation,
            (
                jnp.asarray(times),
                jnp.zeros(len(times)) if step_lengths is None else jnp.asarray(step_lengths),
            ),
        )

    def evaluate_model(x, t, condition, vectors):
        time = jnp.full(len(x), t)
        return model(
            x,
            condition.text,
            condition.lengths,
            time,
            divisor=jnp.maximum(time, settings.min_divisor),
            vectors=vectors,
        )

    def conditional_velocity(x, t, vectors):
        return evaluate_model(x, t, positive, _take_first_rows(vectors, len(x)))

    def guided_velocity(x, t, vectors):
        return apply_guidance(
            *jnp.split(evaluate_model(jnp.concatenate([x, x]), t, stacked_condition, vectors), 2),
            settings,
        )

    def velocity(x, t, i, is_guided):
        step_values = jax.tree.map(lambda v: v[i], vectors)
        if guidance_mask.all() or not guidance_mask.any():
            return (guided_velocity if guidance_mask.all() else conditional_velocity)(
                x, t, step_values
            )
        return jax.lax.cond(is_guided, guided_velocity, conditional_velocity, x, t, step_values)

    if start_image is None:
        return integrate_velocity(
            velocity, noise, times, settings.solver, guidance_mask, return_trajectory
        )

    def masked_velocity(*args):
        return start_image.mask * velocity(*args) + (1 - start_image.mask) * (
            noise - start_image.image
        )

    return integrate_velocity(
        masked_velocity,
        mix(start_image.image, noise, jnp.full(len(noise), times[0])),
        times,
        settings.solver,
        guidance_mask,
        return_trajectory,
    )


def _take_first_rows(vectors: ModulationVectors, num_rows: int) -> ModulationVectors:
    """The rows of the conditional half, where there are two."""
    if vectors.output.shape[0] == 1:
        return vectors
    return ModulationVectors(
        vectors.double_image[:, :num_rows],
        vectors.double_text[:, :num_rows],
        vectors.single[:, :num_rows],
        vectors.output[:num_rows],
    )
