"""Weights that are kept small in memory and expanded where they are used, inside the loop over the blocks.

A leaf of the parameter tree may be one of these in place of an array. What is expanded lives as long as one block's work. As in any
pytree, the fields hold arrays, or whatever a transformation puts in their place.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

BLOCK = 32  # inputs that share a scale in Q8_0
STORES = ("q8_0", "int8", "float8_e4m3fn")

M = TypeVar("M")


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["shape"])
@dataclass(frozen=True)
class Quantised:
    """A kernel as small numbers and scales: of 32 inputs of an output (q8_0), or of all of them (int8, fp8).

    shape: of the kernel of one block, which `values` has flattened to [in, out].
    """

    values: Any  # [*stack, in, out], int8 or fp8
    scales: Any  # [*stack, in / block, out], float16 or float32
    shape: tuple[int, ...] = field(metadata=dict(static=True))

    def expand(self) -> Float[Array, "..."]:
        *stack, rows, out = self.values.shape
        groups = self.scales.shape[-2]
        values = self.values.astype(jnp.float32).reshape(*stack, groups, rows // groups, out)
        return (values * self.scales.astype(jnp.float32)[..., None, :]).reshape(*stack, *self.shape)


@partial(jax.tree_util.register_dataclass, data_fields=["base", "down", "up"], meta_fields=[])
@dataclass(frozen=True)
class Adapted:
    """A kernel with a low-rank addition (LoRA, arXiv 2106.09685) that is not merged into it: base + down · up."""

    base: Any  # an array or Quantised
    down: Any  # [*stack, in, rank]
    up: Any  # [*stack, rank, out], times strength · alpha / rank


class AdaptedLinear:
    """A linear layer whose kernel is Adapted: x · base + (x · down) · up. The addition is never as large as the kernel, nor is the
    gradient that trains it."""

    def __init__(self, linear: nnx.Linear | nnx.LinearGeneral):
        self.linear, self.adapted = linear, linear.kernel.get_value()
        linear.kernel.set_value(self.adapted.base)

    def __call__(self, x: Float[Array, "b n ..."]) -> Float[Array, "b n ..."]:
        y = self.linear(x)
        flat = x.reshape(*x.shape[:2], -1).astype(y.dtype)
        return y + (flat @ self.adapted.down.astype(y.dtype) @ self.adapted.up.astype(y.dtype)).reshape(y.shape)


def is_stored(module: nnx.Module) -> bool:
    """Whether any of its weights are stored small."""
    return any(map(_quantised, jax.tree.leaves(module, is_leaf=_quantised)))


def expanded(module: M) -> M:
    """`module` with arrays in place of what is stored small, and layers that add in place of those with an addition."""
    module = jax.tree.map(lambda x: x.expand() if _quantised(x) else x, module, is_leaf=_quantised)
    for part in [part for _, part in nnx.iter_modules(module)]:
        for name, layer in [*vars(part).items()]:
            if isinstance(layer, (nnx.Linear, nnx.LinearGeneral)) and isinstance(layer.kernel.get_value(), Adapted):
                setattr(part, name, AdaptedLinear(layer))
    return module


def _quantised(x: Any) -> bool:
    return isinstance(x, Quantised)


def quantise(matrix: Float[np.ndarray, "in out"], store: str) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of a matrix. q8_0 rounds as ggml does; int8 and fp8 have one scale an output, of fp8 a power of two,
    so that what was fp8 before stays as it is.

    Raises ValueError when q8_0's blocks do not divide the inputs.
    """
    matrix = np.asarray(matrix, np.float32)
    if store == "q8_0":
        if matrix.shape[0] % BLOCK:
            raise ValueError(f"{matrix.shape[0]} inputs do not divide into blocks of {BLOCK}.")
        grouped = matrix.reshape(-1, BLOCK, matrix.shape[1])
        scales = np.abs(grouped).max(axis=1) / np.float32(127)
        inverse = np.where(scales > 0, 1 / np.where(scales > 0, scales, 1), 0).astype(np.float32)
        scaled = grouped * inverse[:, None]
        values = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
        return values.reshape(matrix.shape), scales.astype(np.float16)
    largest = np.abs(matrix).max(axis=0, keepdims=True)
    if store == "int8":
        scales = np.where(largest > 0, largest / np.float32(127), 1).astype(np.float32)
        return np.rint(matrix / scales).astype(np.int8), scales
    dtype = jnp.dtype(store)
    limit = float(jnp.finfo(dtype).max)
    scales = np.exp2(np.ceil(np.log2(np.where(largest > 0, largest, limit) / limit))).astype(np.float32)
    return (matrix / scales).astype(dtype), scales
