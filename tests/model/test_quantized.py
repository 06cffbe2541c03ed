"""Quantized kernels: their errors, their memory, and the network's results with them."""

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.trees import flatten_tree
from radiance.model.lora import LoraKernel
from radiance.model.paths import is_block_matrix
from radiance.model.quantized import QuantizedKernel, quantize_matrix
from radiance.model.transformer import bind_model, expand_weights
from radiance.training.lora import attach_adapters, init_adapters
from radiance.weights.checkpoint import checkpoint_from_params
from tests.helpers.toy_models import apply, toy_inputs, toy_model, toy_params

SIZES = dict(hidden=64, rope_axes=(4, 14, 14), text_refiner_blocks=1)
MODEL = toy_model(**SIZES)
# rms error of a Gaussian matrix of 64 inputs
ERRORS = {"q8_0": 5.3e-3, "int8": 5.9e-3, "float8_e4m3fn": 2.7e-2}


def is_quantized(x):
    return isinstance(x, QuantizedKernel)


def dequantize(params):
    """Replace quantized leaves by arrays."""
    return jax.tree.map(
        lambda x: x.dequantize() if is_quantized(x) else x, params, is_leaf=is_quantized
    )


def add_noise(params, error):
    """Add white noise of a relative size to every matrix of the blocks."""
    rng = np.random.default_rng(1)
    leaves = [
        x + error * np.sqrt(np.mean(np.square(x))) * rng.standard_normal(x.shape, np.float32)
        if is_block_matrix(path)
        else x
        for path, x in flatten_tree(params).items()
    ]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def matrix(shape=(64, 96)):
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def relative(a, b):
    return float(np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b))


@pytest.mark.parametrize("weight_format", config.WEIGHT_FORMATS)
def test_quantization_errors_are_as_expected(weight_format):
    values, scales = quantize_matrix(matrix(), weight_format)
    result = QuantizedKernel(jnp.asarray(values), jnp.asarray(scales), (64, 2, 48)).dequantize()
    assert result.shape == (64, 2, 48)
    assert relative(result.reshape(64, 96), matrix()) == pytest.approx(
        ERRORS[weight_format], rel=0.1
    )


def test_q8_0_equals_ggml_bit_for_bit():
    """The matrix has zeros, and a block of zeros."""
    x = matrix()
    x[32:, 5] = 0
    x[3] = 0
    values, scales = quantize_matrix(x, "q8_0")
    theirs = gguf.quants.quantize(
        np.ascontiguousarray(x.T), gguf.GGMLQuantizationType.Q8_0
    ).reshape(96, 2, 34)
    np.testing.assert_array_equal(theirs[..., :2].copy().view(np.float16)[..., 0], scales.T)
    np.testing.assert_array_equal(theirs[..., 2:].view(np.int8).reshape(96, 64), values.T)


def test_fp8_values_do_not_change():
    x = matrix().astype(jnp.float8_e4m3fn)
    values, scales = quantize_matrix(x.astype(np.float32), "float8_e4m3fn")
    np.testing.assert_array_equal(
        QuantizedKernel(values, jnp.asarray(scales), x.shape).dequantize(), x.astype(np.float32)
    )


@pytest.mark.parametrize("weight_format", config.WEIGHT_FORMATS)
def test_zeros_stay_zeros(weight_format):
    values, scales = quantize_matrix(np.zeros((32, 3)), weight_format)
    np.testing.assert_array_equal(
        QuantizedKernel(values, jnp.asarray(scales), (32, 3)).dequantize(), np.zeros((32, 3))
    )


@pytest.mark.parametrize("weight_format", config.WEIGHT_FORMATS)
def test_the_network_computes_with_dequantized_kernels(weight_format):
    exact = toy_params(MODEL)
    params = checkpoint_from_params(MODEL, exact, "toy").load_params(weight_format=weight_format)
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
    assert {"/".join(key.key for key in path) for path, x in leaves if is_quantized(x)} == set(
        filter(is_block_matrix, flatten_tree(exact))
    )
    inputs = toy_inputs(MODEL)
    stored, expected = apply(MODEL, params, inputs), apply(MODEL, dequantize(params), inputs)
    np.testing.assert_allclose(stored, expected, rtol=0, atol=2e-5 * np.abs(expected).max())
    # The error is that of white noise of the same size in the same matrices.
    noisy = apply(MODEL, add_noise(exact, ERRORS[weight_format]), inputs)
    reference = np.asarray(apply(MODEL, exact, inputs))
    assert relative(stored, reference) < 1.5 * relative(noisy, reference)


