"""How much of a FLUX-style model's modulation is a function of time alone: a checkpoint read layer by layer, no image painted.

FLUX's blocks make their shifts, scales and gates from time, a pooled text vector and, in dev, guidance; the layers that do are 3.2 of its
11.9 B parameters. Chroma made all of it a function of time (and of a guidance that is always 0). What that gave up is measured here, on a
grid of all times × pooled vectors × guidances, on which the variance of a vector falls into parts that add up (analysis of variance):
of time alone, of the pooled vector alone, of guidance alone, and of those together, which no sum of functions of one of them has.
"""

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32
from scipy.special import expit

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.files import replace_atomically
from radiance.base.tables import format_table as text_table
from radiance.data.datasets import DataError
from radiance.evaluation.charts import COLORS, Line, render_line_chart
from radiance.evaluation.report import format_html_table, render_page
from radiance.model.modulation import (
    DOUBLE_VECTOR_NAMES,
    SINGLE_VECTOR_NAMES,
    TIME_EMBEDDING_DIM,
    sinusoidal_embedding,
)
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.opening import open_tensors
from radiance.weights.tensors import is_finite

NUM_TIMES = 32  # evenly over [0, 1], in the middle of as many intervals
NUM_RANDOM_POOLED = 32  # Gaussian vectors, where there are no prompts' own
MAX_POOLED_VECTORS = 128  # of the prompts' vectors, evenly out of the file
GUIDANCE_SCALES = (1.0, 3.5, 6.0)  # of models that embed it
CONSTANT_THRESHOLD = 1e-12  # variance over mean square of what only rounding moves


class ConditionGrid(NamedTuple):
    """What the modulation is asked for: every combination."""

    time: Float32[np.ndarray, " t"]
    pooled: Float32[np.ndarray, "p w"]  # [1, 0] for models that read none
    guidance: Float32[np.ndarray, " g"]  # [1], of 0, for models that read none
    pooled_description: str  # what the pooled vectors are


class VarianceComponents(NamedTuple):
    """The mean square of a vector's channels over the grid, part by part."""

    constant: float
    time: float
    pooled: float
    guidance: float
    interaction: float

    @property
    def variance(self) -> float:
        """Without rounding: 0 for what is constant."""
        total = sum(self[1:])
        return total if total > CONSTANT_THRESHOLD * self.constant else 0.0

    @property
    def r2_time(self) -> float:
        """R² of the best function of time. NaN for a constant, as of the other."""
        return self.time / self.variance if self.variance else float("nan")

    @property
    def r2_additive(self) -> float:
        """R² of the best function of time plus one of the pooled vector plus one of guidance."""
        return 1 - self.interaction / self.variance if self.variance else float("nan")


class ModulationVector(NamedTuple):
    layer_type: str  # image, text, single, output
    block: int
    name: str  # shift, attention gate, …
    components: VarianceComponents


# --- measuring --------------------------------------------------------------------------------------------------------


def explain_trivial_case(model: config.Model) -> str | None:
    """Why there is nothing to measure, for models whose modulation cannot read anything but time (or not even that); None for others.

    Raises ConfigError for those that have no layers of their own in the blocks.
    """
    if model.modulation == "approximator":
        return (
            "R² of time is 1 by construction: this model's approximator reads time, the number of the vector, and a guidance that all "
            "published training and sampling leaves at 0. No text reaches its modulation."
        )
    if model.modulation == "none":
        return "The modulation of this model is learned vectors, which are the same at every time: there is no variance to explain."
    if not model.pooled_dim and not model.guidance_embed:
        return (
            "R² of time is 1 by construction: nothing but time enters the modulation of this model."
        )
    if model.modulation != "per_block":
        raise config.ConfigError(
            f"The modulation of this model is {model.modulation}, and layers of each block are measured: only per_block."
        )
    return None


def make_grid(model: config.Model, pooled_path: Path | None = None) -> ConditionGrid:
    """The grid for a model. prompts: a safetensors file with their pooled vectors. Raises DataError when it holds something else."""
    time = (np.arange(NUM_TIMES, dtype=np.float32) + np.float32(0.5)) / np.float32(NUM_TIMES)
    guidance = np.array(GUIDANCE_SCALES if model.guidance_embed else (0,), np.float32)
    pooled, pooled_description = (
        _load_pooled_vectors(pooled_path, model.pooled_dim)
        if pooled_path
        else _random_pooled_vectors(model.pooled_dim)
    )
    return ConditionGrid(time, pooled, guidance, pooled_description)


