"""Exact float32 products: by default a TPU multiplies float32 in bfloat16, and a GPU in TF32."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import jax
import jax.numpy as jnp

EXACT_PRECISION = jax.lax.Precision.HIGHEST


def exact_in_float32(method: Callable) -> Callable:
    """Wrap a module's method so that its products are exact if the module's `dtype` is float32.

    Args:
        method: A method of an object with an attribute `dtype`.

    Returns:
        The method with the highest precision of matrix products for float32, and with JAX's
        default precision for other types.
    """

    @wraps(method)
    def wrapper(self, *args, **kwargs):
        is_float32 = jnp.dtype(self.dtype) == jnp.float32
        with jax.default_matmul_precision("highest") if is_float32 else nullcontext():
            return method(self, *args, **kwargs)

    return wrapper
