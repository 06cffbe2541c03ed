"""How much of a FLUX-style model's modulation is a function of time alone: a checkpoint read layer by layer, no picture painted.

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
from radiance.data.datasets import DataError
from radiance.evaluation.charts import COLOURS, Line, line_chart
from radiance.evaluation.report import page, table
from radiance.model.modulation import SIX, THREE, TIME_EMBEDDING, sinusoid
from radiance.weights.checkpoint import Checkpoint
from radiance.weights.convert import table as text_table
from radiance.weights.files import CheckpointError, finite, open_tensors, replacing

TIMES = 32  # evenly over [0, 1], in the middle of as many intervals
POOLED = 32  # Gaussian vectors, where there are no prompts' own
MOST = 128  # of the prompts' vectors, evenly out of the file
GUIDANCE = (1.0, 3.5, 6.0)  # of models that embed it
CONSTANT = 1e-12  # variance over mean square of what only rounding moves


class Grid(NamedTuple):
    """What the modulation is asked for: every combination."""

    time: Float32[np.ndarray, " t"]
    pooled: Float32[np.ndarray, "p w"]  # [1, 0] for models that read none
    guidance: Float32[np.ndarray, " g"]  # [1], of 0, for models that read none
    told: str  # what the pooled vectors are


class Shares(NamedTuple):
    """The mean square of a vector's channels over the grid, part by part."""

    constant: float
    time: float
    pooled: float
    guidance: float
    together: float

    @property
    def variance(self) -> float:
        """Without rounding: 0 for what is constant."""
        found = sum(self[1:])
        return found if found > CONSTANT * self.constant else 0.0

    @property
    def of_time(self) -> float:
        """R² of the best function of time. NaN for a constant, as of the other."""
        return self.time / self.variance if self.variance else float("nan")

    @property
    def of_sum(self) -> float:
        """R² of the best function of time plus one of the pooled vector plus one of guidance."""
        return 1 - self.together / self.variance if self.variance else float("nan")


class Vector(NamedTuple):
    layers: str  # image, text, single, output
    block: int
    name: str  # shift, attention gate, …
    shares: Shares


# --- measuring --------------------------------------------------------------------------------------------------------


def by_construction(model: config.Model) -> str | None:
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
        return "R² of time is 1 by construction: nothing but time enters the modulation of this model."
    if model.modulation != "per_block":
        raise config.ConfigError(
            f"The modulation of this model is {model.modulation}, and layers of each block are measured: only per_block."
        )
    return None


def make_grid(model: config.Model, prompts: Path | None = None) -> Grid:
    """The grid for a model. prompts: a safetensors file with their pooled vectors. Raises DataError when it holds something else."""
    time = (np.arange(TIMES, dtype=np.float32) + np.float32(0.5)) / np.float32(TIMES)
    guidance = np.array(GUIDANCE if model.guidance_embed else (0,), np.float32)
    pooled, told = _of_prompts(prompts, model.pooled_dim) if prompts else _stand_ins(model.pooled_dim)
    return Grid(time, pooled, guidance, told)


def _of_prompts(path: Path, width: int) -> tuple[Float32[np.ndarray, "p w"], str]:
    if not width:
        raise DataError(f"This model reads no pooled vectors: leave {path} out.")
    file = open_tensors(path)
    fitting = [name for name, shape in file.shapes.items() if len(shape) == 2 and shape[1] == width and shape[0] > 1]
    if len(fitting) != 1:
        raise DataError(f"{path} has {len(fitting)} tensors of shape [prompts, {width}] with two prompts or more: make a file with one.")
    vectors = file[fitting[0]].astype(np.float32)
    if not np.isfinite(vectors).all():
        raise DataError(f"{fitting[0]} of {path} holds values that are not finite: make it anew.")
    chosen = vectors[np.linspace(0, len(vectors) - 1, min(len(vectors), MOST)).round().astype(int)]
    return chosen, f"{len(chosen)} of the {len(vectors)} pooled vectors of {path}"