def test_bytes_of_quantized_weights():
    """q8_0 takes 34 bytes for 32 weights; int8 and fp8 take one each, and four for an output."""
    params = checkpoint_from_params(MODEL, toy_params(MODEL), "toy")
    count = sum(
        x.size for path, x in flatten_tree(toy_params(MODEL)).items() if is_block_matrix(path)
    )
    for weight_format, per_weight in (("q8_0", 34 / 32), ("int8", 1.04), ("float8_e4m3fn", 1.04)):
        leaves = [
            x
            for x in jax.tree.leaves(
                params.load_params(weight_format=weight_format), is_leaf=is_quantized
            )
            if is_quantized(x)
        ]
        result = sum(x.values.nbytes + x.scales.nbytes for x in leaves)
        assert result == pytest.approx(per_weight * count, rel=0.02)


def test_one_block_is_dequantized_at_a_time():
    """Twelve more blocks need no more memory for activations and dequantized matrices."""

    def peak_memory(depth):
        model = toy_model(
            double_blocks=1,
            single_blocks=depth,
            head="linear",
            **(SIZES | dict(hidden=256, rope_axes=(16, 56, 56))),
        )
        params = checkpoint_from_params(model, toy_params(model), "toy").load_params(
            weight_format="q8_0"
        )
        program = jax.jit(
            lambda p, x: bind_model(model, config.Compute(dtype="float32"), p)(**x)
        ).lower(params, toy_inputs(model))
        return program.compile().memory_analysis().temp_size_in_bytes

    block = 4 * 256 * (3 * 256 + 4 * 256 + 256 + 4 * 256)  # bytes of a single block's matrices
    assert peak_memory(16) - peak_memory(4) < 2 * block


def test_dequantized_kernels_are_not_saved_for_the_gradient():
    """For the gradient of adapters twelve more blocks save their activations alone."""

    def peak_memory(depth):
        model = toy_model(
            double_blocks=0,
            single_blocks=depth,
            head="linear",
            modulation="none",
            **(SIZES | dict(hidden=256, rope_axes=(16, 56, 56))),
        )
        params = checkpoint_from_params(model, toy_params(model), "toy").load_params(
            weight_format="q8_0"
        )
        lora = config.Lora(rank=2)
        adapters = init_adapters(model, lora, jax.random.key(0))

        def loss(adapters, params, x):
            return jnp.square(
                bind_model(
                    model, config.Compute(dtype="float32"), attach_adapters(params, adapters, lora)
                )(**x)
            ).sum()

        return (
            jax.jit(jax.grad(loss))
            .lower(adapters, params, toy_inputs(model))
            .compile()
            .memory_analysis()
            .temp_size_in_bytes
        )

    block = 4 * 256 * (3 * 256 + 4 * 256 + 256 + 4 * 256)  # bytes of a single block's matrices
    assert peak_memory(16) - peak_memory(4) < 12 * block / 2


def test_inputs_that_do_not_divide_into_blocks_are_an_error():
    with pytest.raises(ValueError, match="48 inputs do not divide into blocks of 32"):
        quantize_matrix(np.zeros((48, 3)), "q8_0")
    model = toy_model()
    with pytest.raises(CheckpointError, match=r"48 inputs.*use int8"):
        checkpoint_from_params(model, toy_params(model), "toy").load_params(weight_format="q8_0")


@pytest.mark.parametrize("quantized", [False, True])
def test_lora_layers_add_their_adapters(quantized):
    x, down, up = matrix(), matrix((64, 3)), matrix((3, 96))
    base = (
        QuantizedKernel(*map(jnp.asarray, quantize_matrix(x, "int8")), (64, 96))
        if quantized
        else jnp.asarray(x)
    )
    module = nnx.Dict(
        changed=nnx.Linear(64, 96, rngs=nnx.Rngs(0)), same=nnx.Linear(64, 2, rngs=nnx.Rngs(1))
    )
    module.changed.kernel.set_value(LoraKernel(base, jnp.asarray(down), jnp.asarray(up)))
    inputs = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 64), np.float32))
    expanded = expand_weights(module)
    expected = inputs @ ((np.asarray(base.dequantize()) if quantized else x) + down @ up)
    np.testing.assert_allclose(expanded.changed(inputs), expected, rtol=1e-5, atol=1e-3)
    np.testing.assert_array_equal(expanded.same(inputs), module.same(inputs))
    assert isinstance(module.changed.kernel.get_value(), LoraKernel)  # it did not change
