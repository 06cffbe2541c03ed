"""Products of float8 against NumPy, which rounds float64 numbers by arithmetic."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radiance import config
from radiance.base.trees import flatten_tree
from radiance.model.float8 import (
    FORWARD_DTYPE,
    GRADIENT_DTYPE,
    multiply_in_float8,
    quantize_tensor,
)
from radiance.model.lora import LoraKernel
from radiance.model.paths import is_block_matrix
from radiance.model.quantized import QuantizedKernel, quantize_matrix
from radiance.model.transformer import bind_model, expand_weights, make_abstract_params
from tests.helpers.toy_models import toy_inputs, toy_model
from tests.helpers.toy_runs import environment_of

# Mantissa bits, exponent of the smallest normal number, largest number.
FORMATS = {FORWARD_DTYPE: (3, -6, 448.0), GRADIENT_DTYPE: (2, -14, 57344.0)}
AXES = {
    "linear": (((2,), (0,)), ((), ())),
    "two_inputs": (((2, 3), (0, 1)), ((), ())),  # heads and channels, as of an output projection
}
SHAPES = {"linear": ((2, 5, 24), (24, 3, 2, 8)), "two_inputs": ((2, 5, 4, 6), (4, 6, 16))}
LINEAR = AXES["linear"]


def sample_normal(*shape, seed=0, scale=1.0):
    return (scale * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def round_to_float8(x, dtype):
    """Round to a float8 with a scale that is a power of two, and multiply by it again."""
    mantissa_bits, min_exponent, max_value = FORMATS[dtype]
    x = x.astype(np.float64)
    if not x.any():
        return x
    scale = 2 ** np.ceil(np.log2(np.abs(x).max() / max_value))
    exponents = np.floor(np.log2(np.abs(np.where(x == 0, 1, x / scale))))
    steps = 2 ** (np.maximum(exponents, min_exponent) - mantissa_bits)
    return np.rint(x / scale / steps) * steps * scale


def count_products(jaxpr) -> list[tuple[int, ...]]:
    """Return the shapes of the weights of all products in float8, also inside loops."""
    shapes = []
    for equation in jaxpr.eqns:
        if equation.primitive.name == "custom_vjp_call":
            if "float8" in str(equation.params["call_jaxpr"]):
                shapes.append(equation.invars[1].aval.shape)
            continue
        for inner in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
            if hasattr(inner, "jaxpr"):
                shapes += count_products(inner.jaxpr)
    return shapes


@pytest.mark.parametrize("dtype", FORMATS)
def test_rounding_agrees_with_arithmetic(dtype):
    """The numbers span the subnormal ones of float8; rounding to the nearest even is exact."""
    exponents = np.random.default_rng(2).uniform(-40, 0, (64, 64))
    x = sample_normal(64, 64) * np.exp2(exponents).astype(np.float32)
    values, scale = quantize_tensor(jnp.asarray(x), dtype)
    np.testing.assert_array_equal(
        np.asarray(values, np.float64) * float(scale), round_to_float8(x, dtype)
    )


@pytest.mark.parametrize("name", AXES)
def test_products_and_gradients_agree_with_numpy(name):
    axes, (x_shape, kernel_shape) = AXES[name], SHAPES[name]
    x, kernel = sample_normal(*x_shape, scale=30), sample_normal(*kernel_shape, seed=1, scale=0.02)
    product, pull_back = jax.vjp(
        lambda *pair: multiply_in_float8(*pair, axes), jnp.asarray(x), jnp.asarray(kernel)
    )
    gradient = sample_normal(*product.shape, seed=2, scale=1e-6)
    x_gradient, kernel_gradient = pull_back(jnp.asarray(gradient))

    num_inputs = int(np.prod(kernel_shape[: len(axes[0][1])]))
    x8 = round_to_float8(x, FORWARD_DTYPE).reshape(-1, num_inputs)
    kernel8 = round_to_float8(kernel, FORWARD_DTYPE).reshape(num_inputs, -1)
    gradient8 = round_to_float8(gradient, GRADIENT_DTYPE).reshape(len(x8), -1)
    for result, expected in (
        (product, x8 @ kernel8),
        (x_gradient, gradient8 @ kernel8.T),
        (kernel_gradient, x8.T @ gradient8),
    ):
        expected = expected.reshape(result.shape)
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    # Rounding is not nothing.
    exact = x.reshape(-1, num_inputs) @ kernel.reshape(num_inputs, -1)
    error = np.linalg.norm(product.reshape(exact.shape) - exact) / np.linalg.norm(exact)
    assert 0.01 < error < 0.1


@pytest.mark.parametrize("scale", [0, 1e-40, 1e-30, 1e30, 1e38])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_extreme_magnitudes_are_finite(scale, dtype):
    x = jnp.asarray(np.sign(sample_normal(1, 8, 8)) * np.float32(scale), dtype)
    product, pull_back = jax.vjp(
        lambda *pair: multiply_in_float8(*pair, LINEAR), x, jnp.eye(8, dtype=dtype)
    )
    np.testing.assert_allclose(product, x, rtol=0.07, atol=1e-29)
    for gradient in pull_back(jnp.full_like(x, 1e-3)):
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_what_is_not_finite_stays_visible(value, dtype):
    x = jnp.ones((1, 2, 4), dtype).at[0, 0, 0].set(value)
    product = multiply_in_float8(x, jnp.ones((4, 4), dtype), LINEAR)
    assert jnp.isnan(product[0, 0]).all()


def test_blocks_of_a_scan_have_their_own_scales_with_and_without_remat():
    """The magnitudes of the matrices differ more than float8's range; the result is Python's."""
    x = jnp.asarray(sample_normal(2, 4, 8))
    kernels = jnp.stack(
        [10.0**exponent * sample_normal(8, 8, seed=i) for i, exponent in enumerate((0, 9, -9, 4))]
    )

    def block(x, kernel):
        return jnp.sin(multiply_in_float8(x, kernel, LINEAR) / jnp.abs(kernel).max()), None

    def loop(x, kernels):
        for kernel in kernels:
            x = block(x, kernel)[0]
        return x.sum()

    def scan(policy, x, kernels):
        body = jax.checkpoint(block, policy=policy, prevent_cse=False) if policy else block
        return jax.lax.scan(body, x, kernels)[0].sum()

    expected = jax.grad(loop, (0, 1))(x, kernels)
    policies = jax.checkpoint_policies
    for policy in (
        None,
        policies.nothing_saveable,
        policies.dots_with_no_batch_dims_saveable,
    ):
        results = jax.jit(jax.grad(scan, (1, 2)), static_argnums=0)(policy, x, kernels)
        for result, reference in zip(results, expected):
            # A difference of one unit in the last place may round to another float8.
            difference = np.linalg.norm(result - reference) / np.linalg.norm(reference)
            assert difference < 0.01
    assert all(np.linalg.norm(expected[1][i]) > 0 for i in range(4))


def test_seeds_that_train_together_have_their_own_scales():
    x = jnp.stack([sample_normal(2, 3, 8), 1e6 * sample_normal(2, 3, 8, seed=1)])
    kernels = jnp.asarray(sample_normal(2, 8, 8, seed=2))
    multiply = lambda x, kernel: multiply_in_float8(x, kernel, LINEAR)  # noqa: E731
    for result, *pair in zip(jax.vmap(multiply)(x, kernels), x, kernels):
        np.testing.assert_allclose(result, multiply(*pair), rtol=1e-5)


@pytest.mark.parametrize("product_dtype", ["compute", "float8"])
def test_only_matrices_of_the_blocks_are_multiplied_in_float8(product_dtype):
    model = toy_model(text_refiner_blocks=1, head="nerf_linear")
    params = make_abstract_params(model)
    compute = config.Compute(product_dtype=product_dtype)
    jaxpr = jax.make_jaxpr(lambda params, x: bind_model(model, compute, params)(**x))(
        params, toy_inputs(model)
    )
    block_shapes = [
        x.shape[1:] for path, x in flatten_tree(params).items() if is_block_matrix(path)
    ]
    if product_dtype == "compute":
        assert "f8" not in str(jaxpr)
        assert "float8" not in str(jaxpr)
    else:
        assert sorted(count_products(jaxpr.jaxpr)) == sorted(block_shapes)


def test_adapters_and_quantized_weights_are_dequantized_before():
    """The base is multiplied in float8, its adapter is not."""
    kernel, down, up = sample_normal(32, 24), sample_normal(32, 3), sample_normal(3, 24)
    quantized = QuantizedKernel(*map(jnp.asarray, quantize_matrix(kernel, "int8")), (32, 24))
    module = nnx.Dict(
        linear=nnx.Linear(32, 24, dot_general=multiply_in_float8, rngs=nnx.Rngs(0), use_bias=False)
    )
    module.linear.kernel.set_value(LoraKernel(quantized, jnp.asarray(down), jnp.asarray(up)))
    x = jnp.asarray(sample_normal(2, 5, 32, seed=1))
    expected = multiply_in_float8(x, quantized.dequantize(), LINEAR) + x @ down @ up
    np.testing.assert_allclose(expand_weights(module).linear(x), expected, rtol=1e-5, atol=1e-5)


SHARDED_PROGRAM = """
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from radiance.model.float8 import multiply_in_float8

