import json
import re
from dataclasses import replace

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from radiance import config
from radiance.base.errors import CheckpointError
from radiance.base.trees import flatten_tree
from radiance.weights import checkpoint, diffusers, native
from radiance.weights.detect import MODEL_KEY
from radiance.weights.opening import open_tensors
from tests.helpers.toy_files import KNOWN, LATENT, PIXELS, published, save, sentence, stored
from tests.helpers.toy_models import toy_model, toy_params

MODEL = toy_model()
X0_PATCH32 = toy_model(prediction="x0", patch_embed="conv_half")
FLUX = toy_model(
    head="linear",
    patch=1,
    channels=8,
    modulation="per_block",
    pooled_dim=5,
    guidance_embed=True,
    masking="off",
)


def assert_equal(params, expected):
    jax.tree.map(np.testing.assert_array_equal, params, expected)


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "model.safetensors"
    checkpoint.write_checkpoint(path, MODEL, toy_params(MODEL))
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("model", [X0_PATCH32, FLUX], ids=["x0_patch32", "flux"])
def test_a_half_precision_file_is_written_back_byte_for_byte(model, dtype, tmp_path):
    """The source is made without our writer."""
    source = save(tmp_path / "source.safetensors", published(model, dtype))
    _, params = checkpoint.read_checkpoint(source, model)
    assert all(x.dtype == np.float32 for x in jax.tree.leaves(params))
    checkpoint.write_checkpoint(tmp_path / "ours.safetensors", model, params, dtype)
    assert stored(tmp_path / "ours.safetensors") == stored(source)


def test_leaves_have_the_requested_type(tmp_path):
    """All but the pixel embedder are bfloat16, as in the published files."""
    tensors = published(PIXELS, "float32")
    opened = checkpoint.open_checkpoint(save(tmp_path / "x.safetensors", tensors, PIXELS))
    assert (opened.model, opened.format, opened.dtypes["txt_in.bias"]) == (PIXELS, "native", "F32")
    leaves = flatten_tree(opened.load_params("bfloat16"))
    assert all(
        x.dtype == ("float32" if path.startswith("head/embedder") else "bfloat16")
        for path, x in leaves.items()
    )
    assert_array_equal = np.testing.assert_array_equal
    assert_array_equal(
        leaves["text_embed/kernel"], tensors["txt_in.weight"].T.astype(ml_dtypes.bfloat16)
    )
    assert_array_equal(
        leaves["head/embedder/kernel"], tensors["nerf_image_embedder.embedder.0.weight"].T
    )


def test_tensors_are_read_on_demand(tmp_path):
    """A file that lost its end still yields all tensors before it."""
    path = save(tmp_path / "x.safetensors", published(PIXELS), PIXELS)
    opened = checkpoint.open_checkpoint(path)
    last = max(opened.shapes, key=lambda name: open_tensors(path).locations[name].offset)
    path.write_bytes(path.read_bytes()[:-1])
    assert all(
        opened.get_tensor(name).shape == opened.shapes[name]
        for name in opened.shapes
        if name != last
    )
    with pytest.raises(CheckpointError, match="became shorter"):
        opened.get_tensor(last)


def test_parameters_are_read_to_shardings(written):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = toy_params(MODEL)
    _, read_params = checkpoint.read_checkpoint(
        written, shardings=jax.tree.map(lambda _: sharding, params)
    )
    assert_equal(read_params, params)
    assert all(x.sharding == sharding for x in jax.tree.leaves(read_params))


# --- other tools' files ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.diffusion_model.",
        "diffusion_model.",
        "params.",
        "_orig_mod.",
        "module.",
        "net.",
        "model.",
        "transformer.",
        "module._orig_mod.",
        "model.module.",
        "state_dict.ema_model.net._orig_mod.",
        "_fsdp_wrapped_module.model.diffusion_model.",
        "anything.of.any.tool.",
    ],
)
def test_prefixes_and_weights_of_norms_are_renamed(prefix, written, tmp_path):
    renamed = {}
    for name, tensor in load_file(written).items():
        *_, parent, last = name.split(".")
        norm = last == "scale" and ("norm" in parent or ".norms." in name)
        renamed[prefix + (name.removesuffix("scale") + "weight" if norm else name)] = tensor
    assert sum(k.endswith(".scale") for k in renamed) == 0
    if prefix:
        renamed["vae.decoder.weight"] = np.zeros(
            3, np.float32
        )  # complete checkpoints contain other networks too
    save_file(renamed, tmp_path / "renamed.safetensors")
    _, params = checkpoint.read_checkpoint(tmp_path / "renamed.safetensors", MODEL)
    assert_equal(params, toy_params(MODEL))


