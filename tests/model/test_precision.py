"""Products of float32 are exact, forwards and backwards.

CPUs always multiply float32 exactly, so the tests read the precision from the program.
"""

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


def iterate_products(jaxpr):
    """Iterate over the matrix products of a program, also inside loops and calls."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation
        for inner in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                yield from iterate_products(getattr(inner, "jaxpr", inner))


def make_gradient_program(model, dtype):
    """Make the program of the gradient to all parameters and the image."""
    compute = config.Compute(dtype=dtype, attention="xla", head_chunk_size=0)

    def loss(params, image, text):
        network = transformer.bind_model(model, compute, params)
        return jnp.square(network(image, text, jnp.full(2, 3), jnp.full(2, 0.5))).sum()

    size = 2 * model.patch
    image, text = (
        jnp.zeros((2, size, size, model.channels)),
        jnp.zeros((2, 5, model.text_dim), jnp.dtype(dtype)),
    )
    return jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(
        transformer.make_abstract_params(model), image, text
    ).jaxpr


def read_precision(equation):
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
def test_products_of_the_network(changes, dtype):
    products = [
        *map(read_precision, iterate_products(make_gradient_program(toy_model(**changes), dtype)))
    ]
    exact = [precision for types, precision in products if set(types) == {"float32"}]
    assert exact
    assert set(exact) == {EXACT}
    others = [precision for types, precision in products if set(types) != {"float32"}]
    assert bool(others) == (dtype == "bfloat16")
    assert EXACT not in others


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_of_the_autoencoder(dtype):
    params = autoencoder.init_autoencoder_params(SIZES, jax.random.key(0))
    for function, x in (
        (autoencoder.encode_images, np.zeros((1, 8, 8, 3), np.float32)),
        (autoencoder.decode_latents, np.zeros((1, 2, 2, 8), np.float32)),
    ):
        products = [
            *map(
                read_precision,
                iterate_products(
                    jax.make_jaxpr(
                        lambda x, function=function: function(SIZES, params, x, dtype=dtype)
                    )(x).jaxpr
                ),
            )
        ]
        assert sum(precision == EXACT for _, precision in products) == (
            len(products) if dtype == "float32" else 2
        )


def test_products_of_the_text_encoder():
    ids, lengths = jnp.zeros((1, 4), int), jnp.array([3])
    program = jax.make_jaxpr(lambda params: t5.bind_t5(TOY, "float32", params)(ids, lengths))(
        t5.make_abstract_t5(TOY)
    ).jaxpr
    assert {read_precision(equation)[1] for equation in iterate_products(program)} == {EXACT}
