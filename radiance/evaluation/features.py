"""Feature extractors: what pictures are turned into before sets of them are compared, and where the features of real ones are kept.

An extractor goes by its name in every result, `FD(pixels16)`, for a distance without its features is no number. The two here need no
file; `evaluation/inception.py` has the one of the literature.
"""

import hashlib
import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Float32

from radiance.data.datasets import DataError
from radiance.weights.files import CheckpointError, open_tensors, write_safetensors

Pictures = Float[np.ndarray, "b height width 3"]  # in [-1, 1]
Features = Float32[np.ndarray, "b d"]

METADATA_KEY = "radiance.features"
FLOAT32 = np.dtype(np.float32)


class Extractor(Protocol):
    name: str  # a short word for the results
    identity: str  # a hash of all that the features depend on, weights included

    def __call__(self, pictures: Pictures) -> Features: ...


def digest(*parts: object) -> str:
    """A hash of arrays (their bytes) and of anything else (as it is written)."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        found.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
    return found.hexdigest()


class Pixels:
    """The values of the picture shrunk to side × side (triangle filter, antialiased): composition and colour, no detail."""

    def __init__(self, side: int = 16):
        self.side, self.name, self.identity = side, f"pixels{side}", digest("pixels, linear, antialiased", side)

    def __call__(self, pictures: Pictures) -> Features:
        return np.asarray(_shrunk(pictures, self.side)).reshape(len(pictures), -1)


@partial(jax.jit, static_argnames="side")
def _shrunk(pictures: Float[Array, "b height width 3"], side: int) -> Float32[Array, "b side side 3"]:
    shape = (len(pictures), side, side, 3)
    return jax.image.resize(pictures.astype(jnp.float32), shape, "linear", precision=jax.lax.Precision.HIGHEST)


class RandomNetwork:
    """A convolutional network with random weights that are never trained: textures and edges as it happens to see them.

    Four 3×3 convolutions of stride 2, each with a ReLU; the features are the means of their channels over the picture. Such networks
    tell sets of pictures apart without the bias of a training set (arXiv 2002.09797), but they are no judge of what people see.
    """

    name = "random-network"

    def __init__(self, seed: int = 0, widths: tuple[int, ...] = (32, 64, 128, 256)):
        self.kernels = []
        for level, (inner, outer) in enumerate(zip((3, *widths), widths)):
            draw = np.random.Generator(np.random.Philox(key=[seed, level])).random((3, 3, inner, outer))
            self.kernels.append((scipy.special.ndtri(draw) * np.sqrt(2 / (9 * inner))).astype(np.float32))
        self.identity = digest("convolutions of stride 2, ReLU, means", *self.kernels)

    def __call__(self, pictures: Pictures) -> Features:
        return np.asarray(_means(self.kernels, pictures))


@jax.jit
def _means(kernels: list[Float32[Array, "3 3 inner outer"]], pictures: Float[Array, "b height width 3"]) -> Float32[Array, "b d"]:
    x, found = pictures.astype(jnp.float32), []
    for kernel in kernels:
        x = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=jax.lax.Precision.HIGHEST
        )
        x = jax.nn.relu(x)
        found.append(x.mean(axis=(1, 2)))
    return jnp.concatenate(found, axis=1)


def extract(batches: Iterable[Pictures], extractor: Extractor) -> Features:
    """The features of all pictures, in order. Raises DataError when there are none and when their values are not finite."""
    found: list[np.ndarray] = []
    for pictures in batches:
        if np.ndim(pictures) != 4:
            raise DataError(f"Batches of pictures have 4 axes, and this one is of shape {np.shape(pictures)}: give a list of batches.")
        features = extractor(pictures)
        if bad := np.flatnonzero(~np.isfinite(features).all(axis=1)).tolist():
            raise DataError(
                f"Picture {sum(map(len, found)) + bad[0]} has {extractor.name} features that are not finite: look at its values."
            )
        found.append(features)
    if not found:
        raise DataError("There are no pictures to take features of.")
    return np.concatenate(found)


def kept_features(folder: str | Path, extractor: Extractor, fingerprint: str, count: int, batches: Iterable[Pictures]) -> Features:
    """The features of `count` real pictures: from `folder` where they were taken before, else from `batches`, and then kept there.

    fingerprint: a hash of the pictures as they are given, so also of their size and crop. A file is used only when it says that it was
    made by this extractor from these pictures; any other is made anew. Raises DataError when the batches hold another number of pictures.
    """
    provenance = {"extractor": extractor.name, "identity": extractor.identity, "data": fingerprint, "count": count}
    path = Path(folder).expanduser() / f"{extractor.name}-{digest(provenance)[:16]}.safetensors"
    kept = _read(path, provenance)
    if kept is not None:
        return kept
    features = extract(batches, extractor)
    if len(features) != count:
        raise DataError(f"{count} pictures were promised, and there are {len(features)}.")
    metadata = {METADATA_KEY: json.dumps(provenance)}
    write_safetensors(path, {"features": features.shape}, {"features": FLOAT32}, lambda _: features, metadata)
    return features


def _read(path: Path, provenance: dict[str, object]) -> Features | None:
    """None for a file that is not there, not whole, or of another provenance."""
    try:
        file = open_tensors(path)
        if json.loads(file.metadata[METADATA_KEY]) != provenance:
            return None
        return file["features"]
    except (CheckpointError, KeyError, ValueError):
        return None
