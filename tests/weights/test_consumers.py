"""Other programs derive the right model from our exports: by names, stored shapes and types.

Predicates here express the rules of each program:

- ComfyUI: `comfy/model_detection.py`, `comfy/ops.py`, at 0b61ce5b;
- ComfyUI-GGUF: `loader.py`, `ops.py`, at 795e4515;
- stable-diffusion.cpp: `model_loader.cpp`, `flux.hpp`, at 97d29908;
- diffusers: `single_file_utils.py`, 0.42;
- ai-toolkit: `chroma/`, at 27a03a91.

`experiments/consumers` runs their own code, and test_diffusers.py runs diffusers.
"""

import json
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np
import pytest

from radiance import config
from radiance.weights import native
from radiance.weights.checkpoint import Checkpoint, open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.detect import OTHER_FILE_KINDS
from radiance.weights.opening import open_tensors
from radiance.weights.surgery import merge_checkpoints
from tests.helpers.toy_files import LATENT, published, save
from tests.helpers.toy_models import toy_model

SIZES = dict(hidden=64, rope_axes=(4, 14, 14))
PIXELS = toy_model(patch=16, **SIZES)
MODELS = {
    "velocity": PIXELS,
    "x0": toy_model(patch=16, prediction="x0", **SIZES),
    "x0 patch 8": toy_model(patch=8, prediction="x0", **SIZES),
    "x0 sequential": toy_model(patch=16, prediction="x0", text_ids="sequential", **SIZES),
    "half kernel": toy_model(patch=32, prediction="x0", patch_embed="conv_half", **SIZES),
    "linear head": toy_model(patch=16, head="nerf_linear", **SIZES),
    "registers": toy_model(patch=16, registers=2, padding="learned", masking="off", **SIZES),
    "latent": LATENT,
}
# The types of the files of each format; None keeps the source's.
DTYPES = {
    "native": [None, "float32", "bfloat16", "float16", "float8_e4m3fn", "int8"],
    "gguf": [None, "float32", "bfloat16", "float16", "q8_0", "q4_0"],
}


class SeenTensor(NamedTuple):
    """A tensor as a program sees it before it runs the network."""

    shape: tuple[int, ...]  # what PyTorch's `shape` returns, or ggml's `ne` in reverse order
    size: tuple[int, ...]  # what PyTorch's `size()` returns
    dtype: str  # as stored


def see_safetensors(path: Path) -> dict[str, SeenTensor]:
    """Return all tensors of a safetensors file, scales and descriptions too."""
    header = path.read_bytes()
    header = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    return {
        name: SeenTensor(tuple(entry["shape"]), tuple(entry["shape"]), entry["dtype"])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def see_gguf(path: Path) -> dict[str, SeenTensor]:
    """Return the tensors as ComfyUI-GGUF's loader hands them to ComfyUI.

    It gives float32 and float16 tensors their shape. All others are arrays of bytes whose `shape`
    is overridden and whose `size()` is not; BF16 vectors are decoded.
    """
    tensors = {}
    for tensor in gguf.GGUFReader(path).tensors:
        shape = tuple(int(n) for n in reversed(tensor.shape))
        is_decoded = tensor.tensor_type.name in ("F32", "F16") or (
            len(shape) <= 1 and tensor.tensor_type.name == "BF16"
        )
        size = shape if is_decoded else tensor.data.shape
        tensors[tensor.name] = SeenTensor(shape, size, tensor.tensor_type.name)
    return tensors


def see_layout(shapes) -> dict[str, SeenTensor]:
    """Return the tensors of a layout whose values nobody has written."""
    return {name: SeenTensor(shape, shape, "BF16") for name, shape in shapes.items()}


def count_blocks(names, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in names if prefix in name})


# --- ComfyUI --------------------------------------------------------------------------------------

# The formats of `.comfy_quant` that ComfyUI knows among those that we write, and their types.
COMFYUI_QUANTIZATIONS = {
    "int8_tensorwise": "I8",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}


