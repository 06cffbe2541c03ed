"""Attention maps equal attention computed from the queries and keys of the network."""

import jax
import numpy as np
import pytest

from radiance.evaluation.attention_maps import compute_attention_maps
from radiance.model import transformer
from radiance.model.attention import attention
from tests.helpers.toy_models import FLOAT32, toy_inputs, toy_model, toy_params

REGISTERS, N, WORDS = 2, 6, 6


@pytest.mark.parametrize("masking", ["one_pad", "off"])
def test_it_is_what_the_network_attends_to(masking, monkeypatch):
    model = toy_model(
        masking=masking,
        registers=REGISTERS,
        double_blocks=1,
        single_blocks=2,
        head="linear",
        text_refiner_blocks=1,
    )
    inputs = toy_inputs(model)
    del inputs["pooled"], inputs["guidance"]
    params, lengths = toy_params(model), inputs["lengths"]
    result = compute_attention_maps(params, **inputs, model=model, compute=FLOAT32)

    handed = []

    def recorded(q, k, v, kv_len, backend):
        if q.shape[1] > REGISTERS + WORDS:  # the text's own blocks have no image
            jax.debug.callback(
                lambda *arrays: handed.append([np.asarray(x, np.float64) for x in arrays]),
                q,
                k,
                ordered=True,
            )
        return attention(q, k, v, kv_len, backend)

    monkeypatch.setattr(transformer, "attention", recorded)
    jax.block_until_ready(
        jax.jit(lambda inputs: transformer.bind_model(model, FLOAT32, params)(**inputs))(inputs)
    )
    jax.effects_barrier()
    assert len(handed) == len(result.key_attention) == 3

    for block, (q, k) in enumerate(handed):
        for row, length in enumerate(lengths):
            seen = N + REGISTERS + (WORDS if masking == "off" else min(length + 1, WORDS))
            scores = np.einsum("nhk,mhk->hnm", q[row, :N], k[row, :seen]) / np.sqrt(q.shape[-1])
            p = np.exp(scores - scores.max(axis=-1, keepdims=True))
            p /= p.sum(axis=-1, keepdims=True)
            np.testing.assert_allclose(
                result.key_attention[block, row, :, :seen], p.mean(axis=1), atol=2e-6
            )
            assert not np.any(result.key_attention[block, row, :, seen:])
            np.testing.assert_allclose(
                result.padding_attention[block, row],
                p[:, :, N + REGISTERS + length :].sum(axis=-1),
                atol=2e-6,
            )
