"""Run the code of other programs, in a copy of yours, on a file that `radiance convert` wrote.

    python experiments/consumers/check_export.py radiance-q8.gguf \
        --comfyui ~/ComfyUI --comfyui-gguf ~/ComfyUI/custom_nodes/ComfyUI-GGUF
    python experiments/consumers/check_export.py radiance.safetensors --ai-toolkit ~/ai-toolkit

Needs PyTorch. Only the code that reads weights is run, and no network. It prints what each program
derives from the file, and ends with code 1 if that differs from the model. Not timed.
"""

import argparse
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from radiance.weights.checkpoint import Checkpoint, open_checkpoint
from radiance.weights.opening import open_tensors

LAYERS = ("Linear", "Conv2d", "Embedding", "LayerNorm", "GroupNorm")
MAX_DIFFERENCE = 1e-3  # of values, relative to the largest; ComfyUI-GGUF multiplies in float16


def import_copy(name: str, path: Path) -> ModuleType:
    """Import a file, or a package by its `__init__.py`, under a name of ours."""
    folder = [str(path.parent)] if path.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folder)
    if spec is None or spec.loader is None or not path.is_file():
        raise SystemExit(f"There is no {path}: give the folder of the program's code.")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def install_comfyui_stubs():
    """Replace the parts of ComfyUI that are imported, but not run, by empty modules."""
    for name in (
        *("comfy", "comfy.ops", "comfy.lora", "comfy.utils", "comfy.model_management"),
        *("comfy.memory_management", "comfy.supported_models", "comfy.supported_models_base"),
        *("comfy.ldm", "comfy.ldm.kandinsky6", "comfy.ldm.kandinsky6.detection"),
    ):
        module = sys.modules.setdefault(name, ModuleType(name))
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, module)
    layers = {name: getattr(nn, name) for name in LAYERS}
    vars(sys.modules["comfy.ops"])["manual_cast"] = type("manual_cast", (), layers)


def read_as_comfyui_gguf(path: Path, folder: Path) -> Mapping[str, Any]:
    """Return the tensors that ComfyUI-GGUF's loader gives, and check their values."""
    package = ModuleType("comfyui_gguf")
    package.__path__ = [str(folder)]
    sys.modules["comfyui_gguf"] = package
    loader = import_copy("comfyui_gguf.loader", folder / "loader.py")
    tensors = loader.gguf_sd_loader(str(path))
    ours = open_tensors(path)
    for name, tensor in tensors.items():
        theirs = loader.dequantize_tensor(tensor, dtype=torch.float32)
        values = ours[name].astype(np.float32)
        difference = np.abs(torch.Tensor(theirs).numpy() - values).max(initial=0)
        if difference > MAX_DIFFERENCE * np.abs(values).max(initial=0):
            raise SystemExit(f"ComfyUI-GGUF reads {name} with a difference of {difference:.1e}.")
    print(f"ComfyUI-GGUF reads the values of {len(tensors)} tensors as we do.")
    return tensors


def read_shapes(path: Path) -> dict[str, torch.Tensor]:
    """Return tensors of the shapes in a safetensors file, without values."""
    with safe_open(path, framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def check_comfyui(checkpoint: Checkpoint, tensors: Mapping[str, Any], folder: Path) -> bool:
    """Compare what ComfyUI's detection returns with the model."""
    detection = import_copy("comfyui_detection", folder / "comfy" / "model_detection.py")
    found = detection.detect_unet_config(dict(tensors), "")
    model = checkpoint.model
    kernel_size = model.patch // 2 if model.patch_embed == "conv_half" else model.patch
    expected = {
        "image_model": "chroma" if model.patch == 1 else "chroma_radiance",
        "hidden_size": model.hidden,
        "context_in_dim": model.text_dim,
        "depth": model.double_blocks,
        "depth_single_blocks": model.single_blocks,
    }
    if model.patch > 1:
        expected |= {
            "patch_size": kernel_size,
            "nerf_final_head_type": model.head.removeprefix("nerf_"),
            "use_x0": model.prediction == "x0",
        }
    return compare("ComfyUI", {key: (found or {}).get(key) for key in expected}, expected)


def check_ai_toolkit(checkpoint: Checkpoint, tensors: Mapping[str, Any], folder: Path) -> bool:
    """Compare the names and shapes of ai-toolkit's network, which it loads strictly."""
    source = folder / "extensions_built_in" / "diffusion_models" / "chroma" / "src"
    import_copy("ai_toolkit_chroma", source / "__init__.py")
    radiance = import_copy("ai_toolkit_chroma.radiance", source / "radiance.py")
    model = checkpoint.model
    params = replace(
        radiance.chroma_params,
        hidden_size=model.hidden,
        context_in_dim=model.text_dim,
        num_heads=model.heads,
        axes_dim=list(model.rope_axes),
        depth=model.double_blocks,
        depth_single_blocks=model.single_blocks,
        mlp_ratio=model.mlp_ratio,
        approximator_hidden_size=model.approximator_hidden,
        approximator_depth=model.approximator_depth,
        nerf_hidden_size=model.nerf_hidden,
        nerf_mlp_ratio=model.nerf_mlp_ratio,
        nerf_depth=model.nerf_depth,
        nerf_max_freqs=model.nerf_freqs,
    )
    with torch.device("meta"):
        network = radiance.Chroma(params)
    expected = {name: tuple(x.shape) for name, x in network.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    return compare("ai-toolkit", found, expected)


def compare(program: str, found: Mapping[str, object], expected: Mapping[str, object]) -> bool:
    """Print whether two tables agree, and their differences."""
    keys = [key for key in {**found, **expected} if found.get(key) != expected.get(key)]
    for key in keys[:20]:
        print(f"{program}: {key} is {found.get(key)}, and should be {expected.get(key)}")
    if not keys:
        print(f"{program}: {len(expected)} entries agree.")
    return not keys


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file", type=Path, help="a .safetensors or .gguf file of a pixel model")
    checks: dict[str, Callable[[Checkpoint, Mapping[str, Any], Path], bool]] = {
        "comfyui": check_comfyui,
        "ai_toolkit": check_ai_toolkit,
    }
    for name in ("comfyui", "comfyui-gguf", "ai-toolkit"):
        parser.add_argument(f"--{name}", type=Path, metavar="FOLDER", help=f"a copy of {name}")
    options = parser.parse_args()
    if (options.file.suffix == ".gguf") != bool(options.comfyui_gguf):
        parser.error("--comfyui-gguf is for .gguf files, which only it reads.")
    install_comfyui_stubs()
    checkpoint = open_checkpoint(options.file)
    if options.comfyui_gguf:
        tensors = read_as_comfyui_gguf(options.file, options.comfyui_gguf)
    else:
        tensors = read_shapes(options.file)
    results = [
        check(checkpoint, tensors, getattr(options, name))
        for name, check in checks.items()
        if getattr(options, name)
    ]
    raise SystemExit(0 if all(results) else 1)


if __name__ == "__main__":
    main()