def detect_by_comfyui(tensors) -> dict | None:
    """Return the settings that ComfyUI derives, or None if it recognizes no model."""
    has_norm = "distilled_guidance_layer.norms.0.scale" in tensors
    if "double_blocks.0.img_attn.norm.key_norm.scale" not in tensors or not (
        "img_in.weight" in tensors or has_norm
    ):
        return None
    hidden, context = tensors["txt_in.weight"].shape
    model = dict(
        kind="chroma" if has_norm else "flux",
        hidden=hidden,
        context=context,
        depths=(count_blocks(tensors, "double_blocks."), count_blocks(tensors, "single_blocks.")),
    )
    if "nerf_blocks.0.norm.scale" not in tensors:
        return model
    return model | dict(
        kind="radiance",
        head="conv" if "nerf_final_layer_conv.norm.scale" in tensors else "linear",
        patch=tensors["img_in_patch.weight"].size[-1],
        x0="__x0__" in tensors,
        sequential="__sequential__" in tensors,
    )


def check_comfyui_sizes(tensors, model: dict):
    """Raise AssertionError if tensors do not have the sizes that are constants in ComfyUI."""
    assert model["hidden"] % 128 == 0
    if model["kind"] == "flux":
        return
    # An approximator of 64 → 5120, five layers, 3072 and 344 rows.
    assert tensors["distilled_guidance_layer.in_proj.weight"].shape == (5120, 64)
    assert count_blocks(tensors, "distilled_guidance_layer.layers.") == 5
    assert tensors["distilled_guidance_layer.out_proj.weight"].shape == (3072, 5120)
    assert model["hidden"] == 3072
    assert 3 * model["depths"][1] + 12 * model["depths"][0] + 2 == 344
    if model["kind"] == "radiance":
        assert tensors["nerf_image_embedder.embedder.0.weight"].shape == (64, 3 + 8 * 8)
        assert count_blocks(tensors, "nerf_blocks.") == 4


def check_comfyui_buffers(tensors):
    """Raise AssertionError if ComfyUI cannot copy a tensor into its network.

    Buffers must have the shape of its own, which is empty. Its layers decode weights when they
    run; parameters outside layers must have their values at once.
    """
    for name, tensor in tensors.items():
        if name in ("__x0__", "__sequential__"):
            assert tensor.size == (0,)
        if not name.endswith(".weight"):
            assert tensor.size == tensor.shape, name


def check_comfyui_quantization(path: Path):
    """Raise AssertionError if ComfyUI would read a matrix with scales otherwise than we wrote it.

    Without a description it ignores scales. An int8 matrix has one scale, or one for each row on
    two axes; an fp8 matrix has one scale.
    """
    tensors, file = see_safetensors(path), path.read_bytes()
    start = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:start])
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if name == layer or f"{layer}.weight_scale" not in tensors:
            assert tensor.dtype != "I8", name
            continue
        begin, end = header[f"{layer}.comfy_quant"]["data_offsets"]
        description = json.loads(file[start + begin : start + end])
        assert COMFYUI_QUANTIZATIONS[description["format"]] == tensor.dtype
        assert not description.get("convrot")
        scale_shape = tensors[f"{layer}.weight_scale"].shape
        assert scale_shape in ((), (1,), (1, 1), (tensor.shape[0], 1)), name


# --- the others -----------------------------------------------------------------------------------


def detect_by_stable_diffusion_cpp(tensors) -> dict | None:
    """Return what stable-diffusion.cpp detects; it adds a prefix to all names."""
    names = {f"model.diffusion_model.{name}" for name in tensors}
    if not any("model.diffusion_model.double_blocks." in name for name in names):
        return None
    if not any("distilled_guidance_layer.in_proj.weight" in name for name in names):
        return dict(kind="flux")
    if not any("model.diffusion_model.nerf_final_layer_conv." in name for name in names):
        return dict(kind="chroma")
    patch = 32 if any("__32x32__" in name for name in names) else 16
    kernel = tensors["img_in_patch.weight"].shape[-1]
    assert kernel == patch or patch == 2 * kernel  # it aborts otherwise
    return dict(kind="radiance", patch=patch, x0=any("__x0__" in name for name in names))


def detect_by_comfyui_gguf(tensors, architecture: str | None = "flux") -> str | None:
    """Return the architecture that ComfyUI-GGUF detects."""
    known = "flux", "sd1", "sdxl", "sd3", "aura", "hidream", "cosmos", "ltxv", "hyvid", "wan"
    if architecture not in known:
        return None
    if any("transformer_blocks.0.attn.norm_added_k.weight" in name for name in tensors):
        return None  # it does not accept the layout of diffusers
    if any(len(name) > 127 or len(tensor.shape) > 4 for name, tensor in tensors.items()):
        return None
    return architecture if "double_blocks.0.img_attn.proj.weight" in tensors else None


