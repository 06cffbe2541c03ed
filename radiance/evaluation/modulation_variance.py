"""Measure how much of a FLUX-style model's modulation is a function of time alone.

FLUX's blocks compute their shifts, scales and gates from time, a pooled text vector and, in dev,
guidance; the layers that do so are 3.2 of its 11.9 B parameters. Chroma made the modulation a
function of time (and of a guidance that is always 0). This module measures what Chroma gave up,
from a checkpoint alone and one layer at a time. On a grid of all times × pooled vectors × guidance
scales, the variance of a vector is the sum of independent parts (analysis of variance): those of
time alone, of the pooled vector alone, of guidance alone, and of their interaction. A sum of
functions of one input each has no interaction.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32
from scipy.special import expit

from radiance import config
from radiance.base.errors import CheckpointError, DataError
from radiance.model.modulation import (
    DOUBLE_VECTOR_NAMES,
    SINGLE_VECTOR_NAMES,
    TIME_EMBEDDING_DIM,
    sinusoidal_embedding,
)
from radiance.model.pixel_head import HEADS
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.opening import open_tensors
from radiance.weights.tensors import is_finite

NUM_TIMES = 32  # evenly spaced: the centers of as many intervals of [0, 1]
NUM_RANDOM_POOLED = 32  # Gaussian vectors, used if there are no pooled vectors of prompts
MAX_POOLED_VECTORS = 128  # of prompts, evenly spaced in the file
GUIDANCE_SCALES = (1.0, 3.5, 6.0)  # for models that embed it
CONSTANT_THRESHOLD = 1e-12  # variance over mean square that is due to rounding alone


class ConditionGrid(NamedTuple):
    """Inputs of the modulation; it is computed for all their combinations."""

    time: Float32[np.ndarray, " t"]
    pooled: Float32[np.ndarray, "p w"]  # [1, 0] for models without this input
    guidance: Float32[np.ndarray, " g"]  # [0.0] for models without this input
    pooled_description: str  # origin of the pooled vectors

    @property
    def other_inputs(self) -> list[str]:
        """Names of the inputs besides time."""
        names = ["the pooled vector"] if self.pooled.shape[1] else []
        return [*names, "guidance"] if len(self.guidance) > 1 else names


class VarianceComponents(NamedTuple):
    """The mean square of a modulation vector over the grid, summed over channels, by component."""

    constant: float  # square of the mean
    time: float
    pooled: float
    guidance: float
    interaction: float

    @property
    def variance(self) -> float:
        """The total variance; 0 if it is due to rounding alone."""
        total = self.time + self.pooled + self.guidance + self.interaction
        return total if total > CONSTANT_THRESHOLD * self.constant else 0.0

    @property
    def r2_time(self) -> float:
        """R² of the best function of time; NaN if the vector is constant."""
        return self.time / self.variance if self.variance else float("nan")

    @property
    def r2_additive(self) -> float:
        """R² of the best sum of functions of time, pooled vector and guidance; NaN if constant."""
        return 1 - self.interaction / self.variance if self.variance else float("nan")


class ModulationVector(NamedTuple):
    """A measured vector."""

    layer_type: str  # image, text, single or output
    block: int
    name: str  # such as shift or attention gate
    components: VarianceComponents


def explain_trivial_case(model: config.Model) -> str | None:
    """Return why there is nothing to measure, or None.

    There is nothing to measure if the modulation has no input besides time.

    Raises:
        ConfigError: The modulation reads other inputs, but not through layers in every block.
    """
    if model.modulation == "approximator":
        return (
            "R² of time is 1 by construction: this model's approximator reads time, the index of "
            "the vector, and a guidance that is 0 in all published training and sampling. No text "
            "reaches its modulation."
        )
    if model.modulation == "none":
        return (
            "The modulation of this model is learned vectors, which are the same at every time: "
            "there is no variance to explain."
        )
    if not model.pooled_dim and not model.guidance_embed:
        return "R² of time is 1 by construction: time is the only input of this model's modulation."
    if model.modulation != "per_block":
        raise config.ConfigError(
            f"The modulation of this model is {model.modulation}, and only per_block can be "
            "measured: it has layers in every block."
        )
    return None


def make_grid(model: config.Model, pooled_path: Path | None = None) -> ConditionGrid:
    """Return the inputs on which a model is measured.

    Args:
        model: Settings of the model.
        pooled_path: A safetensors file with one tensor [prompts, width], the pooled vectors of
            prompts; random vectors if None.

    Raises:
        DataError: The file has no such tensor, or more than one.
    """
    time = (np.arange(NUM_TIMES, dtype=np.float32) + np.float32(0.5)) / np.float32(NUM_TIMES)
    guidance = np.array(GUIDANCE_SCALES if model.guidance_embed else (0,), np.float32)
    if pooled_path:
        pooled, description = _load_pooled_vectors(pooled_path, model.pooled_dim)
    else:
        pooled, description = _random_pooled_vectors(model.pooled_dim)
    return ConditionGrid(time, pooled, guidance, description)


def _load_pooled_vectors(path: Path, width: int) -> tuple[Float32[np.ndarray, "p w"], str]:
    if not width:
        raise DataError(f"This model reads no pooled vectors: leave {path} out.")
    file = open_tensors(path)
    names = [
        name
        for name, shape in file.shapes.items()
        if len(shape) == 2 and shape[0] > 1 and shape[1] == width
    ]
    if len(names) != 1:
        raise DataError(
            f"{path} has {len(names)} tensors of shape [prompts, {width}] with two prompts or "
            "more: give a file with one."
        )
    vectors = file[names[0]].astype(np.float32)
    if not np.isfinite(vectors).all():
        raise DataError(f"{names[0]} of {path} has values that are not finite: write it again.")
    count = min(len(vectors), MAX_POOLED_VECTORS)
    indices = np.linspace(0, len(vectors) - 1, count).round().astype(int)
    return vectors[indices], f"{count} of the {len(vectors)} pooled vectors of {path}"


def _random_pooled_vectors(width: int) -> tuple[Float32[np.ndarray, "p w"], str]:
    if not width:
        return np.zeros((1, 0), np.float32), "no pooled vectors, which this model does not read"
    description = (
        f"{NUM_RANDOM_POOLED} Gaussian vectors of norm about {width**0.5:.1f} in place of pooled "
        "vectors of prompts (give real ones by --pooled FILE)"
    )
    shape = (NUM_RANDOM_POOLED, width)
    return np.random.default_rng(0).standard_normal(shape, np.float32), description


def measure_variance(checkpoint: Checkpoint, grid: ConditionGrid) -> Iterator[ModulationVector]:
    """Yield every modulation vector of a `per_block` model, block by block.

    One layer of one block is in memory at a time.

    Raises:
        CheckpointError: A weight has values that are not finite.
    """
    embeddings = embed_conditions(checkpoint, grid)
    shape, d = embeddings.shape, checkpoint.model.hidden
    x = embeddings.reshape(-1, d)  # NumPy multiplies stacks of short matrices one by one
    for layer_type, block, native_name, vector_names in _iterate_layers(checkpoint.model):
        weight = _read_tensor(checkpoint, f"{native_name}.weight")
        bias = _read_tensor(checkpoint, f"{native_name}.bias").astype(np.float32)
        for i, name in enumerate(vector_names):
            rows = slice(i * d, (i + 1) * d)
            values = x @ weight[rows].astype(np.float32).T + bias[rows]
            components = decompose_variance(values.reshape(shape))
            yield ModulationVector(layer_type, block, name, components)


def count_vectors(model: config.Model) -> int:
    """Return the number of vectors that `measure_variance` yields."""
    return sum(len(names) for *_, names in _iterate_layers(model))


def _iterate_layers(model: config.Model) -> Iterator[tuple[str, int, str, Sequence[str]]]:
    """Yield type, block, native name and vectors of each modulation layer.

    The rows of a layer's matrix compute its vectors one after the other.
    """
    for block in range(model.double_blocks):
        yield "image", block, f"double_blocks.{block}.img_mod.lin", DOUBLE_VECTOR_NAMES
        yield "text", block, f"double_blocks.{block}.txt_mod.lin", DOUBLE_VECTOR_NAMES
    for block in range(model.single_blocks):
        yield "single", block, f"single_blocks.{block}.modulation.lin", SINGLE_VECTOR_NAMES
    if HEADS[model.head].reads_output_vectors:
        yield "output", 0, "final_layer.adaLN_modulation.1", SINGLE_VECTOR_NAMES[:2]


def embed_conditions(checkpoint: Checkpoint, grid: ConditionGrid) -> Float32[np.ndarray, "t p g d"]:
    """Return SiLU of the sum of all inputs' embeddings, which every modulation layer reads."""

    def embed(prefix: str, x: Float[np.ndarray, "n w"]) -> Float32[np.ndarray, "n d"]:
        for layer in ("in_layer", "out_layer"):
            weight, bias = (
                _read_tensor(checkpoint, f"{prefix}.{layer}.{suffix}").astype(np.float32)
                for suffix in ("weight", "bias")
            )
            x = (silu(x) if layer == "out_layer" else x) @ weight.T + bias
        return x

    x = embed("time_in", _sinusoidal_embedding(grid.time))[:, None, None]
    if checkpoint.model.pooled_dim:
        x = x + embed("vector_in", grid.pooled)[:, None]
    if checkpoint.model.guidance_embed:
        x = x + embed("guidance_in", _sinusoidal_embedding(grid.guidance))
    return silu(x)