def _load_pooled_vectors(path: Path, width: int) -> tuple[Float32[np.ndarray, "p w"], str]:
    if not width:
        raise DataError(f"This model reads no pooled vectors: leave {path} out.")
    file = open_tensors(path)
    matching_names = [
        name
        for name, shape in file.shapes.items()
        if len(shape) == 2 and shape[1] == width and shape[0] > 1
    ]
    if len(matching_names) != 1:
        raise DataError(
            f"{path} has {len(matching_names)} tensors of shape [prompts, {width}] with two prompts or more: make a file with one."
        )
    vectors = file[matching_names[0]].astype(np.float32)
    if not np.isfinite(vectors).all():
        raise DataError(
            f"{matching_names[0]} of {path} holds values that are not finite: make it anew."
        )
    subset = vectors[
        np.linspace(0, len(vectors) - 1, min(len(vectors), MAX_POOLED_VECTORS)).round().astype(int)
    ]
    return subset, f"{len(subset)} of the {len(vectors)} pooled vectors of {path}"


def _random_pooled_vectors(width: int) -> tuple[Float32[np.ndarray, "p w"], str]:
    if not width:
        return np.zeros((1, 0), np.float32), "no pooled vectors, which this model does not read"
    description = f"{NUM_RANDOM_POOLED} Gaussian vectors of norm about {width**0.5:.1f} in place of prompts' pooled vectors (real ones: --pooled FILE)"
    return np.random.default_rng(0).standard_normal(
        (NUM_RANDOM_POOLED, width), np.float32
    ), description


def measure_variance(checkpoint: Checkpoint, grid: ConditionGrid) -> Iterator[ModulationVector]:
    """Every vector of a `per_block` model, block by block: one layer of one block is in memory at a time."""
    embeddings = embed_conditions(checkpoint, grid)
    shape, d = embeddings.shape, checkpoint.model.hidden
    x = embeddings.reshape(-1, d)  # NumPy multiplies stacks of short matrices one by one
    for layer_type, block, native_name, vector_names in _iterate_layers(checkpoint.model):
        weight, bias = (
            _read_tensor(checkpoint, f"{native_name}.weight"),
            _read_tensor(checkpoint, f"{native_name}.bias").astype(np.float32),
        )
        for i, name in enumerate(vector_names):
            rows = slice(i * d, (i + 1) * d)
            yield ModulationVector(
                layer_type,
                block,
                name,
                decompose_variance(
                    (x @ weight[rows].astype(np.float32).T + bias[rows]).reshape(shape)
                ),
            )


def count_vectors(model: config.Model) -> int:
    """Vectors that `measure` gives."""
    return sum(len(names) for *_, names in _iterate_layers(model))


def _iterate_layers(model: config.Model) -> Iterator[tuple[str, int, str, Sequence[str]]]:
    """The layers of blocks, in their native names, and the vectors that lie in them one below the other."""
    for block in range(model.double_blocks):
        yield "image", block, f"double_blocks.{block}.img_mod.lin", DOUBLE_VECTOR_NAMES
        yield "text", block, f"double_blocks.{block}.txt_mod.lin", DOUBLE_VECTOR_NAMES
    for block in range(model.single_blocks):
        yield "single", block, f"single_blocks.{block}.modulation.lin", SINGLE_VECTOR_NAMES
    if model.head == "linear":
        yield "output", 0, "final_layer.adaLN_modulation.1", SINGLE_VECTOR_NAMES[:2]


def embed_conditions(checkpoint: Checkpoint, grid: ConditionGrid) -> Float32[np.ndarray, "t p g d"]:
    """SiLU of the sum of the embeddings, which every layer reads."""

    def embed(prefix: str, x: Float[np.ndarray, "n w"]) -> Float32[np.ndarray, "n d"]:
        for layer in ("in_layer", "out_layer"):
            weight, bias = (
                _read_tensor(checkpoint, f"{prefix}.{layer}.{suffix}").astype(np.float32)
                for suffix in ("weight", "bias")
            )
            x = (silu(x) if layer == "out_layer" else x) @ weight.T + bias
        return x

    x = embed(
        "time_in", np.asarray(sinusoidal_embedding(jnp.asarray(grid.time), TIME_EMBEDDING_DIM))
    )[:, None, None]
    if checkpoint.model.pooled_dim:
        x = x + embed("vector_in", grid.pooled)[:, None]
    if checkpoint.model.guidance_embed:
        x = x + embed(
            "guidance_in",
            np.asarray(sinusoidal_embedding(jnp.asarray(grid.guidance), TIME_EMBEDDING_DIM)),
        )
    return silu(x)


def silu(x: Float32[np.ndarray, "*n"]) -> Float32[np.ndarray, "*n"]:
    return x * expit(x)


def _read_tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    values = checkpoint.get_tensor(name)
    if not is_finite(values):
        raise CheckpointError(
            f"{checkpoint.origin}: {name} holds values that are not finite: the file is damaged."
        )
    return values


