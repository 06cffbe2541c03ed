"""An assumption of the masking suite: constant padding tokens act as one.

Without text positions, `off` is then `one_pad` with the logarithm of their number on one key.
"""

import jax
import jax.numpy as jnp
import numpy as np

from radiance.model import transformer
from tests.helpers.toy_models import FLOAT32, toy_inputs, toy_model, toy_params

LENGTHS, NUM_TOKENS = (1, 3, 5), 6


def attend_with_count(q, k, v, kv_len, backend):
    """Attend with the last visible key, the padding token, counted once per padding token."""
    keys = jnp.arange(q.shape[1])
    pads = NUM_TOKENS - np.array(LENGTHS)
    bias = jnp.where(keys == kv_len[:, None] - 1, jnp.log(pads)[:, None], 0)[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, bias=bias, key_value_seq_lengths=kv_len)


def compute_velocity(masking: str, constant: bool) -> np.ndarray:
    model = toy_model(masking=masking)
    inputs = toy_inputs(model, LENGTHS, NUM_TOKENS)
    if constant:
        padded = np.arange(NUM_TOKENS) >= np.array(LENGTHS)[:, None]
        inputs["text"] = np.where(padded[..., None], inputs["text"][0, -1], inputs["text"])
    # Compiled again each time, because the tests replace the attention.
    return np.asarray(
        jax.jit(lambda params, inputs: transformer.bind_model(model, FLOAT32, params)(**inputs))(
            toy_params(toy_model()), inputs
        )
    )


def relative_distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_constant_padding_is_one_token_that_counts_several_times(monkeypatch):
    off, other = compute_velocity("off", True), compute_velocity("off", False)
    plain = compute_velocity("one_pad", True)
    monkeypatch.setattr(transformer, "attention", attend_with_count)
    assert relative_distance(compute_velocity("one_pad", True), off) < 2e-6
    assert (
        relative_distance(compute_velocity("one_pad", False), other) > 1e-2
    )  # different padding tokens are not one
    assert relative_distance(plain, off) > 1e-4  # the mask removes the count
