"""What the masking suite hangs on: with padding that says nothing and no text positions, all padding tokens are one, so `off` is `one_pad` with the
logarithm of their number on one key."""

import jax
import jax.numpy as jnp
import numpy as np

from radiance.model import transformer
from tests.helpers.toy_models import FLOAT32, toy_inputs, toy_model, toy_params

LENGTHS, WORDS = (1, 3, 5), 6


def counted(q, k, v, kv_len, backend):
    """Attention whose last visible key, the padding token, counts as often as there is padding."""
    keys = jnp.arange(q.shape[1])
    pads = WORDS - np.array(LENGTHS)
    bias = jnp.where(keys == kv_len[:, None] - 1, jnp.log(pads)[:, None], 0)[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, bias=bias, key_value_seq_lengths=kv_len)


def painted(masking: str, constant: bool) -> np.ndarray:
    model = toy_model(masking=masking)
    inputs = toy_inputs(model, LENGTHS, WORDS)
    if constant:
        padded = np.arange(WORDS) >= np.array(LENGTHS)[:, None]
        inputs["text"] = np.where(padded[..., None], inputs["text"][0, -1], inputs["text"])
    # Traced anew each time, for the attention is exchanged between them.
    return np.asarray(
        jax.jit(lambda params, inputs: transformer.bind_model(model, FLOAT32, params)(**inputs))(
            toy_params(toy_model()), inputs
        )
    )


def apart(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def test_constant_padding_is_one_token_that_counts_several_times(monkeypatch):
    off, other = painted("off", True), painted("off", False)
    plain = painted("one_pad", True)
    monkeypatch.setattr(transformer, "attention", counted)
    assert apart(painted("one_pad", True), off) < 2e-6
    assert apart(painted("one_pad", False), other) > 1e-2  # padding that differs is not one token
    assert apart(plain, off) > 1e-4  # and the count is what the mask takes away