@pytest.mark.parametrize(
    "wrapper", ["_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "module"]
)
def test_wrappers_of_blocks_are_removed(wrapper, written, tmp_path):
    """torch.compile of each block puts its name into the middle of others."""
    renamed = {
        re.sub(r"(_blocks\.\d+\.)", rf"\1{wrapper}.", name): tensor
        for name, tensor in load_file(written).items()
    }
    assert sum(f".{wrapper}." in name for name in renamed) > 20
    save_file(renamed, tmp_path / "renamed.safetensors")
    _, params = checkpoint.read_checkpoint(tmp_path / "renamed.safetensors", MODEL)
    assert_equal(params, toy_params(MODEL))


def test_two_models_in_one_file_are_rejected(written, tmp_path):
    tensors = load_file(written)
    both = {prefix + name: x for name, x in tensors.items() for prefix in ("model.", "ema.")}
    twice = tensors | {"module." + name: x for name, x in tensors.items()}
    for renamed in (both, twice):
        save_file(renamed, tmp_path / "both.safetensors")
        with pytest.raises(CheckpointError, match="more than one model") as error:
            checkpoint.read_checkpoint(tmp_path / "both.safetensors", MODEL)
        assert len(sentence(error)) < 400


def test_one_error_names_every_difference(written, tmp_path):
    tensors = load_file(written)
    removed = ["txt_in.bias", "single_blocks.2.linear2.weight"]
    for name in removed:
        del tensors[name]
    tensors["double_blocks.9.extra"] = tensors["strange"] = np.zeros(2, np.float32)
    tensors["img_in_patch.bias"] = np.zeros(7, np.float32)
    tensors["nerf_blocks.1.norm.scale"] = np.zeros((8, 1), np.float32)
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_checkpoint(tmp_path / "bad.safetensors", MODEL)
    text = sentence(error)
    missing, extra, wrong = (
        text.index(word) for word in ("missing", "not expected", "of another shape")
    )
    assert all(missing < text.index(name) < extra for name in removed)
    assert all(extra < text.index(name) < wrong for name in ("double_blocks.9.extra", "strange"))
    assert "img_in_patch.bias is [7], not [48]" in text[wrong:]
    assert "nerf_blocks.1.norm.scale is [8, 1], not [8]" in text[wrong:]
    assert "txt_in.weight" not in text


def remove_metadata(path):
    """Rewrite a file without our metadata, as other tools write it."""
    save(path, load_file(path))


def test_markers_that_contradict_the_requested_model_are_errors(tmp_path):
    for changes, marker in (
        (dict(prediction="x0"), "__x0__"),
        (dict(text_ids="sequential"), "__sequential__"),
    ):
        model, path = toy_model(**changes), tmp_path / "marked.safetensors"
        checkpoint.write_checkpoint(path, model, toy_params(model))
        remove_metadata(path)
        with pytest.raises(CheckpointError, match=marker) as error:
            checkpoint.read_checkpoint(path, MODEL)
        sentence(error)
        checkpoint.write_checkpoint(path, MODEL, toy_params(MODEL))
        remove_metadata(path)
        assert_equal(
            checkpoint.read_checkpoint(path, model)[1], toy_params(MODEL)
        )  # some files lack their markers, so a request without them is accepted


def test_a_file_of_patch_32_is_not_read_as_patch_16(tmp_path):
    model = toy_model(patch=8, patch_embed="conv_half")
    checkpoint.write_checkpoint(tmp_path / "x.safetensors", model, toy_params(model))
    remove_metadata(tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="__32x32__"):
        checkpoint.read_checkpoint(tmp_path / "x.safetensors", MODEL)


def test_a_marker_without_the_prefix_of_other_names_is_detected(tmp_path):
    model, path = toy_model(prediction="x0"), tmp_path / "x.safetensors"
    checkpoint.write_checkpoint(path, model, toy_params(model))
    save_file(
        {
            k if k.startswith("__") else f"model.diffusion_model.{k}": v
            for k, v in load_file(path).items()
        },
        path,
    )
    with pytest.raises(CheckpointError, match="__x0__"):
        checkpoint.read_checkpoint(path, MODEL)


FOREIGN = {
    "a name without dots": lambda tensors: (
        {"weight": np.zeros(3, np.float32)},
        None,
    ),  # IndexError in canonical_names
    "flat quantized weights": lambda tensors: (
        {k: v.reshape(-1) for k, v in tensors.items()},
        None,
    ),  # ValueError in _infer_model
    "float8": lambda tensors: (
        tensors | {"txt_in.bias": tensors["txt_in.bias"].astype(ml_dtypes.float8_e4m3fn)},
        OURS,
    ),
    "settings of another version": lambda tensors: (tensors, {MODEL_KEY: '{"hiden": 3}'}),
}
OURS = {MODEL_KEY: json.dumps(config.to_dict(MODEL))}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_rejected_with_a_message(case, written, tmp_path):
    tensors, metadata = FOREIGN[case](load_file(written))
    save_file(tensors, tmp_path / "foreign.safetensors", metadata)
    try:
        checkpoint.read_checkpoint(tmp_path / "foreign.safetensors")
    except CheckpointError:
        return
    except Exception as error:
        pytest.fail(f"{type(error).__name__}: {error}")
    assert case == "float8"  # which can be read


def test_a_file_with_metadata_of_another_model_is_rejected(tmp_path):
    model = toy_model(masking="strict", rope_theta=5.0)
    checkpoint.write_checkpoint(tmp_path / "x.safetensors", model, toy_params(model))
    with pytest.raises(
        CheckpointError, match=r"another model .*rope_theta is 5.0 in the file and 10000.0 here"
    ):
        checkpoint.read_checkpoint(tmp_path / "x.safetensors", toy_model(masking="strict"))


# --- other formats --------------------------------------------------------------------------------


def write_gguf_file(path, tensors, type_names=None):
    """Write a file like ComfyUI-GGUF's converter: float32 vectors and no metadata of ours."""
    writer = gguf.GGUFWriter(path, "flux")
    for name, x in tensors.items():
        ggml_type = (type_names or {}).get(name) or (
            "F32" if x.ndim == 1 or x.dtype == np.float32 else "BF16"
        )
        ggml_type = gguf.GGMLQuantizationType[ggml_type]
        writer.add_tensor(
            name, gguf.quants.quantize(x.astype(np.float32), ggml_type), raw_dtype=ggml_type
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_files_of_other_tools_are_read(tmp_path):
    model = replace(PIXELS, prediction="x0", text_ids="sequential", approximator_depth=2)
    tensors = published(model)
    ones = {
        name: np.zeros(1, np.float32) for name in ("__x0__", "__sequential__")
    }  # ggml rejects tensors without values
    path = write_gguf_file(
        tmp_path / "x.gguf", tensors | ones, {"single_blocks.1.linear2.weight": "Q8_0"}
    )
    opened = checkpoint.open_checkpoint(path, **KNOWN)
    assert opened.model == model
    assert opened.format == "GGUF"
    assert opened.dtypes["single_blocks.1.linear2.weight"] == "Q8_0"
    assert opened.shapes["__x0__"] == (0,) == opened.get_tensor("__x0__").shape
    for name in ("txt_in.weight", "img_in_patch.weight", "single_blocks.0.norm.key_norm.scale"):
        assert (
            opened.get_tensor(name).astype(tensors[name].dtype).tobytes() == tensors[name].tobytes()
        )
    exact = tensors["single_blocks.1.linear2.weight"].astype(np.float32)
    assert (
        0
        < np.abs(opened.get_tensor("single_blocks.1.linear2.weight") - exact).max()
        <= np.abs(exact).max() / 127 / 2 * 1.01
    )


def test_scaled_fp8_files_of_comfyui_are_read(tmp_path):
    """Block matrices are fp8 with a scale each, the rest is bfloat16; a marker is not a weight."""
    tensors = published(LATENT)
    expected = dict(tensors)
    for name in [name for name in tensors if native.is_quantizable(name)]:
        scale = np.float32(np.abs(tensors[name].astype(np.float32)).max() / 448)
        quantized = (tensors[name].astype(np.float32) / scale).astype(ml_dtypes.float8_e4m3fn)
        tensors |= {
            name: quantized,
            name.replace(".weight", ".scale_weight"): np.full(1, scale, np.float32),
        }
        expected[name] = quantized.astype(np.float32) * scale
    tensors["scaled_fp8"] = np.zeros(2, ml_dtypes.float8_e4m3fn)
    save(
        tmp_path / "x.safetensors",
        {f"model.diffusion_model.{name}": x for name, x in tensors.items()},
    )
    opened = checkpoint.open_checkpoint(tmp_path / "x.safetensors", **KNOWN)
    assert opened.shapes == {name: x.shape for name, x in expected.items()}
    assert opened.dtypes["single_blocks.0.linear1.weight"] == "F8_E4M3"
    assert all(opened.get_tensor(name).tobytes() == x.tobytes() for name, x in expected.items())


def write_diffusers_folder(folder, **changes):
    """Write a quantized model in diffusers' layout and return its native tensors."""
    tensors = published(LATENT)
    diffusers_tensors = {
        t: tensors[name][rows]
        for name in tensors
        for t, (rows, _) in diffusers.locate_diffusers_slices(
            name, tensors[name].shape, LATENT
        ).items()
    }
    folder.mkdir(exist_ok=True)
    save(folder / "diffusion_pytorch_model.safetensors", diffusers_tensors | changes)
    (folder / "config.json").write_text(json.dumps(diffusers.make_transformer_config(LATENT)))
    return tensors


def test_folders_and_pipelines_of_diffusers_are_read(tmp_path):
    (tmp_path / "pipeline").mkdir()
    tensors = write_diffusers_folder(tmp_path / "pipeline" / "transformer")
    for path in (tmp_path / "pipeline", tmp_path / "pipeline" / "transformer"):
        opened = checkpoint.open_checkpoint(path)  # config.json has the rotary axes
        assert (opened.model.rope_axes, opened.format) == (LATENT.rope_axes, "diffusers")
        assert opened.shapes == {name: x.shape for name, x in tensors.items()}
        assert all(opened.get_tensor(name).tobytes() == x.tobytes() for name, x in tensors.items())


@pytest.mark.parametrize(
    ("text", "message"),
    {
        "{": "is not JSON",
        "[" * 100_000: "is not JSON",
        "[]": "Heads of 32 channels",
        '{"axes_dims_rope": ["a"]}': "int is expected",
    }.items(),
    ids=lambda x: x[:20],
)
def test_a_damaged_config_of_diffusers_is_rejected(text, message, tmp_path):
    write_diffusers_folder(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.open_checkpoint(tmp_path)
    sentence(error)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transformer_blocks.0.attn.to_k.weight": np.zeros((64, 63), np.float32)},
            r"whose shapes do not fit: \[64, 64\], \[64, 63\]",
        ),
        (
            {"transformer_blocks.0.attn.to_k.bias": np.zeros((), np.float32)},
            "whose shapes do not fit",
        ),
        (
            {"transformer_blocks.7.attn.to_q.weight": np.zeros(2, np.float32)},
            "Chroma does not have: transformer_blocks.7.attn.to_q.weight",
        ),
        ({"strange": np.zeros(2, np.float32)}, "Chroma does not have: strange"),
    ],
    ids=["width", "no axes", "gap", "extra"],
)
def test_diffusers_weights_that_do_not_fit_are_rejected(changes, message, tmp_path):
    write_diffusers_folder(tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message) as error:
        checkpoint.open_checkpoint(tmp_path)
    sentence(error)