def decompose_variance(values: Float[np.ndarray, "t p g d"]) -> VarianceComponents:
    """Sums over the channels."""
    x = values.astype(np.float64)
    mean = x.mean(axis=(0, 1, 2))
    x -= mean
    components = [
        np.square(x.mean(axis=other_axes)).sum(-1).mean() for other_axes in ((1, 2), (0, 2), (0, 1))
    ]
    total = np.square(x).sum(-1).mean()
    return VarianceComponents(
        float(np.square(mean).sum()),
        *map(float, components),
        max(0.0, float(total - sum(components))),
    )


# --- telling ----------------------------------------------------------------------------------------------------------


def format_summary(vectors: Sequence[ModulationVector], grid: ConditionGrid) -> str:
    """What was measured, and one number of it."""
    guidance = (
        f" × guidances {', '.join(f'{g:g}' for g in grid.guidance)}"
        if len(grid.guidance) > 1
        else ""
    )
    varying_components = [v.components for v in vectors if v.components.variance]
    lines = [
        f"{len(grid.time)} times, evenly over 0 (image) to 1 (noise), × {grid.pooled_description}{guidance}."
    ]
    if num_constant := len(vectors) - len(varying_components):
        lines.append(f"{num_constant} of the {len(vectors)} vectors are constant.")
    if varying_components:
        lines.append(
            f"Of the variance of a vector, time alone explains {fmean(s.r2_time for s in varying_components):.1%} in the mean over {len(varying_components)} vectors, "
            f"and a function of time plus one of {' plus one of '.join(_other_input_names(grid))} {fmean(s.r2_additive for s in varying_components):.1%}; time alone "
            f"explains 99% or more of {sum(s.r2_time >= 0.99 for s in varying_components)} vectors."
        )
    return "\n".join(lines)


def _other_input_names(grid: ConditionGrid) -> list[str]:
    return ["the pooled vector"] * (grid.pooled.shape[1] > 0) + ["guidance"] * (
        len(grid.guidance) > 1
    )


def format_vector_table(vectors: Sequence[ModulationVector]) -> str:
    """A table of medians and minima over the blocks."""
    rows = [("layers", "vector", "blocks", "R² time", "lowest", "R² sum", "lowest", "constant")]
    for layer_type, name in dict.fromkeys((v.layer_type, v.name) for v in vectors):
        components = [v.components for v in vectors if (v.layer_type, v.name) == (layer_type, name)]
        rows.append(
            (
                layer_type,
                name,
                f"{len(components)}",
                *_format_median_and_minimum([s.r2_time for s in components]),
                *_format_median_and_minimum([s.r2_additive for s in components]),
                _format_constant_fraction(components),
            )
        )
    return text_table(rows, num_text_columns=2)


def _format_median_and_minimum(values: Sequence[float]) -> tuple[str, str]:
    """Median and minimum of those that are numbers."""
    valid = [x for x in values if x == x]
    return (f"{median(valid):.3f}", f"{min(valid):.3f}") if valid else ("–", "–")


def _format_constant_fraction(components: Sequence[VarianceComponents]) -> str:
    """The median share of the mean square that no input moves."""
    constants_and_totals = [(s.constant, s.constant + s.variance) for s in components]
    return f"{median(constant / total if total else 1.0 for constant, total in constants_and_totals):.1%}"


def write_modulation_report(
    path: Path, title: str, vectors: Sequence[ModulationVector], grid: ConditionGrid
):
    """R² of every vector over the blocks, as a page without script or network."""
    charts = []
    for layer_type, part in dict.fromkeys(
        (v.layer_type, v.name.rpartition(" ")[0]) for v in vectors if v.layer_type != "output"
    ):
        lines = []
        for color, name in zip(COLORS, SINGLE_VECTOR_NAMES):
            block_vectors = [
                v
                for v in vectors
                if v.layer_type == layer_type and v.name == f"{part} {name}".strip()
            ]
            lines.append(
                Line(name, [(v.block, v.components.r2_time) for v in block_vectors], color)
            )
            lines.append(
                Line(
                    "",
                    [(v.block, v.components.r2_additive) for v in block_vectors],
                    color,
                    "dashed",
                )
            )
        charts.append(
            render_line_chart(f"{layer_type} {part}".strip(), "R²", lines, x_label="block")
        )
    rows = [
        (
            v.layer_type,
            v.block,
            v.name,
            f"{v.components.r2_time:.4f}",
            f"{v.components.r2_additive:.4f}",
            _format_constant_fraction([v.components]),
        )
        for v in vectors
    ]
    html_parts = [
        f"<h1>Modulation of {html.escape(title)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in format_summary(vectors, grid).splitlines()),
    ]
    html_parts.append(
        "<p>Solid: R² of time alone. Dashed: of a function of time plus a function of each other input.</p>"
    )
    html_parts.append(f'<div class="charts">{"".join(charts)}</div><h2>Every vector</h2>')
    html_parts.append(
        format_html_table(("layers", "block", "vector", "R² time", "R² sum", "constant"), rows)
    )
    with replace_atomically(path) as part:
        part.write_text(render_page(f"Modulation of {title}", html_parts), "utf-8")
