"""Models whose matrices are int8, with ComfyUI's descriptions of them."""

import json

import numpy as np
from safetensors.numpy import save_file

from radiance.weights import native
from radiance.weights.quantization import HEADER_KEY
from tests.helpers.toy_files import PIXELS, published

MATRICES = [name for name in published(PIXELS) if native.is_quantizable(name)]


def make_rotation(size: int) -> np.ndarray:
    """Return ConvRot's matrix by its definition: the Kronecker power of a matrix of four rows."""
    base = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]) / 2
    rotation = np.ones((1, 1))
    while len(rotation) < size:
        rotation = np.kron(rotation, base)
    return rotation


def quantize_int8(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = np.abs(weight).max(axis=1, keepdims=True).astype(np.float32) / 127
    return np.rint(weight / scales).astype(np.int8), scales


def write_int8(path, description, home, rotation_size=0, prefix="", layer_prefix=None):
    """Write a model whose matrices are int8, with a description in the header or in tensors."""
    tensors, layers = {}, {}
    for name, x in published(PIXELS).items():
        if name not in MATRICES:
            tensors[prefix + name] = x
            continue
        weight = x.astype(np.float64)
        if rotation_size:
            groups = weight.reshape(len(x), -1, rotation_size)
            weight = (groups @ make_rotation(rotation_size)).reshape(x.shape)
        layer = name.removesuffix(".weight")
        values, scales = quantize_int8(weight)
        tensors |= {f"{prefix}{layer}.weight": values, f"{prefix}{layer}.weight_scale": scales}
        layers[(prefix if layer_prefix is None else layer_prefix) + layer] = description
        if home in ("tensor", "both"):
            note = np.frombuffer(json.dumps(description).encode(), np.uint8)
            tensors[f"{prefix}{layer}.comfy_quant"] = note
    metadata = {HEADER_KEY: json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(tensors, path, metadata if home in ("header", "both") else None)
    return path