def test_diffusers_weights_without_a_part_are_incomplete(tmp_path):
    write_diffusers_folder(tmp_path)
    tensors = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    del tensors["single_transformer_blocks.1.attn.to_k.weight"]
    save(tmp_path / "diffusion_pytorch_model.safetensors", tensors)
    with pytest.raises(
        CheckpointError,
        match=r"has no single_transformer_blocks.1.attn.to_k.weight, so it is incomplete",
    ) as error:
        checkpoint.open_checkpoint(tmp_path)
    sentence(error)


# --- invalid values -------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:overflow")
def test_values_too_large_for_float16_are_rejected(tmp_path):
    params = toy_params(MODEL)
    params = params | dict(
        text_embed=params["text_embed"] | dict(bias=params["text_embed"]["bias"].at[0].set(1e6))
    )
    with pytest.raises(CheckpointError):
        checkpoint.write_checkpoint(tmp_path / "x.safetensors", MODEL, params, "float16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_rejected(value, written, tmp_path):
    tensors = load_file(written)
    tensors["single_blocks.1.linear2.weight"][3, 60] = value
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(
        CheckpointError, match=r"single_blocks\.\d\.linear2\.weight.* not finite"
    ) as error:
        checkpoint.read_checkpoint(tmp_path / "bad.safetensors", MODEL)
    sentence(error)
