"""Quantized kernels: small numbers with scales, which are dequantized block by block.

A leaf of the parameter tree may be a `QuantizedKernel` in place of an array. Its dequantized values
live as long as the work of one block. As in any pytree, the fields hold arrays, or whatever a
transformation puts in their place.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

Q8_0_BLOCK = 32  # inputs that share a scale in Q8_0

M = TypeVar("M", bound=nnx.Module)


@partial(jax.tree_util.register_dataclass, data_fields=["values", "scales"], meta_fields=["shape"])
@dataclass(frozen=True)
class QuantizedKernel:
    """A kernel as small numbers with one scale for 32 inputs (q8_0) or for all (int8, fp8).

    Attributes:
        values: Values [*stack, in, out], int8 or fp8.
        scales: Scales [*stack, in / block, out], float16 or float32.
        shape: Shape of one block's kernel, which `values` has flattened to [in, out].
    """

    values: Any
    scales: Any
    shape: tuple[int, ...] = field(metadata=dict(static=True))

    def dequantize(self) -> Float[Array, "..."]:
        """Compute the kernel in float32, with its own shape behind the stack's axes."""
        stack_shape = self.values.shape[:-2]
        values = rearrange(
            self.values.astype(jnp.float32),
            "... (groups size) out -> ... groups size out",
            groups=self.scales.shape[-2],
        )
        scales = rearrange(self.scales.astype(jnp.float32), "... groups out -> ... groups 1 out")
        return (values * scales).reshape(*stack_shape, *self.shape)


def has_quantized_weights(module: nnx.Module) -> bool:
    """Return whether any weight of the module is quantized."""
    return any(map(_is_quantized, jax.tree.leaves(module, is_leaf=_is_quantized)))


def dequantize_weights(module: M) -> M:
    """Return a copy of the module with arrays in place of quantized kernels."""
    return jax.tree.map(
        lambda x: x.dequantize() if _is_quantized(x) else x, module, is_leaf=_is_quantized
    )


def _is_quantized(x: Any) -> bool:
    return isinstance(x, QuantizedKernel)


def quantize_matrix(
    matrix: Float[np.ndarray, "in out"], weight_format: str
) -> tuple[np.ndarray, np.ndarray]:
    """Quantize a matrix.

    "q8_0" rounds as ggml does. "int8" and "float8_e4m3fn" have one scale for each output; the
    scales of fp8 are powers of two, so that values that were fp8 before do not change.

    Args:
        matrix: The kernel.
        weight_format: One of `config.WEIGHT_FORMATS`.

    Returns:
        Values [in, out] and scales [in / block, out], as in `QuantizedKernel`.

    Raises:
        ValueError: If the number of inputs is not a multiple of q8_0's block.
    """
    matrix = np.asarray(matrix, np.float32)
    if weight_format == "q8_0":
        return _quantize_q8_0(matrix)
    max_magnitudes = np.abs(matrix).max(axis=0, keepdims=True)
    if weight_format == "int8":
        scales = np.where(max_magnitudes > 0, max_magnitudes / np.float32(127), 1)
        scales = scales.astype(np.float32)
        return np.rint(matrix / scales).astype(np.int8), scales
    dtype = jnp.dtype(weight_format)
    max_value = float(jnp.finfo(dtype).max)
    magnitudes = np.where(max_magnitudes > 0, max_magnitudes, max_value)
    scales = np.exp2(np.ceil(np.log2(magnitudes / max_value))).astype(np.float32)
    return (matrix / scales).astype(dtype), scales


def _quantize_q8_0(matrix: Float[np.ndarray, "in out"]) -> tuple[np.ndarray, np.ndarray]:
    """Quantize blocks of 32 inputs to int8 with float16 scales, and round half away from zero."""
    if matrix.shape[0] % Q8_0_BLOCK:
        raise ValueError(f"{matrix.shape[0]} inputs do not divide into blocks of {Q8_0_BLOCK}.")
    blocks = rearrange(matrix, "(groups size) out -> groups size out", size=Q8_0_BLOCK)
    scales = np.abs(blocks).max(axis=1) / np.float32(127)
    inverse_scales = np.where(scales > 0, 1 / np.where(scales > 0, scales, 1), 0)
    scaled_blocks = blocks * inverse_scales.astype(np.float32)[:, None]
    values = np.trunc(scaled_blocks + np.copysign(np.float32(0.5), scaled_blocks))
    return values.astype(np.int8).reshape(matrix.shape), scales.astype(np.float16)
