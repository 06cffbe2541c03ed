"""Products of float32 that are in float32: unless they are told to, a TPU multiplies in bfloat16 and a GPU in TF32."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps

import jax
import jax.numpy as jnp

EXACT_PRECISION = jax.lax.Precision.HIGHEST


def exact_in_float32(method: Callable) -> Callable:
    """A method of a module, all of whose products are exact where its `dtype` is float32."""

    @wraps(method)
    def wrapper(self, *args, **kwargs):
        with (
            jax.default_matmul_precision("highest")
            if jnp.dtype(self.dtype) == jnp.float32
            else nullcontext()
        ):
            return method(self, *args, **kwargs)

    return wrapper
