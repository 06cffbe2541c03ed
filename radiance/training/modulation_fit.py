"""Chroma's modulation from FLUX's: one small network, fitted to the vectors that the layers of all blocks give, as functions of time.

The layers are 3.2 of FLUX's 11.9 B parameters, and read little more than the time (`radiance inspect --modulation` measures how much).
No picture and no text is needed for the fit: times are drawn anew every step, and the layers themselves say what the vectors are.
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
from radiance.model.modulation import join_vectors, make_modulation, vector_names
from radiance.model.transformer import Params, bind_modulation
from radiance.weights import native
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.convert import table
from radiance.weights.files import DTYPES, CheckpointError
from radiance.weights.surgery import approximated

STEPS = 5000
TIMES = 32  # a step, one drawn in each of as many equal parts of [0, 1]
RATE = 2e-2  # of Adam at a width of 64, falling as 1 / width (arXiv 2203.03466); warm-up over a twentieth of the steps, then a cosine to 0
PIECE = 100  # steps in one call of the compiled scan, after which the progress is told
MEASURED = 256  # times that the errors are means over, in the middle of as many equal parts
GUIDANCE = (0.0, 6.0)  # of models that embed it: half of what is drawn is the first, which Chroma's tools give, half lies between
STILL = 0.01  # share of the mean square below which a vector's variance does not weigh it higher

FLOAT32 = config.Compute(dtype="float32")


class Fit(NamedTuple):
    modulation: Params  # of the approximator
    report: "Report"


@dataclass(frozen=True)
class Report:
    """How far the approximator's vectors are from those of the layers, each as a mean over times, guidances and channels."""

    names: list[tuple[str, int, str]]  # layers, block and name of each vector
    square: Float64[np.ndarray, " m"]  # of the layers' vector
    variance: Float64[np.ndarray, " m"]  # of it, over times and guidances
    error: Float64[np.ndarray, " m"]  # square of the difference
    before: int  # parameters of the modulation
    after: int

    @property
    def relative(self) -> Float64[np.ndarray, " m"]:
        """RMS of the difference over RMS of the vector; of a vector of zeros not a number."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sqrt(np.where(self.square > 0, self.error / self.square, np.nan))

    def __str__(self) -> str:
        relative = self.relative
        rows = [("layers", "vector", "blocks", "error", "worst", "in block")]
        for layers, name in dict.fromkeys((layers, name) for layers, _, name in self.names):
            found = [(x, block) for x, (a, block, b) in zip(relative, self.names) if (a, b) == (layers, name) and x == x]
            worst = max(found, default=(float("nan"), 0))
            mean = fmean(x for x, _ in found) if found else float("nan")
            rows.append((layers, name, f"{len(found)}", f"{mean:.2%}", f"{worst[0]:.2%}", f"{worst[1]}"))
        return "\n".join(
            [
                table(rows, left=2),
                f"RMS of the difference over RMS of the vector, at {MEASURED} times: {np.nanmean(relative):.2%} in the mean over "
                f"{len(self.names)} vectors, {np.nanmax(relative):.2%} in the worst.",
                f"{self.before:,} parameters of modulation are {self.after:,} now.",
            ]
        )


def fit(checkpoint: Checkpoint, steps: int = STEPS, seed: int = 0, progress: Callable[[int], object] = lambda count: None) -> Fit:
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
    source, model = checkpoint.model, approximated(checkpoint)
    layers = read_layers(checkpoint)
    square, variance = _moments(source, layers)
    if not square.any():
        raise CheckpointError(
            f"The modulation of {checkpoint.origin} gives zeros at every time, as before any training: there is nothing to fit."
        )
    least = np.maximum(STILL * square, 1e-6 * square.max())  # a vector of zeros is no reason to divide by 0
    weights = jnp.asarray(1 / np.maximum(variance, least), jnp.float32)
    key, drawn = jax.random.split(jax.random.key(seed))
    modulation = nnx.to_pure_dict(nnx.state(make_modulation(model, jnp.dtype("float32"), nnx.Rngs(key))))
    state = modulation, _optimizer(model, steps).init(modulation)
    for first in range(0, steps, PIECE):
        count = min(PIECE, steps - first)
        state = _advance(layers, weights, state, drawn, first, source=source, model=model, steps=steps, count=count)
        jax.block_until_ready(state)
        progress(count)
    error = _errors(source, layers, model, state[0])
    before, after = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (layers, state[0]))
    return Fit(state[0], Report(vector_names(model)[: len(square)], square, variance, error, before, after))


def _optimizer(model: config.Model, steps: int) -> optax.GradientTransformation:
    rate = optax.warmup_cosine_decay_schedule(0, RATE * 64 / model.approximator_hidden, steps // 20, steps)
    return optax.chain(optax.clip_by_global_norm(1), optax.adam(rate))


@partial(jax.jit, static_argnames=("source", "model", "steps", "count"), donate_argnames="state")
def _advance(
    layers: Params,
    weights: Float32[Array, " m"],
    state: tuple[Params, optax.OptState],
    key: PRNGKeyArray,
    first: int,
    *,
    source: config.Model,
    model: config.Model,
    steps: int,
    count: int,
) -> tuple[Params, optax.OptState]:
    """`count` of all `steps`, from the one numbered `first`."""
    optimizer = _optimizer(model, steps)

    def loss(modulation, time, guidance, aim):
        square = jnp.square(_vectors(model, modulation, time, guidance) - aim).mean(axis=(0, 2))
        return weights @ square / len(weights)

    def step(state, number):
        modulation, moments = state
        time, guidance = _drawn(jax.random.fold_in(key, number), source.guidance_embed)
        gradient = jax.grad(loss)(modulation, time, guidance, _vectors(source, layers, time, guidance))
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(modulation, updates), moments), None

    return jax.lax.scan(step, state, first + jnp.arange(count))[0]


def _drawn(key: PRNGKeyArray, guided: bool) -> tuple[Float32[Array, " b"], Float32[Array, " b"] | None]:
    for_time, for_guidance, for_which = jax.random.split(key, 3)
    time = jnp.square((jnp.arange(TIMES) + jax.random.uniform(for_time, (TIMES,))) / TIMES)
    if not guided:
        return time, None
    between = jax.random.uniform(for_guidance, (TIMES,), minval=GUIDANCE[0], maxval=GUIDANCE[1])
    return time, jnp.where(jax.random.bernoulli(for_which, shape=(TIMES,)), GUIDANCE[0], between)


def _vectors(
    model: config.Model, modulation: Params, time: Float32[Array, " b"], guidance: Float32[Array, " b"] | None
) -> Float32[Array, "b m d"]:
    """Those that the network reads: the last two belong to a linear head."""
    vectors = join_vectors(bind_modulation(model, FLOAT32, modulation)(time, guidance, None))
    return vectors if model.head == "linear" else vectors[:, :-2]


def read_layers(checkpoint: Checkpoint) -> Params:
    """The parameters of a checkpoint's modulation alone; what is stored in bfloat16 stays so."""

    def leaf(path: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray]) -> Array | None:
        if not path.startswith("modulation/"):
            return None  # and is not read
        first = next(blocks)
        kind = "bfloat16" if first.dtype == DTYPES["bfloat16"] else "float32"
        return jnp.asarray(native.stacked(shape, chain([first], blocks), DTYPES[kind]))

    return native.from_native(checkpoint.model, checkpoint.shapes, checkpoint.tensor, checkpoint.origin, leaf)["modulation"]


