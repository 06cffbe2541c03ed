"""Matrix products of float8 numbers, in the form that XLA turns into the FP8 products of cuBLAS.

Each factor is divided by one scale, rounded to float8, and multiplied by its scale again in its own
type. An ordinary product follows. On GPUs with FP8 units (NVIDIA's H100 and later) XLA recognizes
this pattern and multiplies the float8 numbers themselves, at twice the rate of bfloat16. Other
devices execute what is written, which takes more time than bfloat16 alone.

- Activations and weights are float8_e4m3fn (3 bits of mantissa), for precision. Gradients of
  outputs are float8_e5m2 (2 bits), for range. Their products, the gradients of activations and
  weights, ask for the highest precision: cuBLAS then adds in float32, and not in fewer bits.
- Scales are current: they follow from the largest magnitude of the tensor itself, which is read
  once more for that. Delayed scales follow from earlier steps and save that, but they are a state
  that checkpoints would have to hold, and they clip values that grow suddenly.
- Scales are powers of two, so that rounding to float8 is the only error: multiplied by the scale,
  the values are exact in bfloat16. This costs at most one bit of range.
- In the scan over the blocks, each matrix of each block has its own scale. On several devices the
  scale follows from the parts of all.

int8 is left out. H100 and H200 multiply it as fast as float8, and gradients need more range. It
could help sampling on devices without float8 (A100, TPU v5e and v6e), which nobody has measured
here.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

FORWARD_DTYPE, GRADIENT_DTYPE = jnp.float8_e4m3fn, jnp.float8_e5m2
# A device may replace a scale that is not a normal number by 0.
MIN_EXPONENT = -100

# Contracted axes of both factors, and their batch axes, as in `jax.lax.dot_general`.
Axes = tuple[tuple[tuple[int, ...], tuple[int, ...]], tuple[tuple[int, ...], tuple[int, ...]]]
# Values in float8, and their scale in the type of the computation.
Scaled = tuple[jax.Array, jax.Array]


def multiply_in_float8(
    x: Float[Array, "..."],
    kernel: Float[Array, "..."],
    axes: Any,
    precision: Any = None,
    out_sharding: Any = None,
) -> Float[Array, "..."]:
    """Multiply two arrays that are rounded to float8, as `jax.lax.dot_general` with these axes.

    In the backward pass the gradient of the output is rounded to float8 too. NaN or infinity in a
    factor gives NaN. The function has no forward-mode derivative.

    Args:
        x: Activations.
        kernel: Weights in the type of `x`.
        axes: Contracted axes of both, and their batch axes.
        precision: None: that of float8.
        out_sharding: None: that of the factors.

    Returns:
        The product in the type of `x`.

    Raises:
        ValueError: If a precision or a sharding is given.
    """
    if precision is not None or out_sharding is not None:
        raise ValueError("Products in float8 have no choice of precision or sharding.")
    contracted, batch = (tuple(map(tuple, pair)) for pair in axes)
    return _multiply(x, kernel, (contracted, batch))


def quantize_tensor(x: Float[Array, "..."], dtype: Any) -> Scaled:
    """Round an array to float8.

    Args:
        x: An array.
        dtype: A type of float8.

    Returns:
        Values, and a scale, a power of two in the type of `x`, which they are multiplied by.
    """
    magnitude = jnp.abs(x).max().astype(jnp.float32)
    # Less than two to the exponent, so that no scaled value is larger than the type's largest.
    _, exponent = jnp.frexp(magnitude / float(jnp.finfo(dtype).max))
    scale = jnp.ldexp(jnp.float32(1), jnp.maximum(exponent, MIN_EXPONENT))
    # inf / inf is NaN; without that, a device may convert infinity to the largest float8.
    scale = jnp.where(jnp.isfinite(magnitude), scale, magnitude)
    return (x.astype(jnp.float32) / scale).astype(dtype), scale.astype(x.dtype)


def dequantize_tensor(scaled: Scaled) -> Float[Array, "..."]:
    """Multiply the values by their scale, in its type."""
    values, scale = scaled
    return values.astype(scale.dtype) * scale


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _multiply(x: jax.Array, kernel: jax.Array, axes: Axes) -> jax.Array:
    return _multiply_forward(x, kernel, axes)[0]


def _multiply_forward(
    x: jax.Array, kernel: jax.Array, axes: Axes
) -> tuple[jax.Array, tuple[Scaled, Scaled]]:
    """Return the product, and its factors in float8, which are all that is kept."""
    factors = quantize_tensor(x, FORWARD_DTYPE), quantize_tensor(kernel, FORWARD_DTYPE)
    left, right = map(dequantize_tensor, factors)
    return jax.lax.dot_general(left, right, axes), factors


def _multiply_backward(
    axes: Axes, factors: tuple[Scaled, Scaled], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients to `x` and `kernel`, as if rounding had the derivative 1."""
    gradient = dequantize_tensor(quantize_tensor(gradient, GRADIENT_DTYPE))
    _, pull_back = jax.vjp(
        partial(jax.lax.dot_general, dimension_numbers=axes, precision="highest"),
        *map(dequantize_tensor, factors),
    )
    return pull_back(gradient)


_multiply.defvjp(_multiply_forward, _multiply_backward)