rng = np.random.default_rng(0)
# The largest values are on one device.
x, kernel = rng.integers(-8, 9, (4, 4, 8)).astype("f"), rng.integers(-8, 9, (8, 8)).astype("f")
x[3], kernel[7] = 100 * x[3], 100 * kernel[7]
mesh = Mesh(np.array(jax.devices()), "d")

def loss(x, kernel):
    product = multiply_in_float8(x, kernel, (((2,), (0,)), ((), ())))
    return (product ** 2).sum(), product

program = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
expected = program(x, kernel)
place = lambda value, spec: jax.device_put(value, NamedSharding(mesh, spec))
for kernel_spec in (P("d"), P(None, "d")):
    results = program(place(x, P("d")), place(kernel, kernel_spec))
    for result, reference in zip(jax.tree.leaves(results), jax.tree.leaves(expected)):
        np.testing.assert_allclose(result, reference, rtol=1e-6)
assert jax.device_count() == 2
"""


def test_two_devices_share_one_scale():
    process = subprocess.run(
        [sys.executable, "-c", SHARDED_PROGRAM],
        env=environment_of(2),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr


def test_contradicting_settings_are_rejected():
    with pytest.raises(config.ConfigError, match=r"compute\.product_dtype=float8 .*bfloat16"):
        config.Compute(product_dtype="float8", dtype="float32")
    changes = ["distill.kind=mean_flow", "distill.teacher=t", "compute.attention=xla"]
    changes += ["compute.product_dtype=float8", "distill.finite_difference=0"]
    with pytest.raises(config.ConfigError, match=r"product_dtype=float8 does not have"):
        config.override(config.Config(), changes)


def test_a_precision_is_rejected():
    with pytest.raises(ValueError, match="no choice of precision"):
        multiply_in_float8(jnp.ones((1, 2, 4)), jnp.ones((4, 4)), LINEAR, precision="highest")
