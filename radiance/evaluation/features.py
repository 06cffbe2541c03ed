"""Feature extractors for comparing sets of images, and a cache of the features of real images.

Every result names its extractor, as in `FD(pixels16)`: a distance without its features has no
meaning. The two extractors here need no file; `evaluation/inception.py` has the usual extractor of
FID, Inception-v3.
"""

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jaxtyping import Array, Float, Float32

from radiance.base.errors import CheckpointError, DataError
from radiance.base.hashing import hash_parts
from radiance.base.images import Images
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors

Features = Float32[np.ndarray, "_ d"]

FEATURES_METADATA_KEY = "radiance.features"
FLOAT32 = np.dtype(np.float32)


@runtime_checkable
class Extractor(Protocol):
    """A function from images to feature vectors.

    Attributes:
        name: A short word for results.
        identity: A hash of everything that the features depend on, including weights.
    """

    name: str
    identity: str

    def __call__(self, images: Images) -> Features:
        """Return the features of a batch."""
        ...


class PixelExtractor:
    """The values of a downsampled image: composition and color without detail.

    Args:
        resolution: Side of the downsampled image (triangle filter, antialiased).
    """

    def __init__(self, resolution: int = 16):
        self.resolution = resolution
        self.name = f"pixels{resolution}"
        self.identity = hash_parts("pixels, linear, antialiased", resolution)

    def __call__(self, images: Images) -> Features:
        """Return the features of a batch."""
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
    """A convolutional network with random weights, which responds to textures and edges.

    It has four 3×3 convolutions of stride 2 with ReLU; the features are the means of all channels
    over the image. Random networks distinguish sets of images without the bias of a training set
    (arXiv 2002.09797), but do not measure perceptual quality.

    Args:
        seed: Seed of the weights.
        widths: Channels of each convolution.
    """

    name = "random-network"

    def __init__(self, seed: int = 0, widths: tuple[int, ...] = (32, 64, 128, 256)):
        self.kernels = []
        for level, (in_channels, out_channels) in enumerate(zip((3, *widths), widths)):
            rng = np.random.Generator(np.random.Philox(key=[seed, level]))
            gaussians = scipy.special.ndtri(rng.random((3, 3, in_channels, out_channels)))
            kernel = gaussians * np.sqrt(2 / (9 * in_channels))
            self.kernels.append(kernel.astype(np.float32))
        self.identity = hash_parts("convolutions of stride 2, ReLU, means", *self.kernels)

    def __call__(self, images: Images) -> Features:
        """Return the features of a batch."""
        return np.asarray(_random_network_features(self.kernels, images))


@jax.jit
def _random_network_features(
    kernels: list[Float32[Array, "3 3 _ _"]], images: Float[Array, "b height width 3"]
) -> Float32[Array, "b d"]:
    x, channel_means = images.astype(jnp.float32), []
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
        channel_means.append(x.mean(axis=(1, 2)))
    return jnp.concatenate(channel_means, axis=1)


def extract_features(batches: Iterable[np.ndarray], extractor: Extractor) -> Features:
    """Return the features of all images, in order.

    Args:
        batches: Batches of images [b, height, width, 3] in [-1, 1].
        extractor: The function from images to features.

    Raises:
        DataError: There are no images, or some features are not finite.
    """
    feature_batches: list[Features] = []
    for images in batches:
        if np.ndim(images) != 4:
            raise DataError(
                f"Batches of images have 4 axes, not shape {np.shape(images)}: give a list of "
                "batches."
            )
        features = extractor(images)
        if nonfinite_rows := np.flatnonzero(~np.isfinite(features).all(axis=1)).tolist():
            index = sum(map(len, feature_batches)) + nonfinite_rows[0]
            raise DataError(
                f"Image {index} has {extractor.name} features that are not finite: look at its "
                "values."
            )
        feature_batches.append(features)
    if not feature_batches:
        raise DataError("There are no images to extract features from.")
    return np.concatenate(feature_batches)


def load_or_extract_features(
    cache_dir: str | Path,
    extractor: Extractor,
    fingerprint: str,
    count: int,
    batches: Iterable[Images],
) -> Features:
    """Return the features of real images, from the cache if they are there.

    A cached file is used only if its metadata names the same extractor and images; any other file
    is replaced.

    Args:
        cache_dir: Folder of the cache.
        extractor: Feature extractor.
        fingerprint: A hash of the images as they are passed, including their size and crop.
        count: Number of images.
        batches: The images; they are not iterated if the features are cached.

    Raises:
        DataError: The number of images is not `count`.
    """
    provenance = {
        "extractor": extractor.name,
        "identity": extractor.identity,
        "data": fingerprint,
        "count": count,
    }
    file_name = f"{extractor.name}-{hash_parts(provenance)[:16]}.safetensors"
    path = Path(cache_dir).expanduser() / file_name
    cached_features = _read_features(path, provenance)
    if cached_features is not None:
        return cached_features
    features = extract_features(batches, extractor)
    if len(features) != count:
        raise DataError(f"{count} images were expected, and there are {len(features)}.")
    metadata = {FEATURES_METADATA_KEY: json.dumps(provenance)}
    write_safetensors(
        path, {"features": features.shape}, {"features": FLOAT32}, lambda _: features, metadata
    )
    return features


def _read_features(path: Path, provenance: dict[str, object]) -> Features | None:
    """Return cached features, or None if the file is missing, damaged or of another provenance."""
    try:
        file = open_tensors(path)
        if json.loads(file.metadata[FEATURES_METADATA_KEY]) != provenance:
            return None
        features = file["features"]
    except (CheckpointError, KeyError, ValueError, TypeError, RecursionError):
        return None
    is_valid = features.ndim == 2 and features.dtype == FLOAT32 and np.isfinite(features).all()
    return features if is_valid and len(features) == provenance["count"] else None
