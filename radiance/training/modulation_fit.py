"""Fit Chroma's approximator to the modulation layers of a FLUX model.

The layers hold 3.2 of FLUX's 11.9 B parameters, and depend on little more than the time
(`radiance inspect --modulation` measures how much). The fit needs no images and no text: each step
samples times, and the layers themselves give the target vectors.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Float64, Int32, PRNGKeyArray

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.tables import format_table
from radiance.model.keys import make_rngs
from radiance.model.modulation import join_vectors, make_modulation, vector_names
from radiance.model.pixel_head import HEADS
from radiance.model.transformer import Params, bind_modulation
from radiance.weights import native
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.surgery import make_approximator_model
from radiance.weights.tensors import DTYPES

DEFAULT_STEPS = 5000
TIMES_PER_STEP = 32  # one in each of as many equal parts of [0, 1]
# Learning rate of Adam at a width of 64; it is scaled by 1 / width (arXiv 2203.03466), warmed up
# over a twentieth of the steps, and decayed to 0 by a cosine.
BASE_LEARNING_RATE = 2e-2
STEPS_PER_CALL = 100  # in one call of the compiled scan, after which progress is reported
NUM_EVALUATION_TIMES = 256  # centers of as many equal parts of [0, 1]
# Guidance of models that embed it. Half of the samples are the first value, which Chroma's tools
# use; the others are uniform between the two.
GUIDANCE_RANGE = (0.0, 6.0)
# Fraction of the mean square of a vector below which its variance does not increase its weight.
MIN_VARIANCE_FRACTION = 0.01

FLOAT32 = config.Compute(dtype="float32")


class ModulationFit(NamedTuple):
    """Parameters of the fitted approximator, and its errors."""

    modulation: Params
    report: "FitReport"


@dataclass(frozen=True)
class FitReport:
    """Errors of the approximator's vectors: means over times, guidances and channels."""

    names: list[tuple[str, int, str]]  # layers, block and name of each vector
    mean_square: Float64[np.ndarray, " m"]  # of the layers' vectors
    variance: Float64[np.ndarray, " m"]  # of them, over times and guidances
    mean_squared_error: Float64[np.ndarray, " m"]
    parameters_before: int  # parameters of the modulation
    parameters_after: int

    @property
    def relative_error(self) -> Float64[np.ndarray, " m"]:
        """RMS of the difference over RMS of the vector; NaN for a vector of zeros."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = self.mean_squared_error / self.mean_square
            return np.sqrt(np.where(self.mean_square > 0, ratio, np.nan))

    def __str__(self) -> str:
        errors = self.relative_error
        rows = [("layers", "vector", "blocks", "error", "worst", "in block")]
        for layers, name in dict.fromkeys((layers, name) for layers, _, name in self.names):
            block_errors = [
                (float(error), block)
                for error, (error_layers, block, error_name) in zip(errors, self.names)
                if (error_layers, error_name) == (layers, name) and not np.isnan(error)
            ]
            mean = fmean(error for error, _ in block_errors) if block_errors else float("nan")
            worst, worst_block = max(block_errors, default=(float("nan"), 0))
            rows.append(
                (
                    layers,
                    name,
                    f"{len(block_errors)}",
                    f"{mean:.2%}",
                    f"{worst:.2%}",
                    f"{worst_block}",
                )
            )
        return "\n".join(
            [
                format_table(rows, num_text_columns=2),
                f"RMS of the difference over RMS of the vector, at {NUM_EVALUATION_TIMES} times: "
                f"{np.nanmean(errors):.2%} in the mean over {len(self.names)} vectors, "
                f"{np.nanmax(errors):.2%} in the worst.",
                f"The modulation had {self.parameters_before:,} parameters and has "
                f"{self.parameters_after:,} now.",
            ]
        )


# --- fitting --------------------------------------------------------------------------------------


def fit_modulation(
    checkpoint: Checkpoint,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    on_progress: Callable[[int], object] = lambda count: None,
) -> ModulationFit:
    """Fit an approximator to the modulation layers of a model.

    The loss is the squared error of each vector over the vector's variance, that is, the fraction
    of its changes that the approximator misses. Times are squares of uniform samples, because x0
    models divide by the time; guidance is described at GUIDANCE_RANGE. Both were chosen by the
    validation loss of toy models (experiments/distill_modulation.py). The same seed gives the same
    weights.

    Only toy models were fitted, with layers of 64 channels and an approximator of the same width.
    By count, FLUX's layers take 6.4 GB of device memory in bfloat16, and Chroma's approximator
    with its gradient and Adam's moments 4.4 GB. A step of 32 times takes 18 TFLOP and about 10 GB
    of activations. Targets are not precomputed: a thousand times would take 4.2 GB, and the layers
    take only a hundredth of the approximator's work.

    Args:
        checkpoint: A `per_block` model that reads no pooled vector (`surgery.fix_pooled_vector`).
        steps: Steps of Adam.
        seed: Seed of the initialization and of the times.
        on_progress: Called with the number of steps done since the last call.

    Returns:
        The parameters of the approximator and its errors.

    Raises:
        CheckpointError: The model is another, or all its vectors are zero.
    """
    source, model = checkpoint.model, make_approximator_model(checkpoint)
    layers = read_modulation_layers(checkpoint)
    mean_square, variance = _vector_moments(source, layers)
    if not mean_square.any():
        raise CheckpointError(
            f"The modulation of {checkpoint.origin} is zero at every time, as in an untrained "
            "model: there is nothing to fit."
        )
    weights = jnp.asarray(_vector_weights(mean_square, variance), jnp.float32)
    key, data_key = jax.random.split(jax.random.key(seed))
    network = make_modulation(model, jnp.dtype("float32"), make_rngs(key))
    modulation = nnx.to_pure_dict(nnx.state(network))
    state = modulation, _make_optimizer(model, steps).init(modulation)
    run_steps = partial(_run_steps, source=source, model=model, steps=steps)
    for first_step in range(0, steps, STEPS_PER_CALL):
        count = min(STEPS_PER_CALL, steps - first_step)
        state = run_steps(layers, weights, state, data_key, first_step, count=count)
        jax.block_until_ready(state)
        on_progress(count)
    modulation = state[0]
    report = FitReport(
        names=vector_names(model)[: len(mean_square)],
        mean_square=mean_square,
        variance=variance,
        mean_squared_error=_vector_errors(source, layers, model, modulation),
        parameters_before=sum(x.size for x in jax.tree.leaves(layers)),
        parameters_after=sum(x.size for x in jax.tree.leaves(modulation)),
    )
    return ModulationFit(modulation, report)


def _vector_weights(
    mean_square: Float64[np.ndarray, " m"], variance: Float64[np.ndarray, " m"]
) -> Float64[np.ndarray, " m"]:
    """Return the weight of each vector in the loss: 1 / variance, bounded for small variances."""
    # The second bound prevents a division by 0 for a vector of zeros.
    min_variance = np.maximum(MIN_VARIANCE_FRACTION * mean_square, 1e-6 * mean_square.max())
    return 1 / np.maximum(variance, min_variance)


def _make_optimizer(model: config.Model, steps: int) -> optax.GradientTransformation:
    """Return Adam with warm-up, a cosine schedule and clipped gradients."""
    learning_rate = BASE_LEARNING_RATE * 64 / model.approximator_hidden
    schedule = optax.warmup_cosine_decay_schedule(0, learning_rate, steps // 20, steps)
    return optax.chain(optax.clip_by_global_norm(1), optax.adam(schedule))


@partial(jax.jit, static_argnames=("source", "model", "steps", "count"), donate_argnames="state")
def _run_steps(
    layers: Params,
    weights: Float32[Array, " m"],
    state: tuple[Params, optax.OptState],
    key: PRNGKeyArray,
    first_step: int | Int32[Array, ""],
    *,
    source: config.Model,
    model: config.Model,
    steps: int,
    count: int,
) -> tuple[Params, optax.OptState]:
    """Run `count` of all `steps`, from step `first_step` on."""
    optimizer = _make_optimizer(model, steps)

    def loss(modulation, time, guidance, target):
        vectors = _predict_vectors(model, modulation, time, guidance)
        squared_error = jnp.square(vectors - target).mean(axis=(0, 2))
        return weights @ squared_error / len(weights)

    def step(state, step_index):
        modulation, optimizer_state = state
        time, guidance = _sample_inputs(jax.random.fold_in(key, step_index), source.guidance_embed)
        target = _predict_vectors(source, layers, time, guidance)
        gradient = jax.grad(loss)(modulation, time, guidance, target)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(modulation, updates), optimizer_state), None

    return jax.lax.scan(step, state, first_step + jnp.arange(count))[0]


def _sample_inputs(
    key: PRNGKeyArray, has_guidance: bool
) -> tuple[Float32[Array, " b"], Float32[Array, " b"] | None]:
    """Sample times, and guidance for models that embed it."""
    time_key, guidance_key, choice_key = jax.random.split(key, 3)
    shape = (TIMES_PER_STEP,)
    offsets = jax.random.uniform(time_key, shape)
    time = jnp.square((jnp.arange(TIMES_PER_STEP) + offsets) / TIMES_PER_STEP)
    if not has_guidance:
        return time, None
    low, high = GUIDANCE_RANGE
    uniform_guidance = jax.random.uniform(guidance_key, shape, minval=low, maxval=high)
    return time, jnp.where(jax.random.bernoulli(choice_key, shape=shape), low, uniform_guidance)


def _predict_vectors(
    model: config.Model,
    modulation: Params,
    time: Float32[Array, " b"],
    guidance: Float32[Array, " b"] | None,
) -> Float32[Array, "b m d"]:
    """Return the vectors that the network reads; not every head reads the last two."""
    vectors = join_vectors(bind_modulation(model, FLOAT32, modulation)(time, guidance, None))
    return vectors if HEADS[model.head].reads_output_vectors else vectors[:, :-2]


def read_modulation_layers(checkpoint: Checkpoint) -> Params:
    """Read only the parameters of a checkpoint's modulation; bfloat16 tensors stay bfloat16."""

    def read_leaf(path: str, shape: tuple[int, ...], blocks: Iterator[Any]) -> Array | None:
        if not path.startswith("modulation/"):
            return None  # without reading a tensor
        first_block = next(blocks)
        dtype_name = "bfloat16" if first_block.dtype == DTYPES["bfloat16"] else "float32"
        all_blocks = chain([first_block], blocks)
        return jnp.asarray(native.stack_blocks(shape, all_blocks, DTYPES[dtype_name]))

    return native.params_from_native(
        checkpoint.model, checkpoint.shapes, checkpoint.get_tensor, checkpoint.origin, read_leaf
    )["modulation"]


