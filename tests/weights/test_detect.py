import json
from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.model.pixel_head import HEADS
from radiance.weights import detect, native
from radiance.weights.heads import HEAD_FORMATS
from tests.helpers.toy_files import sentence
from tests.helpers.toy_models import toy_model

MODEL = toy_model()
WIDE = dict(
    channels=3,
    hidden=256,
    heads=2,
    double_blocks=2,
    single_blocks=3,
    text_dim=96,
    approximator_hidden=40,
    approximator_depth=2,
    nerf_hidden=8,
    nerf_mlp_ratio=2,
    nerf_depth=2,
    nerf_freqs=3,
)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(prediction="x0"),
        dict(prediction="x0", patch=32, patch_embed="conv_half"),
        dict(patch=32),
        dict(text_ids="sequential", registers=3),
        dict(head="nerf_linear", nerf_mlp_ratio=3, nerf_freqs=8),
        dict(head="linear", patch=8),
        dict(head="linear", patch=1, channels=64, approximator_depth=5, approximator_dim=32),
        dict(
            head="linear",
            patch=1,
            channels=64,
            modulation="per_block",
            masking="off",
            pooled_dim=768,
            guidance_embed=True,
        ),
        dict(
            head="linear",
            patch=1,
            channels=64,
            modulation="per_block",
            masking="off",
            pooled_dim=768,
        ),
        dict(double_blocks=0, mlp_ratio=3.0),
        dict(patch_embed="bottleneck", bottleneck=7, patch=8, head="linear", text_refiner_blocks=2),
        dict(padding="learned", masking="off", modulation="none", head="linear"),
        dict(single_blocks=0, mlp_ratio=8 / 3, hidden=768, heads=6),
    ],
    ids=lambda changes: "-".join(changes) or "plain",
)
def test_a_model_is_detected_from_shapes(changes):
    model = config.Model(**(WIDE | changes))
    if model.modulation in (
        "per_block",
        "none",
    ):  # such files do not determine these fields, which keep their defaults
        model = replace(model, approximator_hidden=5120, approximator_depth=5)
    if model.head == "linear":
        model = replace(model, nerf_hidden=64, nerf_mlp_ratio=4, nerf_depth=4, nerf_freqs=8)
    assert detect.detect_model(native.native_layout(model)[0]) == model


def test_detection_needs_known_fields_that_shapes_do_not_determine():
    shapes = native.native_layout(MODEL)[0]
    with pytest.raises(CheckpointError, match="Heads of 24 channels") as error:
        detect.detect_model(shapes)
    sentence(error)
    assert detect.detect_model(shapes, rope_axes=MODEL.rope_axes) == replace(
        MODEL, approximator_depth=5
    )
    metadata = {detect.MODEL_KEY: json.dumps(config.to_dict(MODEL))}
    assert detect.detect_model(shapes, metadata, rope_theta=5.0) == replace(MODEL, rope_theta=5.0)


def test_a_checkpoint_without_an_essential_tensor_is_incomplete():
    shapes = dict(native.native_layout(config.Model(**WIDE))[0])
    for removed in ("distilled_guidance_layer.in_proj.bias", "nerf_blocks.0.param_generator.bias"):
        assert detect.detect_model(
            {k: v for k, v in shapes.items() if k != removed}
        ) == config.Model(**WIDE)  # check_shapes reports these
    for removed in (
        "img_in_patch.weight",
        "nerf_blocks.0.param_generator.weight",
        "double_blocks.0.img_mlp.0.weight",
    ):
        with pytest.raises(
            CheckpointError, match=f"has no {removed}: the file is incomplete"
        ) as error:
            detect.detect_model({k: v for k, v in shapes.items() if k != removed})
        sentence(error)


@pytest.mark.parametrize(
    ("name", "message"),
    {
        "dec_net.cond_embed.weight": "Zeta-Chroma",
        "encoder.block.0.layer.0.SelfAttention.q.weight": "--text-encoder",
        "enc.blk.0.attn_k.weight": "--text-encoder",
        "first_stage_model.decoder.conv_in.weight": "--autoencoder",
        "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": "--lora",
        "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": "--lora",
        "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": "Stable Diffusion 3",
        "model.diffusion_model.input_blocks.0.0.weight": "a Stable Diffusion checkpoint",
        "transformer_blocks.0.attn.to_q.weight": "not Chroma's",
        "lora_unet_double_blocks_0_img_attn_qkv.hada_w1_a": "is a LoRA",
        "text_model.encoder.layers.0.self_attn.q_proj.weight": "CLIP",
        "model.layers.0.self_attn.q_proj.weight": "a language model",
        "double_stream_modulation_img.lin.weight": "FLUX.2",
        "layers.0.attention.qkv.cap_embedder.1.weight": "Z-Image",
        "blocks.0.cross_attn.norm_k.weight": "Wan",
        "wte.weight": "not a Chroma, Radiance or FLUX checkpoint",
    }.items(),
)
def test_other_kinds_of_files_are_named(name, message):
    with pytest.raises(CheckpointError, match=message) as error:
        detect.detect_model({name: (4, 4)}, origin="x.safetensors")
    assert sentence(error).startswith("x.safetensors is ")


@pytest.mark.parametrize(
    "metadata",
    [
        '{"hiden": 3}',
        "[]",
        "{",
        '{"hidden": NaN}',
        '{"mlp_ratio": Infinity}',
        '{"mlp_ratio": NaN}',
        '{"hidden": 1' + "0" * 400 + "}",
        '{"hidden": 1' + "0" * 5000 + "}",
        "[" * 100_000,
        '{"rope_axes": ["16", 56, 56]}',
        '{"patch": true}',
        '{"head": ["nerf_conv"]}',
    ],
    ids=lambda text: text[:20],
)
def test_metadata_that_cannot_be_parsed_are_rejected(metadata):
    with pytest.raises(
        CheckpointError, match="describes its model in a way that this version does not know"
    ) as error:
        detect.detect_model({"txt_in.weight": (3, 2)}, {detect.MODEL_KEY: metadata})
    sentence(error)


@pytest.mark.parametrize(
    "field", ["double_blocks", "single_blocks", "nerf_depth", "approximator_depth"]
)
def test_metadata_of_a_model_too_deep_for_the_file_are_rejected(field):
    """Making the layout of such a model block by block would never end."""
    metadata = json.dumps(config.to_dict(replace(MODEL, **{field: 10**9})))
    with pytest.raises(CheckpointError, match="deeper than its") as error:
        detect.detect_model(native.native_layout(MODEL)[0], {detect.MODEL_KEY: metadata})
    sentence(error)


def test_tensors_with_empty_axes_are_rejected():
    shapes = native.native_layout(config.Model(**WIDE))[0]
    for name in (
        "double_blocks.0.img_attn.norm.query_norm.scale",
        "txt_in.weight",
        "nerf_image_embedder.embedder.0.weight",
    ):
        with pytest.raises(CheckpointError) as error:
            detect.detect_model(shapes | {name: (0,) * len(shapes[name])})
        sentence(error)


def test_two_models_in_one_file_are_rejected():
    with pytest.raises(
        CheckpointError, match=r"are both norm.scale: the file contains more than one model"
    ):
        detect.canonical_names({"norm.scale": (), "norm.weight": ()})


def test_every_head_has_native_tensors():
    assert HEAD_FORMATS.keys() == HEADS.keys()
    assert set(HEAD_FORMATS) == set(get_args(get_type_hints(config.Model)["head"]))
