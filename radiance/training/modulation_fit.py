"""Chroma's modulation from FLUX's: one small network, fitted to the vectors that the layers of all blocks give, as functions of time.

The layers are 3.2 of FLUX's 11.9 B parameters, and read little more than the time (`radiance inspect --modulation` measures how much).
No image and no text is needed for the fit: times are drawn anew every step, and the layers themselves say what the vectors are.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from statistics import fmean
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float32, Float64, PRNGKeyArray

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.tables import format_table
from radiance.base.trees import count_params
from radiance.model.modulation import join_vectors, make_modulation, vector_names
from radiance.model.transformer import Params, bind_modulation
from radiance.weights import native
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.surgery import make_approximator_model
from radiance.weights.tensors import DTYPES

DEFAULT_STEPS = 5000
TIMES_PER_STEP = 32  # a step, one drawn in each of as many equal parts of [0, 1]
BASE_LEARNING_RATE = 2e-2  # of Adam at a width of 64, falling as 1 / width (arXiv 2203.03466); warm-up over a twentieth of the steps, then a cosine to 0
STEPS_PER_CALL = 100  # steps in one call of the compiled scan, after which the progress is told
NUM_EVALUATION_TIMES = (
    256  # times that the errors are means over, in the middle of as many equal parts
)
GUIDANCE_RANGE = (
    0.0,
    6.0,
)  # of models that embed it: half of what is drawn is the first, which Chroma's tools give, half lies between
MIN_VARIANCE_FRACTION = (
    0.01  # share of the mean square below which a vector's variance does not weigh it higher
)

FLOAT32 = config.Compute(dtype="float32")


class ModulationFit(NamedTuple):
    modulation: Params  # of the approximator
    report: "FitReport"


@dataclass(frozen=True)
class FitReport:
    """How far the approximator's vectors are from those of the layers, each as a mean over times, guidances and channels."""

    names: list[tuple[str, int, str]]  # layers, block and name of each vector
    mean_square: Float64[np.ndarray, " m"]  # of the layers' vector
    variance: Float64[np.ndarray, " m"]  # of it, over times and guidances
    mean_squared_error: Float64[np.ndarray, " m"]  # square of the difference
    parameters_before: int  # parameters of the modulation
    parameters_after: int

    @property
    def relative_error(self) -> Float64[np.ndarray, " m"]:
        """RMS of the difference over RMS of the vector; of a vector of zeros not a number."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(
                np.where(self.mean_square > 0, self.mean_squared_error / self.mean_square, np.nan)
            )

    def __str__(self) -> str:
        relative_error = self.relative_error
        rows = [("layers", "vector", "blocks", "error", "worst", "in block")]
        for layers, name in dict.fromkeys((layers, name) for layers, _, name in self.names):
            block_errors = [
                (x, block)
                for x, (a, block, b) in zip(relative_error, self.names)
                if (a, b) == (layers, name) and x == x
            ]
            worst = max(block_errors, default=(float("nan"), 0))
            mean = fmean(x for x, _ in block_errors) if block_errors else float("nan")
            rows.append(
                (
                    layers,
                    name,
                    f"{len(block_errors)}",
                    f"{mean:.2%}",
                    f"{worst[0]:.2%}",
                    f"{worst[1]}",
                )
            )
        return "\n".join(
            [
                format_table(rows, num_text_columns=2),
                f"RMS of the difference over RMS of the vector, at {NUM_EVALUATION_TIMES} times: {np.nanmean(relative_error):.2%} in the mean over "
                f"{len(self.names)} vectors, {np.nanmax(relative_error):.2%} in the worst.",
                f"{self.parameters_before:,} parameters of modulation are {self.parameters_after:,} now.",
            ]
        )


def fit_modulation(
    checkpoint: Checkpoint,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    on_progress: Callable[[int], object] = lambda count: None,
) -> ModulationFit:
    """An approximator in place of the modulation of a `per_block` model that reads no pooled vector (`surgery.without_pooled`).

    The loss is the squared error of each vector over the vector's variance: what of its change is missed. Times are squares of uniform
    ones, which lie closer to 0, where x0 models divide by the time; guidance, where the model embeds it: see GUIDANCE. Both were chosen by
    the validation loss of toys (experiments/distill_modulation.py). progress: called with the steps that were done. The same seed gives the
    same weights.

    Only toys have been fitted, with layers of 64 channels and an approximator as wide. By count, FLUX's layers in bfloat16 are 6.4 GB on
    the device, and Chroma's approximator with its gradient and Adam's moments 4.4 GB; a step of 32 times takes 18 TFLOP and some 10 GB of
    activations. A grid of targets would take 4.2 GB for a thousand times: here there is none, for the layers' own work is a hundredth of
    the approximator's.

    Raises CheckpointError for another model, and for one whose vectors are all zero.
    """
    source, model = checkpoint.model, make_approximator_model(checkpoint)
    layers = read_modulation_layers(checkpoint)
    mean_square, variance = _vector_moments(source, layers)
    if not mean_square.any():
        raise CheckpointError(
            f"The modulation of {checkpoint.origin} gives zeros at every time, as before any training: there is nothing to fit."
        )
    min_variance = np.maximum(
        MIN_VARIANCE_FRACTION * mean_square, 1e-6 * mean_square.max()
    )  # a vector of zeros is no reason to divide by 0
    weights = jnp.asarray(1 / np.maximum(variance, min_variance), jnp.float32)
    key, data_key = jax.random.split(jax.random.key(seed))
    modulation = nnx.to_pure_dict(
        nnx.state(make_modulation(model, jnp.dtype("float32"), nnx.Rngs(key)))
    )
    state = modulation, _make_optimizer(model, steps).init(modulation)
    for first_step in range(0, steps, STEPS_PER_CALL):
        count = min(STEPS_PER_CALL, steps - first_step)
        state = _run_steps(
            layers,
            weights,
            state,
            data_key,
            first_step,
            source=source,
            model=model,
            steps=steps,
            count=count,
        )
        jax.block_until_ready(state)
        on_progress(count)
    mean_squared_error = _vector_errors(source, layers, model, state[0])
    parameters_before, parameters_after = (count_params(tree) for tree in (layers, state[0]))
    return ModulationFit(
        state[0],
        FitReport(
            vector_names(model)[: len(mean_square)],
            mean_square,
            variance,
            mean_squared_error,
            parameters_before,
            parameters_after,
        ),
    )


def _make_optimizer(model: config.Model, steps: int) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0, BASE_LEARNING_RATE * 64 / model.approximator_hidden, steps // 20, steps
    )
    return optax.chain(optax.clip_by_global_norm(1), optax.adam(schedule))


@partial(jax.jit, static_argnames=("source", "model", "steps", "count"), donate_argnames="state")
def _run_steps(
    layers: Params,
    weights: Float32[Array, " m"],
    state: tuple[Params, optax.OptState],
    key: PRNGKeyArray,
    first_step: int,
    *,
    source: config.Model,
    model: config.Model,
    steps: int,
    count: int,
) -> tuple[Params, optax.OptState]:
    """`count` of all `steps`, from the one numbered `first`."""
    optimizer = _make_optimizer(model, steps)

    def loss(modulation, time, guidance, target):
        squared_error = jnp.square(
            _predict_vectors(model, modulation, time, guidance) - target
        ).mean(axis=(0, 2))
        return weights @ squared_error / len(weights)

    def step(state, step_index):
        modulation, optimizer_state = state
        time, guidance = _sample_inputs(jax.random.fold_in(key, step_index), source.guidance_embed)
        gradient = jax.grad(loss)(
            modulation, time, guidance, _predict_vectors(source, layers, time, guidance)
        )
        updates, optimizer_state = optimizer.update(gradient, optimizer_state)
        return (optax.apply_updates(modulation, updates), optimizer_state), None

    return jax.lax.scan(step, state, first_step + jnp.arange(count))[0]


def _sample_inputs(
    key: PRNGKeyArray, has_guidance: bool
) -> tuple[Float32[Array, " b"], Float32[Array, " b"] | None]:
    time_key, guidance_key, choice_key = jax.random.split(key, 3)
    time = jnp.square(
        (jnp.arange(TIMES_PER_STEP) + jax.random.uniform(time_key, (TIMES_PER_STEP,)))
        / TIMES_PER_STEP
    )
    if not has_guidance:
        return time, None
    uniform_guidance = jax.random.uniform(
        guidance_key, (TIMES_PER_STEP,), minval=GUIDANCE_RANGE[0], maxval=GUIDANCE_RANGE[1]
    )
    return time, jnp.where(
        jax.random.bernoulli(choice_key, shape=(TIMES_PER_STEP,)),
        GUIDANCE_RANGE[0],
        uniform_guidance,
    )


def _predict_vectors(
    model: config.Model,
    modulation: Params,
    time: Float32[Array, " b"],
    guidance: Float32[Array, " b"] | None,
) -> Float32[Array, "b m d"]:
    """Those that the network reads: the last two belong to a linear head."""
    vectors = join_vectors(bind_modulation(model, FLOAT32, modulation)(time, guidance, None))
    return vectors if model.head == "linear" else vectors[:, :-2]


def read_modulation_layers(checkpoint: Checkpoint) -> Params:
    """The parameters of a checkpoint's modulation alone; what is stored in bfloat16 stays so."""

    def read_leaf(path: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> Array | None:
        if not path.startswith("modulation/"):
            return None  # and is not read
        first_block = next(blocks)
        dtype_name = "bfloat16" if first_block.dtype == DTYPES["bfloat16"] else "float32"
        return jnp.asarray(
            native.stack_blocks(shape, chain([first_block], blocks), DTYPES[dtype_name])
        )

    return native.params_from_native(
        checkpoint.model, checkpoint.shapes, checkpoint.get_tensor, checkpoint.origin, read_leaf
    )["modulation"]


# --- measuring --------------------------------------------------------------------------------------------------------


_predict_vectors_jit = jax.jit(_predict_vectors, static_argnames="model")


def _evaluation_grid(
    source: config.Model,
) -> Iterator[tuple[Float32[np.ndarray, " b"], Float32[np.ndarray, " b"] | None]]:
    """Times and guidances, a few at a time: of a FLUX's vectors a thousand times are 4.2 GB."""
    times = ((np.arange(NUM_EVALUATION_TIMES) + 0.5) / NUM_EVALUATION_TIMES).astype(np.float32)
    for time_chunk in np.split(times, NUM_EVALUATION_TIMES // TIMES_PER_STEP):
        if not source.guidance_embed:
            yield time_chunk, None
            continue
        for guidance in np.linspace(*GUIDANCE_RANGE, 4, dtype=np.float32):
            yield time_chunk, np.full_like(time_chunk, guidance)


def _vector_moments(
    source: config.Model, layers: Params
) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """Mean square and variance of each vector."""
    means, mean_squares = [], []
    for inputs in _evaluation_grid(source):
        x = np.asarray(_predict_vectors_jit(source, layers, *inputs), np.float64)
        means.append(x.mean(axis=0))
        mean_squares.append(np.square(x).mean(axis=(0, 2)))
    mean_square = np.mean(mean_squares, axis=0)
    return mean_square, mean_square - np.square(np.mean(means, axis=0)).mean(axis=-1)


def _vector_errors(
    source: config.Model, layers: Params, model: config.Model, modulation: Params
) -> Float64[np.ndarray, " m"]:
    """Mean square of the difference of each vector."""

    def error_at(inputs) -> np.ndarray:
        difference = _predict_vectors_jit(model, modulation, *inputs) - _predict_vectors_jit(
            source, layers, *inputs
        )
        return np.square(np.asarray(difference, np.float64)).mean(axis=(0, 2))

    return np.mean([error_at(inputs) for inputs in _evaluation_grid(source)], axis=0)
