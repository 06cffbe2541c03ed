"""Every spelling of a module in LoRA files is found, and parts for other models are counted."""

import time
from collections import Counter

import numpy as np
import pytest
from safetensors.numpy import save_file

from radiance.base.errors import CheckpointError
from radiance.weights import diffusers
from radiance.weights.lora_names import describe_foreign, list_targets, parse_name
from radiance.weights.lora_reading import read_lora
from tests.helpers.toy_loras import (
    LATENT,
    MODEL,
    assert_equal_loras,
    module_shapes,
    read_message,
    toy_lora,
)
from tests.helpers.toy_models import VARIANTS, toy_model


def write(path, tensors, metadata=None):
    tensors = {key: np.ascontiguousarray(x) for key, x in tensors.items()}
    save_file(tensors, path, metadata)
    return path


# --- spellings ------------------------------------------------------------------------------------

MODULE = "single_blocks.1.linear2"
SPELLINGS = [
    f"{prefix}{module}{names}"
    for prefix in (
        "",
        "diffusion_model.",
        "model.diffusion_model.",
        "base_model.model.",
        "base_model.model.transformer.",
        "transformer.base_model.model.",
        "transformer._orig_mod.",
        "_orig_mod.module.",
        "net.",
        "unet.",
    )
    for module in ("single_blocks.1.linear2", "single_transformer_blocks.1.proj_out")
    for names in (
        ".lora_A.weight .lora_B.weight",
        ".lora_A.default.weight .lora_B.default.weight",
        ".lora_A.my-style_2.weight .lora_B.my-style_2.weight",
        ".lora.lora_A.weight .lora.lora_B.weight",
        ".lora_A .lora_B",
        ".lora_down.weight .lora_up.weight",
        ".lora.down.weight .lora.up.weight",
        "_lora.down.weight _lora.up.weight",
        ".lora_linear_layer.down.weight .lora_linear_layer.up.weight",
    )
] + [
    f"{prefix}{module}{names}"
    for prefix in ("lora_unet_", "lora_transformer_", "lycoris_", "lora_prior_unet_")
    for module in ("single_blocks_1_linear2", "single_transformer_blocks_1_proj_out")
    for names in (
        ".lora_down.weight .lora_up.weight",
        ".lora_A.weight .lora_B.weight",
    )
]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spelling_does_not_matter(spelling, tmp_path):
    expected = toy_lora(LATENT, [MODULE], scale=1.5)
    (down, up, scale) = expected.pairs[MODULE]
    first, second = spelling.split(" ")
    base = next(first[: first.index(x)] for x in (".lora", "_lora.", ".lora_") if x in first)
    keys = {
        first: down,
        (base + second if second.startswith((".", "_")) else second): up,
        f"{base}.alpha": np.float32(scale * len(down)),
    }
    result = read_lora(write(tmp_path / "lora.safetensors", keys), LATENT)
    assert_equal_loras(result, expected)
    assert not result.notes


XLABS = {
    "double_blocks.1.processor.qkv_lora1": ("double_blocks.1.img_attn.qkv", slice(None)),
    "double_blocks.1.processor.qkv_lora2": ("double_blocks.1.txt_attn.qkv", slice(None)),
    "double_blocks.0.processor.proj_lora1": ("double_blocks.0.img_attn.proj", slice(None)),
    "double_blocks.0.processor.proj_lora2": ("double_blocks.0.txt_attn.proj", slice(None)),
    "single_blocks.2.processor.qkv_lora": ("single_blocks.2.linear1", slice(3 * LATENT.hidden)),
    "single_blocks.2.processor.proj_lora": ("single_blocks.2.linear2", slice(None)),
    "diffusion_model.single_blocks.0.linear1_qkv": (
        "single_blocks.0.linear1",
        slice(3 * LATENT.hidden),
    ),
    "unet.transformer_blocks.0.attn.processor.to_out": (
        "double_blocks.0.img_attn.proj",
        slice(None),
    ),
}


