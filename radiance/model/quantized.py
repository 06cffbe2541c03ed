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

Q8_0_BLOCK = 32  # inputs that share a scale in Q8_0

M = TypeVar("M")


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["shape"])
@dataclass(frozen=True)
class QuantizedKernel:
    """A kernel as small numbers and scales: of 32 inputs of an output (q8_0), or of all of them (int8, fp8).

    shape: of the kernel of one block, which `values` has flattened to [in, out].
    """

    values: Any  # [*stack, in, out], int8 or fp8
    scales: Any  # [*stack, in / block, out], float16 or float32
    shape: tuple[int, ...] = field(metadata=dict(static=True))

    def dequantize(self) -> Float[Array, "..."]:
        *stack_shape, num_inputs, num_outputs = self.values.shape
        num_groups = self.scales.shape[-2]
        values = self.values.astype(jnp.float32).reshape(
            *stack_shape, num_groups, num_inputs // num_groups, num_outputs
        )
        return (values * self.scales.astype(jnp.float32)[..., None, :]).reshape(
            *stack_shape, *self.shape
        )


@partial(jax.tree_util.register_dataclass, data_fields=["base", "down", "up"], meta_fields=[])
@dataclass(frozen=True)
class LoraKernel:
    """A kernel with a low-rank addition (LoRA, arXiv 2106.09685) that is not merged into it: base + down · up."""

    base: Any  # an array or Quantized
    down: Any  # [*stack, in, rank]
    up: Any  # [*stack, rank, out], times strength · alpha / rank


class LoraLinear:
    """A linear layer whose kernel is Adapted: x · base + (x · down) · up. The addition is never as large as the kernel, nor is the
    gradient that trains it.
    """

    def __init__(self, linear: nnx.Linear | nnx.LinearGeneral):
        self.linear, self.kernel = linear, linear.kernel.get_value()
        linear.kernel.set_value(self.kernel.base)

    def __call__(self, x: Float[Array, "b n ..."]) -> Float[Array, "b n ..."]:
        y = self.linear(x)
        flat_x = x.reshape(*x.shape[:2], -1).astype(y.dtype)
        return y + (
            flat_x @ self.kernel.down.astype(y.dtype) @ self.kernel.up.astype(y.dtype)
        ).reshape(y.shape)


def has_quantized_weights(module: nnx.Module) -> bool:
    """Whether any of its weights are stored small."""
    return any(map(_is_quantized, jax.tree.leaves(module, is_leaf=_is_quantized)))


def expand_weights(module: M) -> M:
    """`module` with arrays in place of what is stored small, and layers that add in place of those with an addition."""
    module = jax.tree.map(
        lambda x: x.dequantize() if _is_quantized(x) else x, module, is_leaf=_is_quantized
    )
    for submodule in [submodule for _, submodule in nnx.iter_modules(module)]:
        for name, layer in [*vars(submodule).items()]:
            if isinstance(layer, (nnx.Linear, nnx.LinearGeneral)) and isinstance(
                layer.kernel.get_value(), LoraKernel
            ):
                setattr(submodule, name, LoraLinear(layer))
    return module


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedKernel)


def quantize(
    matrix: Float[np.ndarray, "in out"], weight_format: str
) -> tuple[np.ndarray, np.ndarray]:
    """Values and scales of a matrix. q8_0 rounds as ggml does; int8 and fp8 have one scale an output, of fp8 a power of two,
    so that what was fp8 before stays as it is.

    Raises ValueError when q8_0's blocks do not divide the inputs.
    """
    matrix = np.asarray(matrix, np.float32)
    if weight_format == "q8_0":
        if matrix.shape[0] % Q8_0_BLOCK:
            raise ValueError(f"{matrix.shape[0]} inputs do not divide into blocks of {Q8_0_BLOCK}.")
        blocks = matrix.reshape(-1, Q8_0_BLOCK, matrix.shape[1])
        scales = np.abs(blocks).max(axis=1) / np.float32(127)
        inverse_scales = np.where(scales > 0, 1 / np.where(scales > 0, scales, 1), 0).astype(
            np.float32
        )
        scaled_blocks = blocks * inverse_scales[:, None]
        values = np.trunc(scaled_blocks + np.copysign(np.float32(0.5), scaled_blocks)).astype(
            np.int8
        )
        return values.reshape(matrix.shape), scales.astype(np.float16)
    max_magnitudes = np.abs(matrix).max(axis=0, keepdims=True)
    if weight_format == "int8":
        scales = np.where(max_magnitudes > 0, max_magnitudes / np.float32(127), 1).astype(
            np.float32
        )
        return np.rint(matrix / scales).astype(np.int8), scales
    dtype = jnp.dtype(weight_format)
    max_value = float(jnp.finfo(dtype).max)
    scales = np.exp2(
        np.ceil(np.log2(np.where(max_magnitudes > 0, max_magnitudes, max_value) / max_value))
    ).astype(np.float32)
    return (matrix / scales).astype(dtype), scales