def _stand_ins(width: int) -> tuple[Float32[np.ndarray, "p w"], str]:
    if not width:
        return np.zeros((1, 0), np.float32), "no pooled vectors, which this model does not read"
    told = f"{POOLED} Gaussian vectors of norm about {width**0.5:.1f} in place of prompts' pooled vectors (real ones: --pooled FILE)"
    return np.random.default_rng(0).standard_normal((POOLED, width), np.float32), told


def measure(checkpoint: Checkpoint, grid: Grid) -> Iterator[Vector]:
    """Every vector of a `per_block` model, block by block: one layer of one block is in memory at a time."""
    conditions = condition(checkpoint, grid)
    shape, d = conditions.shape, checkpoint.model.hidden
    x = conditions.reshape(-1, d)  # NumPy multiplies stacks of short matrices one by one
    for layers, block, native, names in _layers(checkpoint.model):
        weight, bias = _tensor(checkpoint, f"{native}.weight"), _tensor(checkpoint, f"{native}.bias").astype(np.float32)
        for i, name in enumerate(names):
            part = slice(i * d, (i + 1) * d)
            yield Vector(layers, block, name, shares((x @ weight[part].astype(np.float32).T + bias[part]).reshape(shape)))


def count(model: config.Model) -> int:
    """Vectors that `measure` gives."""
    return sum(len(names) for *_, names in _layers(model))


def _layers(model: config.Model) -> Iterator[tuple[str, int, str, Sequence[str]]]:
    """The layers of blocks, in their native names, and the vectors that lie in them one below the other."""
    for block in range(model.double_blocks):
        yield "image", block, f"double_blocks.{block}.img_mod.lin", SIX
        yield "text", block, f"double_blocks.{block}.txt_mod.lin", SIX
    for block in range(model.single_blocks):
        yield "single", block, f"single_blocks.{block}.modulation.lin", THREE
    if model.head == "linear":
        yield "output", 0, "final_layer.adaLN_modulation.1", THREE[:2]


def condition(checkpoint: Checkpoint, grid: Grid) -> Float32[np.ndarray, "t p g d"]:
    """SiLU of the sum of the embeddings, which every layer reads."""

    def embedded(native: str, x: Float[np.ndarray, "n w"]) -> Float32[np.ndarray, "n d"]:
        for layer in ("in_layer", "out_layer"):
            weight, bias = (_tensor(checkpoint, f"{native}.{layer}.{kind}").astype(np.float32) for kind in ("weight", "bias"))
            x = (silu(x) if layer == "out_layer" else x) @ weight.T + bias
        return x

    x = embedded("time_in", np.asarray(sinusoid(jnp.asarray(grid.time), TIME_EMBEDDING)))[:, None, None]
    if checkpoint.model.pooled_dim:
        x = x + embedded("vector_in", grid.pooled)[:, None]
    if checkpoint.model.guidance_embed:
        x = x + embedded("guidance_in", np.asarray(sinusoid(jnp.asarray(grid.guidance), TIME_EMBEDDING)))
    return silu(x)


def silu(x: Float32[np.ndarray, "*n"]) -> Float32[np.ndarray, "*n"]:
    return x * expit(x)


def _tensor(checkpoint: Checkpoint, name: str) -> np.ndarray:
    values = checkpoint.tensor(name)
    if not finite(values):
        raise CheckpointError(f"{checkpoint.origin}: {name} holds values that are not finite: the file is damaged.")
    return values


def shares(values: Float[np.ndarray, "t p g d"]) -> Shares:
    """Sums over the channels."""
    x = values.astype(np.float64)
    mean = x.mean(axis=(0, 1, 2))
    x -= mean
    parts = [np.square(x.mean(axis=others)).sum(-1).mean() for others in ((1, 2), (0, 2), (0, 1))]
    whole = np.square(x).sum(-1).mean()
    return Shares(float(np.square(mean).sum()), *map(float, parts), max(0.0, float(whole - sum(parts))))