@pytest.mark.parametrize("name", XLABS)
def test_names_of_xlabs_and_comfyui(name, tmp_path):
    module, rows = XLABS[name]
    expected = np.zeros(module_shapes(LATENT)[module], np.float32)
    rng = np.random.default_rng(0)
    up = rng.standard_normal((len(expected[rows]), 2), np.float32)
    down = rng.standard_normal((2, expected.shape[1]), np.float32)
    expected[rows] = up @ down
    names = ("lora_down", "lora_up") if "linear1_qkv" in name else ("down", "up")
    if "to_out" in name:
        names = ("lora.down", "lora.up")
    keys = {f"{name}.{names[0]}.weight": down, f"{name}.{names[1]}.weight": up}
    result = read_lora(write(tmp_path / "lora.safetensors", keys), LATENT)
    np.testing.assert_allclose(result.pairs[module].compute_delta(), expected, rtol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_underscored_names_are_not_ambiguous(variant):
    """No two weights, and no two ranges of rows, have the same name in one spelling."""
    model = toy_model(**VARIANTS[variant])
    targets = list_targets(model)
    spellings = Counter()
    for module in module_shapes(model):
        try:
            names = diffusers.to_diffusers_names(f"{module}.weight")
        except KeyError:
            names = ()
        # `distilled_guidance_layer.in_proj` has the same name in both layouts.
        own = {module, *(name.removesuffix(".weight") for name in names)}
        spellings.update(name.replace(".", "_") for name in own)
        assert targets[module.replace(".", "_")].name == f"{module}.weight"
    assert max(spellings.values()) == 1
    assert spellings.keys() <= targets.keys()


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("transformer_blocks.1.norm1.linear", "double_blocks.1.img_mod.lin"),
        ("transformer_blocks.0.norm1_context.linear", "double_blocks.0.txt_mod.lin"),
        ("single_transformer_blocks.2.norm.linear", "single_blocks.2.modulation.lin"),
        ("time_text_embed.timestep_embedder.linear_2", "time_in.out_layer"),
        ("time_text_embed.text_embedder.linear_1", "vector_in.in_layer"),
        ("single_blocks.1._orig_mod.linear2", "single_blocks.1.linear2"),
    ],
)
def test_modules_of_flux(name, module, tmp_path):
    """A FLUX model has the modulation layers that a Chroma model skips."""
    expected = toy_lora(toy_model(**VARIANTS["flux"]), [module], scale=1.0)
    down, up, _ = expected.pairs[module]
    keys = {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
    file = write(tmp_path / "lora.safetensors", keys)
    assert_equal_loras(read_lora(file, expected.model), expected)


@pytest.mark.parametrize("text", ["model.", "lora_A.", "a.", "lora_te.", "_lora.", "processor."])
def test_long_names_take_no_time(text):
    start = time.monotonic()
    parse_name(text * 300_000 + "lora_A.weight")
    describe_foreign(text * 300_000)
    assert time.monotonic() - start < 5


# --- parts for other models -----------------------------------------------------------------------

X = "double_blocks.0.img_attn.proj"
PAIR = {
    f"diffusion_model.{X}.lora_A.weight": np.ones((2, 48), np.float32),
    f"diffusion_model.{X}.lora_B.weight": np.ones((48, 2), np.float32),
}
FOREIGN = {
    "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": "text encoders",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": "text encoders",
    "text_encoder.text_model.encoder.layers.0.q_proj.lora_A.weight": "text encoders",
    "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight": "text encoders",
    "text_encoders.t5xxl.transformer.encoder.block.0.lora_up.weight": "text encoders",
    "te.q.lora_A.weight": "text encoders",
    "bundle_emb.style.string_to_param.*": "embeddings",
    "emb_params": "embeddings",
    "lora_unet_double_blocks_0_img_mod_lin.lora_down.weight": "modules that this model does not",
    "transformer.time_text_embed.guidance_embedder.linear_1.lora_A.weight": "modules that this",
    "diffusion_model.double_blocks.7.img_attn.proj.lora_A.weight": "modules that this model",
    "transformer_blocks.0.norm1.linear.lora_magnitude_vector": "modules that this model",
    "double_blocks.0.img_attn.qkv.lora.lora_As": "no known part of a LoRA",
    "scalar": "no known part of a LoRA",
}


@pytest.mark.parametrize("key", FOREIGN)
def test_part_for_another_model_is_skipped_and_counted(key, tmp_path):
    file = write(tmp_path / "lora.safetensors", PAIR | {key: np.ones((2, 4), np.float32)})
    result = read_lora(file, MODEL)
    assert result.pairs.keys() == {X}
    (note,) = result.notes
    assert note.startswith(f"{file}: 2 of 3 tensors are used")
    assert f"(1 for {FOREIGN[key]}" in note


def test_one_line_counts_all_parts(tmp_path):
    foreign = {key: np.ones((2, 4), np.float32) for key in FOREIGN}
    wide = {"txt_in.lora_A.weight": np.ones((2, 7)), "txt_in.lora_B.weight": np.ones((48, 2))}
    file = write(tmp_path / "lora.safetensors", PAIR | foreign | wide)
    (note,) = read_lora(file, MODEL).notes
    for part in ("6 for text encoders", "2 for embeddings", "4 for modules that", "2 for no known"):
        assert part in note
    assert "2 for weights of another size" in note
    assert "\n" not in note
    with pytest.raises(CheckpointError, match="holds nothing for this model") as error:
        read_lora(write(tmp_path / "other.safetensors", foreign), MODEL)
    assert "6 for text encoders" in read_message(error)
    with pytest.raises(CheckpointError, match=r"lora_A.weight has shape \[2, 7\]"):
        read_lora(write(tmp_path / "wide.safetensors", foreign | wide), MODEL)


def test_lora_of_zeros_is_reported(tmp_path):
    zeros = {key: x * ("lora_A" in key) for key, x in PAIR.items()}
    for tensors in (zeros, PAIR | {f"diffusion_model.{X}.alpha": np.zeros((), np.float32)}):
        (note,) = read_lora(write(tmp_path / "lora.safetensors", tensors), MODEL).notes
        assert "changes nothing, because all of its products are zero" in note