# --- measuring ------------------------------------------------------------------------------------


_predict_vectors_jit = jax.jit(_predict_vectors, static_argnames="model")


def _evaluation_grid(
    source: config.Model,
) -> Iterator[tuple[Float32[np.ndarray, " b"], Float32[np.ndarray, " b"] | None]]:
    """Yield times and guidances in small batches, because FLUX's vectors are large."""
    times = ((np.arange(NUM_EVALUATION_TIMES) + 0.5) / NUM_EVALUATION_TIMES).astype(np.float32)
    for time_batch in np.split(times, NUM_EVALUATION_TIMES // TIMES_PER_STEP):
        if not source.guidance_embed:
            yield time_batch, None
            continue
        for guidance in np.linspace(*GUIDANCE_RANGE, 4, dtype=np.float32):
            yield time_batch, np.full_like(time_batch, guidance)


def _vector_moments(
    source: config.Model, layers: Params
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """Return the mean square and the variance of each vector of the layers."""
    means, mean_squares = [], []
    for time, guidance in _evaluation_grid(source):
        x = np.asarray(_predict_vectors_jit(source, layers, time, guidance), np.float64)
        means.append(x.mean(axis=0))
        mean_squares.append(np.square(x).mean(axis=(0, 2)))
    mean_square = np.mean(mean_squares, axis=0)
    return mean_square, mean_square - np.square(np.mean(means, axis=0)).mean(axis=-1)


def _vector_errors(
    source: config.Model, layers: Params, model: config.Model, modulation: Params
) -> Float64[np.ndarray, " m"]:
    """Return the mean squared error of each vector of the approximator."""
    errors = []
    for time, guidance in _evaluation_grid(source):
        target = _predict_vectors_jit(source, layers, time, guidance)
        difference = _predict_vectors_jit(model, modulation, time, guidance) - target
        errors.append(np.square(np.asarray(difference, np.float64)).mean(axis=(0, 2)))
    return np.mean(errors, axis=0)