def detect_by_diffusers(tensors) -> str | None:
    """Return the class that diffusers' `from_single_file` takes; it has none for pixels."""
    return "chroma" if "distilled_guidance_layer.in_proj.bias" in tensors else None


def detect_by_ai_toolkit(tensors) -> dict:
    """Return what ai-toolkit derives: it counts blocks, and loads strictly."""
    return dict(
        depths=tuple(count_blocks(tensors, f"{kind}_blocks.") for kind in ("double", "single")),
        unexpected={name for name in tensors if name.startswith("__")},
    )


# --- at the published sizes -----------------------------------------------------------------------

FLUX = dict(hidden=3072, context=4096, depths=(19, 38))
RADIANCE = FLUX | dict(kind="radiance", head="conv", patch=16, x0=False, sequential=False)
PUBLISHED = {
    "flux1-schnell": (FLUX | dict(kind="flux"), dict(kind="flux")),
    "chroma1-base": (FLUX | dict(kind="chroma"), dict(kind="chroma")),
    "chroma1-radiance": (RADIANCE, dict(kind="radiance", patch=16, x0=False)),
    "chroma1-radiance-x0": (RADIANCE | dict(x0=True), dict(kind="radiance", patch=16, x0=True)),
    # ComfyUI knows no half kernels and detects patch 16, as for the authors' own file.
    "chroma1-radiance-x0-patch32": (
        RADIANCE | dict(x0=True),
        dict(kind="radiance", patch=32, x0=True),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_are_detected(name):
    tensors = see_layout(native.native_layout(config.MODELS[name])[0])
    by_comfyui, by_stable_diffusion_cpp = PUBLISHED[name]
    assert detect_by_comfyui(tensors) == by_comfyui
    check_comfyui_sizes(tensors, by_comfyui)
    assert detect_by_stable_diffusion_cpp(tensors) == by_stable_diffusion_cpp
    assert detect_by_comfyui_gguf(tensors) == "flux"
    assert detect_by_ai_toolkit(tensors)["depths"] == FLUX["depths"]


@pytest.mark.parametrize("name", sorted(set(config.MODELS) - set(PUBLISHED)))
def test_comfyui_cannot_run_other_sizes(name):
    """ComfyUI has fixed sizes; `convert --to torch` exists for all others."""
    tensors = see_layout(native.native_layout(config.MODELS[name])[0])
    model = detect_by_comfyui(tensors)
    with pytest.raises(AssertionError):
        check_comfyui_sizes(tensors, model)


# --- every export ---------------------------------------------------------------------------------


def expect_by_comfyui(model: config.Model) -> dict:
    expected = dict(hidden=model.hidden, context=model.text_dim)
    expected |= dict(kind="chroma", depths=(model.double_blocks, model.single_blocks))
    if model.patch == 1:
        return expected
    return expected | dict(
        kind="radiance",
        head=model.head.removeprefix("nerf_"),
        patch=model.patch // 2 if model.patch_embed == "conv_half" else model.patch,
        x0=model.prediction == "x0",
        sequential=model.text_ids == "sequential",
    )


def expect_by_stable_diffusion_cpp(model: config.Model) -> dict:
    if model.head != "nerf_conv":  # it takes models with linear heads for latent ones
        return dict(kind="chroma")
    # It knows two patch sizes, and assumes that patch 8 is patch 16 with a half kernel.
    return dict(kind="radiance", patch=max(model.patch, 16), x0=model.prediction == "x0")


def open_source(folder: Path, model: config.Model, dtype: str = "bfloat16") -> Checkpoint:
    return open_checkpoint(save(folder / "in.safetensors", published(model, dtype), model))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("to", DTYPES)
def test_exports_are_seen_as_they_are(to, name, tmp_path):
    model = MODELS[name]
    source = open_source(tmp_path, model)
    for i, dtype in enumerate(DTYPES[to]):
        path = tmp_path / f"{i}.{'gguf' if to == 'gguf' else 'safetensors'}"
        convert_checkpoint(source, path, to, dtype)
        tensors = see_gguf(path) if to == "gguf" else see_safetensors(path)
        assert detect_by_comfyui(tensors) == expect_by_comfyui(model), dtype
        check_comfyui_buffers(tensors)
        if to == "native":
            check_comfyui_quantization(path)
        else:
            architecture = gguf.GGUFReader(path).fields["general.architecture"].contents()
            assert detect_by_comfyui_gguf(tensors, architecture) == "flux"
        expected = expect_by_stable_diffusion_cpp(model)
        assert detect_by_stable_diffusion_cpp(tensors) == expected, dtype
        if model.patch == 1:
            assert detect_by_diffusers(tensors) == "chroma"


@pytest.mark.parametrize("dtype", DTYPES["gguf"])
def test_gguf_decodes_all_but_linear_weights_at_once(dtype, tmp_path):
    """The rule behind the table: only weights of linear layers may be bytes."""
    path = tmp_path / "out.gguf"
    convert_checkpoint(open_source(tmp_path, MODELS["registers"]), path, dtype=dtype)
    for name, tensor in see_gguf(path).items():
        if len(tensor.shape) != 2 or not name.endswith(".weight"):
            assert tensor.dtype == "F32", name


def test_gguf_files_of_other_tools_get_a_readable_patch_layer(tmp_path):
    """ComfyUI-GGUF's own converter writes it in BF16; a copy of such a file repairs it."""
    model = MODELS["x0"]
    writer = gguf.GGUFWriter(tmp_path / "in.gguf", "flux")
    writer.add_string("radiance.model", json.dumps(config.to_dict(model)))
    for name, x in published(model).items():
        dtype = gguf.GGMLQuantizationType.F32 if x.ndim == 1 else gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, gguf.quants.quantize(x.astype(np.float32), dtype), raw_dtype=dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    convert_checkpoint(open_checkpoint(tmp_path / "in.gguf"), tmp_path / "out.gguf")
    patches = {
        name: detect_by_comfyui(see_gguf(tmp_path / name))["patch"]
        for name in ("in.gguf", "out.gguf")
    }
    assert patches == {"in.gguf": 32, "out.gguf": 16}


def test_changed_checkpoints_are_seen_as_they_are(tmp_path):
    source = open_source(tmp_path, MODELS["x0"])
    merged = merge_checkpoints(source, source, 0.5)
    for dtype in DTYPES["gguf"]:
        convert_checkpoint(merged, tmp_path / "out.gguf", dtype=dtype)
        assert detect_by_comfyui(see_gguf(tmp_path / "out.gguf"))["patch"] == 16, dtype


@pytest.mark.parametrize("scale_shape", ["scalar", "[1]", "[rows]", "[rows, 1]"])
def test_copied_scales_have_the_axes_that_comfyui_reads(scale_shape, tmp_path):
    """It takes one axis of scales for those of inputs."""
    tensors = published(PIXELS)
    for name in [name for name in tensors if native.is_quantizable(name)]:
        num_rows = len(tensors[name])
        shape = {"scalar": (), "[1]": (1,), "[rows]": (num_rows,), "[rows, 1]": (num_rows, 1)}
        tensors[name] = (tensors[name].astype(np.float32) * 100).astype(np.int8)
        scales_name = name.replace(".weight", ".weight_scale")
        tensors[scales_name] = np.full(shape[scale_shape], 0.01, np.float32)
    source = open_checkpoint(save(tmp_path / "in.safetensors", tensors, PIXELS))
    convert_checkpoint(source, tmp_path / "out.safetensors")
    check_comfyui_quantization(tmp_path / "out.safetensors")


@pytest.mark.parametrize("to", DTYPES)
def test_strict_loaders_get_no_markers(to, tmp_path):
    """ai-toolkit rejects names that its network lacks."""
    path = tmp_path / f"out.{'gguf' if to == 'gguf' else 'safetensors'}"
    source = open_source(tmp_path, MODELS["x0 sequential"])
    convert_checkpoint(source, path, to)
    assert detect_by_ai_toolkit(open_tensors(path).shapes)["unexpected"]
    convert_checkpoint(source, path, to, has_markers=False)
    assert not detect_by_ai_toolkit(open_tensors(path).shapes)["unexpected"]


def test_successor_is_named():
    assert any(prefix == "dec_net." and "Zeta-Chroma" in kind for prefix, kind in OTHER_FILE_KINDS)
