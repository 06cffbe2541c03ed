"""LoRAs are merged into weights, applied without merging, and extracted from a difference."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.model.lora import LoraKernel
from radiance.model.quantized import QuantizedKernel
from radiance.weights import checkpoint, lora, lora_reading
from radiance.weights.convert import convert_checkpoint
from radiance.weights.lora import LoraPair, LoraWeights
from radiance.weights.lora_adapters import apply_loras
from radiance.weights.lora_extraction import extract_lora
from tests.helpers.toy_loras import (
    BF16,
    MODEL,
    make_checkpoint,
    module_shapes,
    read_message,
    relative_difference,
    toy_lora,
)
from tests.helpers.toy_models import apply, rows_of, toy_inputs, toy_model, toy_params

# --- merging --------------------------------------------------------------------------------------


def test_merging_adds_the_product():
    base, reads = make_checkpoint()
    added = toy_lora(modules=[m for i, m in enumerate(module_shapes(MODEL)) if i % 2])
    changed = lora.merge_lora(base, added, -0.7)
    assert not reads  # tensors are read on demand
    assert (changed.model, changed.shapes, changed.dtypes) == (
        base.model,
        base.shapes,
        base.dtypes,
    )
    for name, shape in base.shapes.items():
        before, after = base.get_tensor(name), changed.get_tensor(name)
        down, up, scale = added.pairs.get(
            name.removesuffix(".weight"), (np.zeros((1, 1)), np.zeros((1, 1)), 1.0)
        )
        delta = np.einsum("or,ri->oi", up.astype(float), down) * -0.7 * scale
        assert after.dtype == before.dtype
        assert after.shape == shape
        np.testing.assert_allclose(
            after, before + (delta.reshape(shape) if delta.size > 1 else 0), rtol=1e-6, atol=1e-6
        )
    assert max(reads.values()) == 2


@pytest.mark.parametrize(
    ("dtype", "stored", "result", "bound"),
    [
        (np.float32, "F32", "F32", 2e-7),
        (np.float16, "F16", "F16", 1e-3),
        (BF16, "BF16", "BF16", 8e-3),
        (np.float32, "Q8_0", "BF16", 8e-3),
        (ml_dtypes.float8_e4m3fn, "F8_E4M3", "BF16", 8e-3),
    ],
)
def test_opposite_strength_removes_the_lora(dtype, stored, result, bound):
    base, added = make_checkpoint(dtype=dtype, stored=stored)[0], toy_lora()
    changed = lora.merge_lora(base, added, 1.5)
    back = lora.merge_lora(changed, added, -1.5)
    for name in base.shapes:
        expected = result if name.removesuffix(".weight") in added.pairs else stored
        assert changed.dtypes[name] == expected
        before, after = base.get_tensor(name).astype(np.float32), back.get_tensor(name)
        is_changed = name.removesuffix(".weight") in added.pairs
        assert after.dtype == (np.float32 if is_changed else np.dtype(dtype))
        if before.size:
            # Each of the two roundings is relative to the sum.
            largest = max(
                np.abs(before).max(), np.abs(changed.get_tensor(name).astype(np.float32)).max()
            )
            assert np.abs(after.astype(np.float32) - before).max() <= bound * largest, name


def test_sum_that_its_type_cannot_hold_is_an_error(tmp_path):
    base, added = make_checkpoint(dtype=np.float16, stored="F16")[0], toy_lora(size=1000.0)
    with pytest.raises(CheckpointError, match="float16 cannot hold"):
        convert_checkpoint(lora.merge_lora(base, added), tmp_path / "merged.safetensors")


def test_sum_that_is_not_finite_names_the_lora():
    merged = lora.merge_lora(make_checkpoint()[0], toy_lora(size=1e10), 1e30)
    with pytest.raises(CheckpointError, match=r"at strength 1e\+30 gives txt_in"):
        merged.get_tensor("txt_in.weight")


@pytest.mark.parametrize("dtype", ["float32", "float16", None])
def test_merge_is_rounded_once(dtype, tmp_path):
    """The values of two merges are those of float32, rounded to the written type."""
    base, first, second = (
        make_checkpoint(dtype=BF16, stored="BF16")[0],
        toy_lora(),
        toy_lora(seed=1),
    )
    path = tmp_path / "merged.safetensors"
    merged = lora.merge_lora(lora.merge_lora(base, first, 0.3), second, -0.2)
    report = convert_checkpoint(merged, path, dtype=dtype)
    assert all(row.relative_error == 0 for row in report.rows.values()) == (dtype == "float32")
    written = checkpoint.open_checkpoint(path)
    for module in first.pairs:
        name = f"{module}.weight"
        exact = base.get_tensor(name).astype(np.float32)
        for added, strength in ((first, 0.3), (second, -0.2)):
            exact = exact + added.pairs[module].compute_delta(strength).reshape(exact.shape)
        values = written.get_tensor(name)
        np.testing.assert_array_equal(values, exact.astype(values.dtype), err_msg=name)


# --- without merging ------------------------------------------------------------------------------


CASES = {
    "pixels": (dict(), None),
    "latent": (dict(head="linear", patch=1, channels=8), None),
    "flux": (
        dict(
            head="linear",
            patch=1,
            channels=8,
            modulation="per_block",
            pooled_dim=5,
            guidance_embed=True,
            masking="off",
        ),
        None,
    ),
    "attention of some single blocks": (
        dict(),
        ["single_blocks.0.linear1", "single_blocks.2.linear1"],
    ),
    "output projections": (dict(), ["single_blocks.1.linear2", "double_blocks.1.txt_attn.proj"]),
    "conv_half": (
        dict(patch=8, patch_embed="conv_half"),
        ["img_in_patch", "nerf_blocks.1.param_generator", "nerf_final_layer_conv.conv"],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_applied_lora_equals_merged_lora(case):
    changes, modules = CASES[case]
    model = toy_model(**changes)
    inputs = rows_of(toy_inputs(model), slice(2))
    first, second = toy_lora(model, modules), toy_lora(model, seed=1)
    base = make_checkpoint(model)[0]
    params = base.load_params()
    plain = apply(model, params, inputs)
    both = [[(first, 0.8), (second, -0.5)]] if case in ("pixels", "latent", "flux") else []
    for loras in ([(first, 0.8)], *both):
        changed = base
        for one, strength in loras:
            changed = lora.merge_lora(changed, one, strength)
        expected = apply(model, changed.load_params(), inputs)
        adapted = apply(model, apply_loras(params, model, loras), inputs)
        assert relative_difference(adapted, expected) < 2e-5
        assert relative_difference(plain, expected) > 1e-2
    back = apply(model, apply_loras(params, model, [(first, 0.0)]), inputs)
    np.testing.assert_array_equal(back, plain)


def test_applying_does_not_copy_the_weights():
    params = toy_params(MODEL)
    rank3 = LoraPair(np.ones((3, 48), np.float32), np.ones((3 * 48 + 192, 3), np.float32), 2.0)
    rank1 = LoraPair(np.ones((1, 48), np.float32), np.ones((3 * 48 + 192, 1), np.float32))
    attention_only = rank1._replace(
        up=np.concatenate([np.ones((3 * 48, 1), np.float32), np.zeros((192, 1), np.float32)])
    )
    added = LoraWeights(MODEL, {"single_blocks.0.linear1": rank1, "single_blocks.2.linear1": rank3})
    changed = apply_loras(params, MODEL, [(added, 0.5)])
    after = changed["single"]["attention"]["qkv"]["kernel"]
    assert isinstance(after, LoraKernel)
    assert after.base is params["single"]["attention"]["qkv"]["kernel"]
    assert after.down.shape == (3, 48, 3)
    assert after.up.shape == (3, 3, 144)
    np.testing.assert_array_equal(np.unique(after.up[0], axis=1)[:, 0], [0.5, 0, 0])
    np.testing.assert_array_equal(after.up[1], 0)
    np.testing.assert_array_equal(after.up[2], 1)
    again = apply_loras(params, MODEL, [(added, 1.5)])["single"]["attention"]["qkv"]["kernel"]
    assert again.base is after.base
    np.testing.assert_array_equal(again.up, 3 * after.up)
    # All other leaves are the same arrays.
    same = jax.tree.map(
        lambda x, y: x is y, params, changed, is_leaf=lambda x: isinstance(x, LoraKernel)
    )
    assert sum(not x for x in jax.tree.leaves(same)) == 2
    half = apply_loras(
        params, MODEL, [(LoraWeights(MODEL, {"single_blocks.1.linear1": attention_only}), 1.0)]
    )
    assert (
        half["single"]["mlp"]["linear_in"]["kernel"]
        is params["single"]["mlp"]["linear_in"]["kernel"]
    )
    with pytest.raises(ValueError, match="have LoRAs already"):
        apply_loras(changed, MODEL, [(added, 1.0)])


@pytest.mark.parametrize("weight_format", ["int8", "q8_0", "float8_e4m3fn"])
def test_lora_applies_to_quantized_weights(weight_format):
    model = toy_model(hidden=64, rope_axes=(8, 12, 12))  # 32 divides the inputs, as q8_0 needs
    params = make_checkpoint(model)[0].load_params(weight_format=weight_format)
    added, inputs = toy_lora(model), rows_of(toy_inputs(model), slice(2))
    changed = apply_loras(params, model, [(added, 0.8)])
    kernel = changed["single"]["mlp"]["linear_out"]["kernel"]
    assert isinstance(kernel.base, QuantizedKernel)
    assert kernel.base is params["single"]["mlp"]["linear_out"]["kernel"]
    expanded = jax.tree.map(
        lambda x: x.dequantize() if isinstance(x, QuantizedKernel) else x,
        params,
        is_leaf=lambda x: isinstance(x, QuantizedKernel),
    )
    expected = lora.merge_lora(
        checkpoint.checkpoint_from_params(model, expanded, "expanded"), added, 0.8
    ).load_params()
    assert relative_difference(apply(model, changed, inputs), apply(model, expected, inputs)) < 2e-5


def test_lora_applies_to_bfloat16_weights():
    compute = config.Compute(dtype="bfloat16")
    base, added, inputs = make_checkpoint()[0], toy_lora(), rows_of(toy_inputs(MODEL), slice(2))
    params = base.load_params("bfloat16")
    changed = apply_loras(params, MODEL, [(added, 0.8)])
    assert changed["double"]["image"]["mlp"]["linear_in"]["kernel"].base.dtype == jnp.bfloat16
    assert changed["text_embed"]["kernel"].dtype == jnp.bfloat16
    exact = apply(MODEL, lora.merge_lora(base, added, 0.8).load_params(), inputs)
    merged = apply(
        MODEL, lora.merge_lora(base, added, 0.8).load_params("bfloat16"), inputs, compute
    )
    unmerged = apply(MODEL, changed, inputs, compute)
    assert relative_difference(unmerged, exact) < 1.5 * relative_difference(merged, exact)


# --- extraction -----------------------------------------------------------------------------------


def difference(a, b, module):
    return (
        b.get_tensor(f"{module}.weight").astype(np.float64) - a.get_tensor(f"{module}.weight")
    ).reshape(len(b.get_tensor(f"{module}.weight")), -1)


@pytest.mark.parametrize("rank", [1000, 5])
def test_extracted_lora_is_the_nearest_of_its_rank(rank):
    a, b = make_checkpoint(seed=0)[0], make_checkpoint(seed=1)[0]
    counts = []
    result = extract_lora(a, b, rank, on_progress=counts.append)
    extracted = result.lora
    assert extracted.pairs.keys() == module_shapes(MODEL, blocks_only=True).keys()
    assert extracted.model == MODEL
    explained = total = 0
    for module, pair in extracted.pairs.items():
        u, s, v = np.linalg.svd(difference(a, b, module), full_matrices=False)
        nearest = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert len(pair.down) == min(rank, len(s))
        assert pair.scale == 1
        assert np.abs(pair.compute_delta() - nearest).max() < 1e-6 * s[0]
        np.testing.assert_allclose(np.linalg.norm(pair.down), np.linalg.norm(pair.up), rtol=1e-5)
        assert result.explained_fractions[module] == pytest.approx(
            np.square(s[:rank]).sum() / np.square(s).sum(), abs=1e-7
        )
        explained, total = explained + np.square(s[:rank]).sum(), total + np.square(s).sum()
    assert result.total_explained_fraction == pytest.approx(explained / total, abs=1e-7)
    assert sum(counts) == sum(int(np.prod(shape)) for shape in a.shapes.values())
    # Each changed tensor is in the LoRA or in the remaining changes.
    assert result.remaining_changes.keys() == {
        name for name in a.shapes if name.removesuffix(".weight") not in extracted.pairs
    }
    bias = a.get_tensor("txt_in.bias")
    assert result.remaining_changes["txt_in.bias"] == pytest.approx(
        np.linalg.norm(b.get_tensor("txt_in.bias") - bias) / np.linalg.norm(bias), rel=1e-5
    )
    if rank == 1000:
        assert result.total_explained_fraction == pytest.approx(1, abs=1e-12)
        changed = lora.merge_lora(a, extracted)
        for module in extracted.pairs:
            np.testing.assert_allclose(
                changed.get_tensor(f"{module}.weight"),
                b.get_tensor(f"{module}.weight"),
                rtol=0,
                atol=1e-6,
            )


def test_merged_lora_is_extracted():
    a, added = (
        make_checkpoint()[0],
        toy_lora(modules=[*module_shapes(MODEL, blocks_only=True)][::3]),
    )
    result = extract_lora(a, lora.merge_lora(a, added, 0.5), 8)
    assert result.lora.pairs.keys() == added.pairs.keys() == result.explained_fractions.keys()
    assert not result.remaining_changes
    for module, pair in added.pairs.items():
        np.testing.assert_allclose(
            result.lora.pairs[module].compute_delta(), pair.compute_delta(0.5), rtol=0, atol=1e-6
        )
    assert result.total_explained_fraction == pytest.approx(1, abs=1e-9)


def test_selected_modules_are_extracted_but_never_the_approximator(tmp_path):
    a, b = make_checkpoint(seed=0)[0], make_checkpoint(seed=1)[0]
    result = extract_lora(a, b, 1000, select_module=lambda module: True)
    expected = {
        m
        for m in module_shapes(MODEL)
        if not m.startswith(("distilled_guidance_layer", "nerf_image_embedder"))
    }
    assert result.lora.pairs.keys() == expected
    assert "img_in_patch" in expected
    assert {
        "distilled_guidance_layer.in_proj.weight",
        "nerf_image_embedder.embedder.0.weight",
    } <= result.remaining_changes.keys()
    lora.write_lora(tmp_path / "lora.safetensors", result.lora, dtype="float32")
    changed = lora.merge_lora(a, lora_reading.read_lora(tmp_path / "lora.safetensors", MODEL))
    for module in expected:
        np.testing.assert_allclose(
            changed.get_tensor(f"{module}.weight"),
            b.get_tensor(f"{module}.weight"),
            rtol=0,
            atol=1e-6,
        )


def test_invalid_extraction_is_an_error():
    a = make_checkpoint()[0]
    broken = replace(
        a, get_tensor=lambda name: a.get_tensor(name) * (np.nan if name == "txt_in.weight" else 1)
    )
    cases = [
        (
            make_checkpoint(toy_model(masking="strict"))[0],
            4,
            "different models .*masking is 'one_pad' and 'strict'",
        ),
        (make_checkpoint()[0], 4, "nothing to extract"),
        (make_checkpoint(seed=1)[0], 0, "rank 0"),
        (broken, 4, "txt_in.weight holds values that are not finite"),
    ]
    for b, rank, expected in cases:
        with pytest.raises(CheckpointError, match=expected) as error:
            extract_lora(a, b, rank)
        read_message(error)
