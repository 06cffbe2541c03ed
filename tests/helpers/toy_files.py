"""Checkpoint files of toy models, written without our own writers, for tests."""

import json
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from radiance import config
from radiance.weights import native
from radiance.weights.detect import MODEL_KEY
from tests.helpers.toy_models import toy_model

# All their matrices divide into blocks of 32.
PIXELS = toy_model(hidden=64, rope_axes=(4, 14, 14))
LATENT = toy_model(hidden=64, rope_axes=(4, 14, 14), head="linear", patch=1, channels=8)
KNOWN = dict(rope_axes=PIXELS.rope_axes)  # settings of a toy that its tensor shapes do not show
TYPES = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16, "float32": np.float32}


def published(model: config.Model, dtype: str = "bfloat16", seed: int = 0) -> dict[str, np.ndarray]:
    """Return random tensors with the published names, shapes and types.

    The pixel embedder and the marker tensors are float32.
    """
    rng = np.random.default_rng(seed)
    return {
        name: (0.1 * rng.standard_normal(shape, np.float32) + name.endswith(".scale")).astype(
            np.float32 if name.startswith(("nerf_image_embedder.", "__")) else TYPES[dtype]
        )
        for name, shape in native.native_layout(model)[0].items()
    }


def save(path: Path, tensors: Mapping[str, np.ndarray], model: config.Model | None = None) -> Path:
    """Write a safetensors file, with the metadata of our own exports if a model is given."""
    save_file(
        dict(tensors), path, {MODEL_KEY: json.dumps(config.to_dict(model))} if model else None
    )
    return path


def stored(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Return types, shapes and bytes of the tensors of a file, in its order."""
    return {name: (x.dtype.name, x.shape, x.tobytes()) for name, x in load_file(path).items()}


def sentence(error) -> str:
    """Return the message of an error that pytest caught; it must be one complete line."""
    text = str(error.value)
    assert "\n" not in text
    assert text.endswith((".", "?"))
    return text
