"""LoRA files and checkpoints of toy models, for tests."""

from collections import Counter

import ml_dtypes
import numpy as np
import pytest

from radiance.weights import checkpoint, native
from radiance.weights.lora import LoraPair, LoraWeights
from tests.helpers.toy_models import toy_model, toy_params

MODEL = toy_model()
LATENT = toy_model(head="linear", patch=1, channels=8)
BF16 = ml_dtypes.bfloat16


def shapes_of(model, blocks_only=False):
    """Native module → shape of its weight."""
    shapes = {
        n.removesuffix(".weight"): s
        for n, s in native.native_layout(model)[0].items()
        if n.endswith(".weight") and len(s) > 1
    }
    return {
        m: s
        for m, s in shapes.items()
        if not blocks_only or (m.startswith(("double", "single")) and "mod" not in m)
    }


def toy_lora(model=MODEL, modules=None, seed=0, size=0.1, scale=None):
    """Pairs for `modules` (all when None), of ranks 1 to 4 and scales that are not 1."""
    draw, shapes = np.random.default_rng(seed), shapes_of(model)
    pairs = {}
    for i, module in enumerate(modules or shapes):
        out, rank, inputs = shapes[module][0], 1 + i % 4, int(np.prod(shapes[module][1:]))
        down, up = (
            draw.standard_normal((rank, inputs), np.float32),
            draw.standard_normal((out, rank), np.float32),
        )
        pairs[module] = LoraPair(size * down, size * up, (0.5 + i % 3) if scale is None else scale)
    return LoraWeights(model, pairs)


def assert_same(found, expected):
    assert found.pairs.keys() == expected.pairs.keys()
    for module, (down, up, scale) in expected.pairs.items():
        np.testing.assert_array_equal(found.pairs[module].down, down, err_msg=module)
        np.testing.assert_array_equal(found.pairs[module].up, up, err_msg=module)
        assert found.pairs[module].scale == pytest.approx(scale, rel=1e-6)


def in_memory(model=MODEL, seed=0, dtype=np.float32, stored="F32"):
    """A checkpoint of toy weights in a type, and how often each tensor was asked for."""
    shapes, tensor = native.params_to_native(model, toy_params(model, seed))
    asked = Counter()

    def counted(name):
        asked[name] += 1
        return tensor(name).astype(dtype)

    return checkpoint.Checkpoint(
        model, shapes, counted, dict.fromkeys(shapes, stored), "toy"
    ), asked


def relative(found, expected):
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.abs(found - expected).max() / np.abs(expected).max()


def sentence(error):
    """The message, which must be one line that ends."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text
