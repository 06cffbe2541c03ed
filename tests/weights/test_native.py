import json
import struct

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from radiance.weights import checkpoint, native
from tests.helpers.toy_models import toy_model, toy_params

VARIANTS = {
    "velocity": dict(),
    "x0": dict(prediction="x0"),
    "x0_patch32": dict(prediction="x0", patch_embed="conv_half"),
    "sequential": dict(text_ids="sequential", masking="strict"),
    "registers": dict(registers=2),
    "nerf_linear": dict(head="nerf_linear"),
    "linear_patches": dict(head="linear"),
    "latent": dict(head="linear", patch=1, channels=8),
    "flux": dict(
        head="linear",
        patch=1,
        channels=8,
        modulation="per_block",
        pooled_dim=5,
        guidance_embed=True,
        masking="off",
    ),
    "per_block_nerf": dict(modulation="per_block", rope_theta=100.0),
    "shared": dict(modulation="shared", pooled_dim=5, guidance_embed=True),
    "shared_linear": dict(modulation="shared", head="linear", registers=1),
    "none": dict(modulation="none"),
    "none_linear": dict(modulation="none", head="linear"),
    "bottleneck": dict(patch_embed="bottleneck", bottleneck=5),
    "learned": dict(
        padding="learned", masking="off", text_refiner_blocks=2, modulation="none", head="linear"
    ),
    "no_doubles": dict(double_blocks=0),
    "no_singles": dict(single_blocks=0, mlp_ratio=2.5),
}
MODEL = toy_model()


def assert_equal(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.write_checkpoint(path, MODEL, toy_params(MODEL))
    return path


@pytest.mark.parametrize("variant", VARIANTS)
def test_written_parameters_are_read_back_exactly(variant, tmp_path):
    model = toy_model(**VARIANTS[variant])
    params, path = toy_params(model), tmp_path / "new" / "model.safetensors"
    checkpoint.write_checkpoint(path, model, params)
    for expected_model in (None, model):
        read_model, read_params = checkpoint.read_checkpoint(path, expected_model)
        assert read_model == model
        assert_equal(read_params, params)
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    stored = load_file(path)
    assert {k: v.shape for k, v in stored.items()} == native.native_layout(model)[0]
    assert sum(v.size for v in stored.values()) == sum(x.size for x in jax.tree.leaves(params))
    markers = [name for name in ("__x0__", "__32x32__", "__sequential__") if name in stored]
    expected = {
        "x0": ["__x0__"],
        "x0_patch32": ["__x0__", "__32x32__"],
        "sequential": ["__sequential__"],
    }
    assert markers == expected.get(variant, [])
    assert all(stored[m].shape == (0,) and stored[m].dtype == np.float32 for m in markers)


@pytest.mark.parametrize("modulation", ["shared", "none"])
@pytest.mark.parametrize("absent", ["double_blocks", "single_blocks"])
def test_learned_vectors_of_absent_blocks_are_written_and_read(modulation, absent, tmp_path):
    model = toy_model(modulation=modulation, **{absent: 0})
    checkpoint.write_checkpoint(tmp_path / "x.safetensors", model, toy_params(model))
    assert_equal(checkpoint.read_checkpoint(tmp_path / "x.safetensors")[1], toy_params(model))


def test_layouts_are_those_of_the_published_files(written):
    stored, p = load_file(written), jax.tree.map(np.asarray, toy_params(MODEL))
    d, image, single = MODEL.hidden, p["double"]["image"], p["single"]
    same = np.testing.assert_array_equal
    # [3·h·k, d], with 3 as the slowest of the fused axes and k as the fastest.
    qkv = stored["double_blocks.1.img_attn.qkv.weight"].reshape(3, MODEL.heads, MODEL.head_dim, d)
    same(qkv[2, 1, 5], image["attention"]["qkv"]["kernel"][1, :, 2, 1, 5])
    # [d, h·k]
    proj = stored["double_blocks.0.txt_attn.proj.weight"]
    same(
        proj[7, 3 + MODEL.head_dim], p["double"]["text"]["attention"]["proj"]["kernel"][0, 1, 3, 7]
    )
    same(stored["double_blocks.0.img_mlp.2.weight"], image["mlp"]["linear_out"]["kernel"][0].T)
    # linear1 is qkv, then the MLP; the inputs of linear2 are attention, then the MLP.
    linear1, linear2 = (
        stored["single_blocks.2.linear1.weight"],
        stored["single_blocks.2.linear2.weight"],
    )
    same(linear1[: 3 * d], single["attention"]["qkv"]["kernel"][2].reshape(d, -1).T)
    same(linear1[3 * d :], single["mlp"]["linear_in"]["kernel"][2].T)
    same(linear2[:, :d], single["attention"]["proj"]["kernel"][2].reshape(-1, d).T)
    same(linear2[:, d:], single["mlp"]["linear_out"]["kernel"][2].T)
    same(stored["single_blocks.2.linear1.bias"][3 * d :], single["mlp"]["linear_in"]["bias"][2])
    # Convolutions are [out, in, row, column].
    patch = p["patch_embed"]["kernel"].reshape(4, 4, 3, d)
    same(stored["img_in_patch.weight"][9, 2, 1, 3], patch[1, 3, 2, 9])
    same(
        stored["nerf_final_layer_conv.conv.weight"][2, 5, 0, 1],
        p["head"]["conv"]["kernel"][0, 1, 5, 2],
    )
    same(
        stored["distilled_guidance_layer.norms.1.scale"],
        p["modulation"]["layers"]["norm"]["scale"][1],
    )


def test_metadata_and_the_published_order_are_written(tmp_path):
    model, path = toy_model(prediction="x0"), tmp_path / "x.safetensors"
    checkpoint.write_checkpoint(path, model, toy_params(model), metadata={"step": "7"})
    header = read_header(path)
    assert header["__metadata__"]["step"] == "7"
    assert [k for k in header if k != "__metadata__"] == list(native.native_layout(model)[0])
    assert next(k for k in header if k != "__metadata__") == "__x0__"


def read_header(path):
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


def test_parameters_of_another_model_are_rejected(tmp_path):
    with pytest.raises((KeyError, ValueError)):
        checkpoint.write_checkpoint(
            tmp_path / "x.safetensors", MODEL, toy_params(toy_model(hidden=96, heads=4))
        )
    assert list(tmp_path.iterdir()) == []