# --- measuring --------------------------------------------------------------------------------------------------------


_vectors_at = jax.jit(_vectors, static_argnames="model")


def _grid(source: config.Model) -> Iterator[tuple[Float32[np.ndarray, " b"], Float32[np.ndarray, " b"] | None]]:
    """Times and guidances, a few at a time: of a FLUX's vectors a thousand times are 4.2 GB."""
    times = ((np.arange(MEASURED) + 0.5) / MEASURED).astype(np.float32)
    for part in np.split(times, MEASURED // TIMES):
        if not source.guidance_embed:
            yield part, None
            continue
        for guidance in np.linspace(*GUIDANCE, 4, dtype=np.float32):
            yield part, np.full_like(part, guidance)


def _moments(source: config.Model, layers: Params) -> tuple[Float64[np.ndarray, " m"], Float64[np.ndarray, " m"]]:
    """Mean square and variance of each vector."""
    firsts, seconds = [], []
    for at in _grid(source):
        x = np.asarray(_vectors_at(source, layers, *at), np.float64)
        firsts.append(x.mean(axis=0))
        seconds.append(np.square(x).mean(axis=(0, 2)))
    square = np.mean(seconds, axis=0)
    return square, square - np.square(np.mean(firsts, axis=0)).mean(axis=-1)


def _errors(source: config.Model, layers: Params, model: config.Model, modulation: Params) -> Float64[np.ndarray, " m"]:
    """Mean square of the difference of each vector."""

    def error(at) -> np.ndarray:
        difference = _vectors_at(model, modulation, *at) - _vectors_at(source, layers, *at)
        return np.square(np.asarray(difference, np.float64)).mean(axis=(0, 2))

    return np.mean([error(at) for at in _grid(source)], axis=0)
