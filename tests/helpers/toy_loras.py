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


def module_shapes(model, blocks_only=False):
    """Return the shape of each native module's weight."""
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
    """Return pairs for `modules` (None: all), with ranks 1 to 4 and scales other than 1."""
    rng, shapes = np.random.default_rng(seed), module_shapes(model)
    pairs = {}
    for i, module in enumerate(modules or shapes):
        out, rank, inputs = shapes[module][0], 1 + i % 4, int(np.prod(shapes[module][1:]))
        down, up = (
            rng.standard_normal((rank, inputs), np.float32),
            rng.standard_normal((out, rank), np.float32),
        )
        pairs[module] = LoraPair(size * down, size * up, (0.5 + i % 3) if scale is None else scale)
    return LoraWeights(model, pairs)


def assert_equal_loras(lora, expected):
    assert lora.pairs.keys() == expected.pairs.keys()
    for module, (down, up, scale) in expected.pairs.items():
        np.testing.assert_array_equal(lora.pairs[module].down, down, err_msg=module)
        np.testing.assert_array_equal(lora.pairs[module].up, up, err_msg=module)
        assert lora.pairs[module].scale == pytest.approx(scale, rel=1e-6)


def make_checkpoint(model=MODEL, seed=0, dtype=np.float32, stored="F32"):
    """Return a checkpoint of toy weights, and a counter of the reads of each tensor."""
    shapes, get_tensor = native.params_to_native(model, toy_params(model, seed))
    reads = Counter()

    def read_counted(name):
        reads[name] += 1
        return get_tensor(name).astype(dtype)

    return checkpoint.Checkpoint(
        model, shapes, read_counted, dict.fromkeys(shapes, stored), "toy"
    ), reads


def relative_difference(x, expected):
    x, expected = (np.asarray(values, np.float64) for values in (x, expected))
    return np.abs(x - expected).max() / np.abs(expected).max()


def read_message(error):
    """Return the message, which must be one line with a period."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text