# --- telling ----------------------------------------------------------------------------------------------------------


def summary(vectors: Sequence[Vector], grid: Grid) -> str:
    """What was measured, and one number of it."""
    guidance = f" × guidances {', '.join(f'{g:g}' for g in grid.guidance)}" if len(grid.guidance) > 1 else ""
    varying = [v.shares for v in vectors if v.shares.variance]
    lines = [f"{len(grid.time)} times, evenly over 0 (picture) to 1 (noise), × {grid.told}{guidance}."]
    if constant := len(vectors) - len(varying):
        lines.append(f"{constant} of the {len(vectors)} vectors are constant.")
    if varying:
        lines.append(
            f"Of the variance of a vector, time alone explains {fmean(s.of_time for s in varying):.1%} in the mean over {len(varying)} vectors, "
            f"and a function of time plus one of {' plus one of '.join(_others(grid))} {fmean(s.of_sum for s in varying):.1%}; time alone "
            f"explains 99% or more of {sum(s.of_time >= 0.99 for s in varying)} vectors."
        )
    return "\n".join(lines)


def _others(grid: Grid) -> list[str]:
    return ["the pooled vector"] * (grid.pooled.shape[1] > 0) + ["guidance"] * (len(grid.guidance) > 1)


def told(vectors: Sequence[Vector]) -> str:
    """A table of medians and minima over the blocks."""
    rows = [("layers", "vector", "blocks", "R² time", "lowest", "R² sum", "lowest", "constant")]
    for layers, name in dict.fromkeys((v.layers, v.name) for v in vectors):
        found = [v.shares for v in vectors if (v.layers, v.name) == (layers, name)]
        rows.append(
            (layers, name, f"{len(found)}", *_range([s.of_time for s in found]), *_range([s.of_sum for s in found]), _constant(found))
        )
    return text_table(rows, left=2)


def _range(values: Sequence[float]) -> tuple[str, str]:
    """Median and minimum of those that are numbers."""
    good = [x for x in values if x == x]
    return (f"{median(good):.3f}", f"{min(good):.3f}") if good else ("–", "–")


def _constant(found: Sequence[Shares]) -> str:
    """The median share of the mean square that no input moves."""
    squares = [(s.constant, s.constant + s.variance) for s in found]
    return f"{median(constant / whole if whole else 1.0 for constant, whole in squares):.1%}"


def write_page(path: Path, title: str, vectors: Sequence[Vector], grid: Grid):
    """R² of every vector over the blocks, as a page without script or network."""
    figures = []
    for layers, part in dict.fromkeys((v.layers, v.name.rpartition(" ")[0]) for v in vectors if v.layers != "output"):
        lines = []
        for colour, name in zip(COLOURS, THREE):
            found = [v for v in vectors if v.layers == layers and v.name == f"{part} {name}".strip()]
            lines.append(Line(name, [(v.block, v.shares.of_time) for v in found], colour))
            lines.append(Line("", [(v.block, v.shares.of_sum) for v in found], colour, "dashed"))
        figures.append(line_chart(f"{layers} {part}".strip(), "R²", lines, axis="block"))
    rows = [(v.layers, v.block, v.name, f"{v.shares.of_time:.4f}", f"{v.shares.of_sum:.4f}", _constant([v.shares])) for v in vectors]
    body = [
        f"<h1>Modulation of {html.escape(title)}</h1>",
        *(f"<p>{html.escape(line)}</p>" for line in summary(vectors, grid).splitlines()),
    ]
    body.append("<p>Solid: R² of time alone. Dashed: of a function of time plus a function of each other input.</p>")
    body.append(f'<div class="charts">{"".join(figures)}</div><h2>Every vector</h2>')
    body.append(table(("layers", "block", "vector", "R² time", "R² sum", "constant"), rows))
    with replacing(path) as part:
        part.write_text(page(f"Modulation of {title}", body), "utf-8")
