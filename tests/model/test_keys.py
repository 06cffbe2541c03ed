"""Keys of layers are those of Flax, whose stream is slow to trace."""

import jax
import jax.numpy as jnp
from flax import nnx

from radiance.model.keys import make_rngs


def make_keys(rngs: nnx.Rngs) -> jax.Array:
    return jnp.stack([jax.random.key_data(rngs.params()) for _ in range(3)])


def test_keys_are_those_of_flax():
    key = jax.random.key(3)
    ours, expected = make_keys(make_rngs(key)), make_keys(nnx.Rngs(key))
    assert (ours == expected).all()
    assert len({tuple(row.tolist()) for row in ours}) == 3
    assert (jax.jit(lambda key: make_keys(make_rngs(key)))(key) == expected).all()
