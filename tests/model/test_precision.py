"""What is float32 must not be multiplied in less, forwards or backwards. CPUs have one way to multiply it, so this is read from the program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from radiance import config
from radiance.model import autoencoder, transformer
from radiance.text import t5
from tests.helpers.toy_models import toy_model
from tests.helpers.toy_t5 import TOY

EXACT = (jax.lax.Precision.HIGHEST,) * 2
SIZES = autoencoder.Autoencoder(latent_channels=2, width=4, multipliers=(1, 2), blocks=1, groups=2)


def products(jaxpr):
    """All of a program, inside loops and calls too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from products(getattr(inner, "jaxpr", inner))


def gradients_of(model, dtype):
    """Of all of the network, and of the image."""
    compute = config.Compute(dtype=dtype, attention="xla", head_chunk_size=0)

    def loss(params, image, text):
        network = transformer.bind_model(model, compute, params)
        return jnp.square(network(image, text, jnp.full(2, 3), jnp.full(2, 0.5))).sum()

    side = 2 * model.patch
    image, text = (
        jnp.zeros((2, side, side, model.channels)),
        jnp.zeros((2, 5, model.text_dim), jnp.dtype(dtype)),
    )
    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
        transformer.make_abstract_params(model), image, text
    ).jaxpr


def tells(equation):
    return tuple(str(x.aval.dtype) for x in equation.invars), equation.params["precision"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(head="nerf_linear"),
        dict(head="linear"),
        dict(modulation="per_block"),
        dict(modulation="shared"),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_network(changes, dtype):
    found = [*map(tells, products(gradients_of(toy_model(**changes), dtype)))]
    exact = [precision for types, precision in found if set(types) == {"float32"}]
    assert exact
    assert set(exact) == {EXACT}
    others = [precision for types, precision in found if set(types) != {"float32"}]
    assert bool(others) == (dtype == "bfloat16")
    assert EXACT not in others


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_autoencoder(dtype):
    params = autoencoder.init_autoencoder_params(SIZES, jax.random.key(0))
    for way, x in (
        (autoencoder.encode_images, np.zeros((1, 8, 8, 3), np.float32)),
        (autoencoder.decode_latents, np.zeros((1, 2, 2, 8), np.float32)),
    ):
        found = [
            *map(
                tells,
                products(
                    jax.make_jaxpr(lambda x, way=way: way(SIZES, params, x, dtype=dtype))(x).jaxpr
                ),
            )
        ]
        assert sum(precision == EXACT for _, precision in found) == (
            len(found) if dtype == "float32" else 2
        )


def test_the_text_encoder():
    ids, lengths = jnp.zeros((1, 4), int), jnp.array([3])
    program = jax.make_jaxpr(lambda params: t5.bind_t5(TOY, "float32", params)(ids, lengths))(
        t5.make_abstract_t5(TOY)
    ).jaxpr
    assert {tells(equation)[1] for equation in products(program)} == {EXACT}
