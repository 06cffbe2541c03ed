"""Sampling: from noise to images along a time schedule, as one compiled scan."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Integer

from radiance.config import Compute, Model, Sample
from radiance.distributed.sharding import BATCH_AXES, constrain_sharding
from radiance.flow.guidance import (
    GuidedVelocity,
    TextCondition,
    make_guidance_mask,
    stack_conditions,
)
from radiance.flow.inpainting import InitImageBatch, start_from_image
from radiance.flow.objective import Images
from radiance.flow.schedules import compute_step_lengths, make_time_schedule
from radiance.flow.solvers import Trajectory, integrate_velocity
from radiance.model.modulation import ModulationVectors
from radiance.model.transformer import (
    Modulation,
    Params,
    Transformer,
    bind_model,
    bind_modulation,
)


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
    seeds: Integer[Array, " b"],
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
    init_images: InitImageBatch | None = None,
    strength: float = 1.0,
    return_trajectory: bool = False,
) -> Images | Trajectory:
    """Generate images from seeds.

    The noise of an image depends on its seed and size alone, not on the rest of the batch.

    Args:
        params: Parameters; with `vectors` they need no modulation.
        seeds: Seed of each image.
        positive: Encoded prompts.
        negative: Condition that guidance leads away from; see `sample_from_noise`.
        model: Sizes of the network.
        compute: Types and backends.
        settings: Sampling settings.
        noise_scale: Standard deviation of the noise.
        height: Height, in pixels, or in tokens of a latent.
        width: Width, in the same unit.
        vectors: Output of `compute_modulations` for the same settings.
        init_images: Images to start from.
        strength: Time to start at with `init_images`: the nearer to 0, the more of it is kept.
        return_trajectory: Whether to return the states at all times.

    Returns:
        Images, about in [-1, 1], or their trajectories.
    """
    noise = sample_noise(seeds, (height, width, model.channels))
    times = make_time_schedule(settings, (height // model.patch) * (width // model.patch), strength)
    return sample_from_noise(
        bind_model(model, compute, params),
        constrain_sharding(noise_scale * noise, BATCH_AXES),
        times,
        settings,
        positive,
        negative,
        vectors,
        init_images,
        return_trajectory,
    )


def sample_noise(seeds: Integer[Array, " b"], shape: tuple[int, int, int]) -> Images:
    """Sample standard normal noise.

    Args:
        seeds: Seed of each image.
        shape: Shape [height, width, c] of an image.

    Returns:
        Noise; each row depends on its seed and the shape alone.
    """
    return jax.vmap(lambda seed: jax.random.normal(jax.random.key(seed), shape))(seeds)


@partial(jax.jit, static_argnames=("model", "compute"))
def compute_modulations(
    modulation: Params,
    times: Float32[Array | np.ndarray, " times"],
    step_lengths: Float32[Array | np.ndarray, " times"] | None = None,
    *,
    model: Model,
    compute: Compute,
) -> ModulationVectors:
    """Compute the modulation vectors at each time, for models that read no pooled text.

    Args:
        modulation: The subtree "modulation" of the parameters.
        times: Times of the schedule.
        step_lengths: Output of `compute_step_lengths`.
        model: Sizes of the network.
        compute: Types and backends.

    Returns:
        Vectors with a leading axis for the times, and one row for all samples.
    """
    network = bind_modulation(model, compute, modulation)
    return _compute_step_vectors(network, times, step_lengths)


def _compute_step_vectors(
    modulation: Modulation,
    times: Float32[Array | np.ndarray, " times"],
    step_lengths: Float32[Array | np.ndarray, " times"] | None,
    pooled: Float[Array, "rows p"] | None = None,
) -> ModulationVectors:
    """Compute the modulation at each time: it depends on nothing else, except for pooled text."""
    num_rows = 1 if pooled is None else len(pooled)
    step_lengths = jnp.zeros(len(times)) if step_lengths is None else jnp.asarray(step_lengths)

    def compute_vectors(step: tuple[jax.Array, jax.Array]) -> ModulationVectors:
        time, step_length = step
        return modulation(jnp.full((num_rows,), time), jnp.full((num_rows,), step_length), pooled)

    return jax.lax.map(compute_vectors, (jnp.asarray(times), step_lengths))


def sample_from_noise(
    model: Transformer,
    noise: Images,
    times: Float32[np.ndarray, " times"],
    settings: Sample,
    positive: TextCondition,
    negative: TextCondition | None = None,
    vectors: ModulationVectors | None = None,
    init_images: InitImageBatch | None = None,
    return_trajectory: bool = False,
) -> Images | Trajectory:
    """Integrate the flow from noise to images.

    Args:
        model: The network.
        noise: Scaled noise.
        times: Times of the schedule.
        settings: Sampling settings.
        positive: Encoded prompts.
        negative: Condition that guidance leads away from, with as many text tokens as `positive`;
            needed unless `settings.guidance_scale` is 1.
        vectors: Modulation vectors at each time, if they are known.
        init_images: Images that are mixed with the noise at the first time.
        return_trajectory: Whether to return the states at all times.

    Returns:
        Images, about in [-1, 1], or their trajectories.

    Raises:
        ValueError: If guidance is on and there is no negative condition.
    """
    guidance_mask = make_guidance_mask(times, settings)
    condition = positive
    if guidance_mask.any():
        if negative is None:
            raise ValueError(
                "A guidance scale other than 1 needs a negative condition: give that of the empty "
                "prompt, for instance."
            )
        condition = stack_conditions(positive, negative)
    if vectors is None:
        step_lengths = compute_step_lengths(settings, times)
        vectors = _compute_step_vectors(model.modulation, times, step_lengths, condition.pooled)
    velocity = GuidedVelocity(model, settings, positive, condition, vectors, guidance_mask)
    x = noise
    if init_images is not None:
        velocity, x = start_from_image(velocity, noise, times, init_images)
    return integrate_velocity(velocity, x, times, settings.solver, guidance_mask, return_trajectory)
