"""Other tools identify our exports correctly, at the published sizes and as files.

The rules are those of ComfyUI (`comfy/model_detection.py`), ComfyUI-GGUF (`tools/convert.py`,
`loader.py`) and stable-diffusion.cpp (`model_loader.cpp`, `flux.hpp`), rewritten as predicates over
names and shapes. test_diffusers.py runs diffusers itself.
"""

import gguf
import pytest

from radiance import config
from radiance.weights import native
from radiance.weights.checkpoint import open_checkpoint
from radiance.weights.convert import convert_checkpoint
from radiance.weights.detect import OTHER_FILE_KINDS
from radiance.weights.opening import open_tensors
from tests.helpers.toy_files import LATENT, published, save
from tests.helpers.toy_models import toy_model

PIXELS = toy_model(hidden=64, rope_axes=(4, 14, 14), patch=16, prediction="x0")


def count_blocks(shapes, prefix: str) -> int:
    return len(
        {name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)}
    )


def detect_by_comfyui(shapes) -> dict | None:
    """Return the model that ComfyUI builds, or None if it builds none.

    Raises AssertionError if the tensors do not fit its fixed sizes.
    """
    if "double_blocks.0.img_attn.norm.key_norm.scale" not in shapes:
        return None
    if "img_in.weight" not in shapes and "distilled_guidance_layer.norms.0.scale" not in shapes:
        return None
    hidden, context = shapes["txt_in.weight"]
    depths = count_blocks(shapes, "double_blocks."), count_blocks(shapes, "single_blocks.")
    model = dict(kind="flux", hidden=hidden, context=context, heads=hidden // 128, depths=depths)
    if "distilled_guidance_layer.norms.0.scale" not in shapes:
        return model
    model["kind"] = "chroma"
    # Fixed: an approximator of 64 → 5120, five layers, 3072 and 344 rows.
    assert shapes["distilled_guidance_layer.in_proj.weight"] == (5120, 64)
    assert count_blocks(shapes, "distilled_guidance_layer.layers.") == 5
    assert shapes["distilled_guidance_layer.out_proj.weight"] == (3072, 5120)
    assert hidden == 3072
    assert 3 * depths[1] + 12 * depths[0] + 2 == 344
    if "nerf_blocks.0.norm.scale" not in shapes:
        return model
    head = "conv" if "nerf_final_layer_conv.norm.scale" in shapes else "linear"
    assert shapes["nerf_image_embedder.embedder.0.weight"] == (64, 3 + 8 * 8)
    assert count_blocks(shapes, "nerf_blocks.") == 4
    return model | dict(
        kind="radiance", head=head, patch=shapes["img_in_patch.weight"][-1], x0="__x0__" in shapes
    )


def detect_by_stable_diffusion_cpp(shapes) -> dict | None:
    """Return the model that stable-diffusion.cpp detects; it adds a prefix to all names."""
    names = {f"model.diffusion_model.{name}" for name in shapes}
    if not any("model.diffusion_model.double_blocks." in name for name in names):
        return None
    if not any("distilled_guidance_layer.in_proj.weight" in name for name in names):
        return dict(kind="flux")
    if not any("model.diffusion_model.nerf_final_layer_conv." in name for name in names):
        return dict(kind="chroma")
    patch, kernel = (
        (32 if any("__32x32__" in name for name in names) else 16),
        shapes["img_in_patch.weight"][-1],
    )
    assert kernel == patch or patch == 2 * kernel
    return dict(kind="radiance", patch=patch, x0=any("__x0__" in name for name in names))


def detect_by_comfyui_gguf(shapes, architecture: str | None = "flux") -> str | None:
    """Return the architecture that ComfyUI-GGUF detects."""
    if architecture not in (
        "flux",
        "sd1",
        "sdxl",
        "sd3",
        "aura",
        "hidream",
        "cosmos",
        "ltxv",
        "hyvid",
        "wan",
        "lumina2",
        "qwen_image",
    ):
        return None
    if any("transformer_blocks.0.attn.norm_added_k.weight" in name for name in shapes):
        return None  # it does not accept the layout of diffusers
    if any(len(name) > 127 or len(shape) > 4 for name, shape in shapes.items()):
        return None
    return architecture if "double_blocks.0.img_attn.proj.weight" in shapes else None


FLUX = dict(hidden=3072, context=4096, heads=24, depths=(19, 38))
TABLE = {
    "flux1-schnell": (FLUX | dict(kind="flux"), dict(kind="flux")),
    "chroma1-base": (FLUX | dict(kind="chroma"), dict(kind="chroma")),
    "chroma1-radiance": (
        FLUX | dict(kind="radiance", head="conv", patch=16, x0=False),
        dict(kind="radiance", patch=16, x0=False),
    ),
    "chroma1-radiance-x0": (
        FLUX | dict(kind="radiance", head="conv", patch=16, x0=True),
        dict(kind="radiance", patch=16, x0=True),
    ),
    # ComfyUI knows no half kernels and detects patch 16, as for the authors' own file.
    "chroma1-radiance-x0-patch32": (
        FLUX | dict(kind="radiance", head="conv", patch=16, x0=True),
        dict(kind="radiance", patch=32, x0=True),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_published_models_are_detected(name):
    shapes = native.native_layout(config.MODELS[name])[0]
    assert detect_by_comfyui(shapes) == TABLE[name][0]
    assert detect_by_stable_diffusion_cpp(shapes) == TABLE[name][1]
    assert detect_by_comfyui_gguf(shapes) == "flux"


@pytest.mark.parametrize("name", sorted(set(config.MODELS) - set(TABLE)))
def test_comfyui_cannot_run_other_sizes(name):
    """ComfyUI has fixed sizes; `convert --to torch` exists for all others."""
    with pytest.raises(AssertionError):
        detect_by_comfyui(native.native_layout(config.MODELS[name])[0])


@pytest.mark.parametrize("to", ["native", "gguf"])
@pytest.mark.parametrize(
    ("model", "kind"), [(PIXELS, "radiance"), (LATENT, "chroma")], ids=["pixels", "latent"]
)
def test_files_are_detected(to, model, kind, tmp_path):
    """Both formats have the same names without prefix; GGUF names an architecture."""
    path = tmp_path / f"out.{'gguf' if to == 'gguf' else 'safetensors'}"
    convert_checkpoint(
        open_checkpoint(save(tmp_path / "in.safetensors", published(model), model)),
        path,
        to,
        "q8_0" if to == "gguf" else None,
    )
    shapes = open_tensors(path).shapes
    assert detect_by_stable_diffusion_cpp(shapes)["kind"] == kind
    assert detect_by_comfyui_gguf(shapes) == "flux"
    if to == "gguf":
        reader = gguf.GGUFReader(path)
        assert (
            detect_by_comfyui_gguf(shapes, reader.fields["general.architecture"].contents())
            == "flux"
        )
        kinds = {x.name: x.tensor_type.name for x in reader.tensors}
        assert kinds["double_blocks.0.img_attn.proj.weight"] == "Q8_0"
        assert all(kinds[name] == "F32" for name, shape in shapes.items() if len(shape) == 1)
        assert kinds.get("nerf_image_embedder.embedder.0.weight", "F32") == "F32"


def test_option_writes_no_empty_tensors(tmp_path):
    """The loader of ggml aborts at empty tensors; the option gives every marker one value."""
    source = open_checkpoint(save(tmp_path / "in.safetensors", published(PIXELS), PIXELS))
    convert_checkpoint(source, tmp_path / "out.gguf", "gguf", empty_markers=False)
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert all(x.n_elements > 0 for x in tensors)
    assert detect_by_stable_diffusion_cpp({x.name: tuple(x.shape)[::-1] for x in tensors})["x0"]


def test_successor_is_named():
    assert any(prefix == "dec_net." and "Zeta-Chroma" in kind for prefix, kind in OTHER_FILE_KINDS)
