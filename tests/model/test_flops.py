"""Counted operations against the compiler's and against published numbers."""

import jax
import pytest

from radiance.model.flops import forward_flops, training_flops
from radiance.model.transformer import bind_model, make_abstract_params
from tests.helpers.toy_models import FLOAT32, toy_inputs, toy_model

# Wide enough for other operations than matrix products to be few; one block of each kind, because
# the compiler counts the body of a loop once.
WIDE = dict(
    hidden=256, heads=4, rope_axes=(16, 24, 24), double_blocks=1, single_blocks=1, text_dim=64,
    approximator_hidden=128, nerf_hidden=16, patch=8,
)  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [
        dict(nerf_depth=1, approximator_depth=2),
        dict(
            nerf_depth=1,
            head="nerf_linear",
            modulation="per_block",
            pooled_dim=32,
            guidance_embed=True,
        ),
        dict(head="linear", patch_embed="conv_half", modulation="shared", registers=3),
        dict(head="linear", patch=1, channels=16, modulation="none"),
        dict(
            head="linear",
            patch_embed="bottleneck",
            bottleneck=200,
            modulation="none",
            registers=40,
            text_refiner_blocks=1,
        ),
    ],
    ids=["approximator", "per_block", "shared", "none", "bottleneck"],
)
def test_counts_equal_the_compilers(changes):
    model = toy_model(**(WIDE | changes))
    inputs = toy_inputs(model, lengths=(5,), words=24, rows=8, columns=6)
    count = forward_flops(model, 8 * model.patch, 6 * model.patch, 24)
    program = jax.jit(lambda params, inputs: bind_model(model, FLOAT32, params)(**inputs)).lower(
        make_abstract_params(model), inputs
    )
    assert program.cost_analysis()["flops"] == pytest.approx(count, rel=0.08)
    assert training_flops(model, 8 * model.patch, 6 * model.patch, 24) == 3 * count
    assert (
        training_flops(model, 8 * model.patch, 6 * model.patch, 24, frozen_base=True) == 2 * count
    )


def test_the_count_of_the_published_model():
    """FLUX's blocks take 74.4 TFLOP at 1024² with 512 text tokens; the pixel head adds to it."""
    from radiance import config

    trunk = forward_flops(config.MODELS["chroma1-base"], 64, 64, 512)
    assert trunk == pytest.approx(74.4e12, rel=0.02)
    assert 1.0 < forward_flops(config.MODELS["chroma1-radiance"], 1024, 1024, 512) / trunk < 1.2
