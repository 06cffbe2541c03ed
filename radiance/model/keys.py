"""Random keys for the initial values of layers."""

from typing import Any

import jax
from flax import nnx
from jaxtyping import PRNGKeyArray


class _KeyStream(nnx.RngStream):
    """Flax's stream of keys, whose count is a number of Python.

    Flax counts in an array. While a program is traced, each increment makes JAX write an error
    message that Flax discards. That took a third to two thirds of the time to trace toy networks.
    """

    num_keys = 0

    def __call__(self) -> PRNGKeyArray:
        """Return the next key; the keys are those of Flax's stream."""
        key = jax.random.fold_in(self.key[...], self.num_keys)
        self.num_keys += 1
        return key


def make_rngs(key: PRNGKeyArray) -> nnx.Rngs:
    """Make the argument `rngs` of layers from a key.

    Args:
        key: A single key.

    Returns:
        Streams that give the same keys as `nnx.Rngs(key)`.
    """
    rngs: Any = nnx.Rngs(key)  # the class declares none of its streams
    rngs.default = _KeyStream(key, tag="default")
    return rngs
