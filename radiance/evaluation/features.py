"""Feature extractors: what images are turned into before sets of them are compared, and where the features of real ones are kept.

An extractor goes by its name in every result, `FD(pixels16)`, for a distance without its features
is no number. The two here need no file; `evaluation/inception.py` has the one of the literature.
"""

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

from radiance.base.errors import CheckpointError
from radiance.base.hashing import hash_parts
from radiance.data.datasets import DataError
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors

Images = Float[np.ndarray, "b height width 3"]  # in [-1, 1]
Features = Float32[np.ndarray, "b d"]

FEATURES_METADATA_KEY = "radiance.features"
FLOAT32 = np.dtype(np.float32)


class Extractor(Protocol):
    name: str  # a short word for the results
    identity: str  # a hash of all that the features depend on, weights included

    def __call__(self, images: Images) -> Features: ...


class PixelExtractor:
    """The values of the image shrunk to side × side (triangle filter, antialiased): composition and color, no detail."""

    def __init__(self, resolution: int = 16):
        self.resolution, self.name, self.identity = (
            resolution,
            f"pixels{resolution}",
            hash_parts("pixels, linear, antialiased", resolution),
        )

    def __call__(self, images: Images) -> Features:
        return np.asarray(_downsample(images, self.resolution)).reshape(len(images), -1)


@partial(jax.jit, static_argnames="resolution")
def _downsample(
    images: Float[Array, "b height width 3"], resolution: int
) -> Float32[Array, "b side side 3"]:
    shape = (len(images), resolution, resolution, 3)
    return jax.image.resize(
        images.astype(jnp.float32), shape, "linear", precision=jax.lax.Precision.HIGHEST
    )


class RandomNetworkExtractor:
    """A convolutional network with random weights that are never trained: textures and edges as it happens to see them.

    Four 3×3 convolutions of stride 2, each with a ReLU; the features are the means of their
    channels over the image. Such networks tell sets of images apart without the bias of a training
    set (arXiv 2002.09797), but they are no judge of what people see.
    """

    name = "random-network"

    def __init__(self, seed: int = 0, widths: tuple[int, ...] = (32, 64, 128, 256)):
        self.kernels = []
        for level, (in_channels, out_channels) in enumerate(zip((3, *widths), widths)):
            uniforms = np.random.Generator(np.random.Philox(key=[seed, level])).random(
                (3, 3, in_channels, out_channels)
            )
            self.kernels.append(
                (scipy.special.ndtri(uniforms) * np.sqrt(2 / (9 * in_channels))).astype(np.float32)
            )
        self.identity = hash_parts("convolutions of stride 2, ReLU, means", *self.kernels)

    def __call__(self, images: Images) -> Features:
        return np.asarray(_random_network_features(self.kernels, images))


@jax.jit
def _random_network_features(
    kernels: list[Float32[Array, "3 3 inner outer"]], images: Float[Array, "b height width 3"]
) -> Float32[Array, "b d"]:
    x, layer_means = images.astype(jnp.float32), []
    for kernel in kernels:
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (2, 2),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision=jax.lax.Precision.HIGHEST,
        )
        x = jax.nn.relu(x)
        layer_means.append(x.mean(axis=(1, 2)))
    return jnp.concatenate(layer_means, axis=1)


def extract_features(batches: Iterable[Images], extractor: Extractor) -> Features:
    """The features of all images, in order. Raises DataError when there are none and when their values are not finite."""
    feature_batches: list[np.ndarray] = []
    for images in batches:
        if np.ndim(images) != 4:
            raise DataError(
                f"Batches of images have 4 axes, and this one is of shape {np.shape(images)}: give "
                "a list of batches."
            )
        features = extractor(images)
        if nonfinite_rows := np.flatnonzero(~np.isfinite(features).all(axis=1)).tolist():
            raise DataError(
                f"Image {sum(map(len, feature_batches)) + nonfinite_rows[0]} has {extractor.name} "
                "features that are not finite: look at its values."
            )
        feature_batches.append(features)
    if not feature_batches:
        raise DataError("There are no images to take features of.")
    return np.concatenate(feature_batches)


def load_or_extract_features(
    cache_dir: str | Path,
    extractor: Extractor,
    fingerprint: str,
    count: int,
    batches: Iterable[Images],
) -> Features:
    """The features of `count` real images: from `folder` where they were taken before, else from `batches`, and then kept there.

    fingerprint: a hash of the images as they are given, so also of their size and crop. A file is
        used only when it says that it was made by this extractor from these images; any other is
        made anew. Raises DataError when the batches hold another number of images.
    """
    provenance = {
        "extractor": extractor.name,
        "identity": extractor.identity,
        "data": fingerprint,
        "count": count,
    }
    path = (
        Path(cache_dir).expanduser() / f"{extractor.name}-{hash_parts(provenance)[:16]}.safetensors"
    )
    cached_features = _read_features(path, provenance)
    if cached_features is not None:
        return cached_features
    features = extract_features(batches, extractor)
    if len(features) != count:
        raise DataError(f"{count} images were promised, and there are {len(features)}.")
    metadata = {FEATURES_METADATA_KEY: json.dumps(provenance)}
    write_safetensors(
        path, {"features": features.shape}, {"features": FLOAT32}, lambda _: features, metadata
    )
    return features


def _read_features(path: Path, provenance: dict[str, object]) -> Features | None:
    """None for a file that is not there, not whole, or of another provenance."""
    try:
        file = open_tensors(path)
        if json.loads(file.metadata[FEATURES_METADATA_KEY]) != provenance:
            return None
        return file["features"]
    except (CheckpointError, KeyError, ValueError):
        return None