def _sinusoidal_embedding(x: Float32[np.ndarray, " n"]) -> Float32[np.ndarray, "n w"]:
    return np.asarray(sinusoidal_embedding(jnp.asarray(x), TIME_EMBEDDING_DIM))


def silu(x: Float32[np.ndarray, "*n"]) -> Float32[np.ndarray, "*n"]:
    """Return x · sigmoid(x)."""
    return x * expit(x)


def _read_tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    values = checkpoint.get_tensor(name)
    if not is_finite(values):
        raise CheckpointError(
            f"{checkpoint.origin}: {name} holds values that are not finite: the file is damaged."
        )
    return values


def decompose_variance(values: Float[np.ndarray, "t p g d"]) -> VarianceComponents:
    """Return the components of the variance over a grid, summed over the channels d."""
    x = values.astype(np.float64)
    mean = x.mean(axis=(0, 1, 2))
    x -= mean
    main_effects = [
        float(np.square(x.mean(axis=other_axes)).sum(-1).mean())
        for other_axes in ((1, 2), (0, 2), (0, 1))
    ]
    total = float(np.square(x).sum(-1).mean())
    interaction = max(0.0, total - sum(main_effects))
    time, pooled, guidance = main_effects
    constant = float(np.square(mean).sum())
    return VarianceComponents(constant, time, pooled, guidance, interaction)
