"""The Inception network of the Fréchet inception distance, FID (arXiv 1706.08500).

FD(inception) is what the literature calls FID. The user's file has the weights of the TensorFlow
graph of 2015-12-05 in their PyTorch form, with the tensor names of pytorch-fid and torch-fidelity.
The network is Inception v3 (arXiv 1512.00567) as in torchvision, except that:

- the average pools of the blocks 5b to 7b divide by the number of positions inside the image, where
  torchvision counts the padding too;
- the last block, 7c, has a max pool instead of the average pool;
- there are 1008 classes, whose layer is not used here, and no auxiliary classifier.

Images are rounded to 8 bits, resized as in TensorFlow 1, and scaled to (x − 128) / 128, as in the
original, in ADM's suite and in torch-fidelity. (pytorch-fid aligns pixel centers when it resizes,
and scales to x / 127.5 − 1: its values differ a little from these.)
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from radiance.base.errors import CheckpointError
from radiance.base.hashing import hash_parts
from radiance.base.images import Images
from radiance.evaluation.features import Features
from radiance.weights.detect import check_shapes
from radiance.weights.opening import open_tensors
from radiance.weights.tensors import Tensors, TensorShapes

INPUT_RESOLUTION = 299  # pixels
BATCH_NORM_EPSILON = 1e-3
FIRST_KERNEL, CLASS_WEIGHT = "Conv2d_1a_3x3.conv.weight", "fc.weight"
BATCH_NORM_KEYS = ("weight", "bias", "running_mean", "running_var")

FeatureMap = Float32[Array, "b _ _ _"]
# conv(name, x, out_channels, kernel_size, stride=1, padding="SAME"); a stride of 2 has no padding.
Conv = Callable[..., FeatureMap]
# Kernel and bias of every convolution by name.
InceptionParams = dict[str, tuple[Float32[Array, "_ _ _ _"], Float32[Array, " _"]]]


class InceptionExtractor:
    """The pooled features of FID's Inception network, 2048 per image.

    Args:
        path: A file with the network's weights.

    Raises:
        CheckpointError: The file has other weights.
    """

    name = "inception"

    def __init__(self, path: str | Path):
        file = open_tensors(path)
        check_inception_file(file)
        self.params = load_inception_params(file)
        self.identity = hash_parts(
            "inception 2015-12-05, 8 bits, resized as TensorFlow 1",
            file.fingerprint({key: key for key in inception_tensor_shapes()}),
        )

    def __call__(self, images: Images) -> Features:
        """Return the features of a batch."""
        with jax.default_matmul_precision("highest"):
            return np.asarray(_extract_features(self.params, images))


@jax.jit
def _extract_features(
    params: InceptionParams, images: Float[Array, "b height width 3"]
) -> Float32[Array, "b 2048"]:
    return inception_v3(partial(convolve, params), preprocess_images(images))


def preprocess_images(images: Float[Array, "b height width 3"]) -> Float32[Array, "b 299 299 3"]:
    """Round images in [-1, 1] to 8 bits, resize them to 299 × 299 and scale to [-1, 0.992]."""
    x = jnp.clip(jnp.rint((images.astype(jnp.float32) + 1) * 127.5), 0, 255)
    row_weights, column_weights = (_interpolation_weights(n) for n in x.shape[1:3])
    return (jnp.einsum("ph,qw,bhwc->bpqc", row_weights, column_weights, x) - 128) / 128


def _interpolation_weights(n: int) -> Float32[np.ndarray, "299 n"]:
    """Return bilinear weights from n pixels to 299 at positions i · n / 299.

    As in TensorFlow 1, the first pixels are aligned, not the centers.
    """
    positions = np.arange(INPUT_RESOLUTION, dtype=np.float32) * np.float32(n / INPUT_RESOLUTION)
    lower = np.minimum(positions.astype(int), n - 1)
    weights = np.zeros((INPUT_RESOLUTION, n), np.float32)
    rows = np.arange(INPUT_RESOLUTION)
    np.add.at(weights, (rows, lower), 1 - (positions - lower))
    np.add.at(weights, (rows, np.minimum(lower + 1, n - 1)), positions - lower)
    return weights


# --- the network ---------------------------------------------------------------------------------
# The network is a function of `conv`, so that an abstract evaluation gives all shapes of a file.
# Blocks have torchvision's names, and convolutions those of the file.


def inception_v3(conv: Conv, x: Float32[Array, "b 299 299 3"]) -> Float32[Array, "b 2048"]:
    """Return the pooled features of preprocessed images."""
    x = conv("Conv2d_1a_3x3", x, 32, (3, 3), stride=2)
    x = conv("Conv2d_2a_3x3", x, 32, (3, 3), padding="VALID")
    x = conv("Conv2d_2b_3x3", x, 64, (3, 3))
    x = max_pool(x)
    x = conv("Conv2d_3b_1x1", x, 80, (1, 1))
    x = conv("Conv2d_4a_3x3", x, 192, (3, 3), padding="VALID")
    x = max_pool(x)
    for name, pool_features in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = inception_a(conv, name, x, pool_features)
    x = inception_b(conv, "Mixed_6a", x)
    for name, channels_7x7 in (
        ("Mixed_6b", 128),
        ("Mixed_6c", 160),
        ("Mixed_6d", 160),
        ("Mixed_6e", 192),
    ):
        x = inception_c(conv, name, x, channels_7x7)
    x = inception_d(conv, "Mixed_7a", x)
    x = inception_e(conv, "Mixed_7b", x, avg_pool)
    x = inception_e(conv, "Mixed_7c", x, partial(max_pool, stride=1))
    return x.mean(axis=(1, 2))


def inception_a(conv: Conv, name: str, x: FeatureMap, pool_features: int) -> FeatureMap:
    """Apply torchvision's InceptionA: branches of 1×1, 5×5, two 3×3, and a pool."""
    branch5x5 = conv(f"{name}.branch5x5_1", x, 48, (1, 1))
    branch5x5 = conv(f"{name}.branch5x5_2", branch5x5, 64, (5, 5))
    branch3x3dbl = conv(f"{name}.branch3x3dbl_1", x, 64, (1, 1))
    branch3x3dbl = conv(f"{name}.branch3x3dbl_2", branch3x3dbl, 96, (3, 3))
    branch3x3dbl = conv(f"{name}.branch3x3dbl_3", branch3x3dbl, 96, (3, 3))
    return concat_branches(
        conv(f"{name}.branch1x1", x, 64, (1, 1)),
        branch5x5,
        branch3x3dbl,
        conv(f"{name}.branch_pool", avg_pool(x), pool_features, (1, 1)),
    )


def inception_b(conv: Conv, name: str, x: FeatureMap) -> FeatureMap:
    """Apply torchvision's InceptionB, which reduces 35×35 positions to 17×17."""
    branch3x3dbl = conv(f"{name}.branch3x3dbl_1", x, 64, (1, 1))
    branch3x3dbl = conv(f"{name}.branch3x3dbl_2", branch3x3dbl, 96, (3, 3))
    branch3x3dbl = conv(f"{name}.branch3x3dbl_3", branch3x3dbl, 96, (3, 3), stride=2)
    return concat_branches(
        conv(f"{name}.branch3x3", x, 384, (3, 3), stride=2), branch3x3dbl, max_pool(x)
    )


def inception_c(conv: Conv, name: str, x: FeatureMap, channels_7x7: int) -> FeatureMap:
    """Apply torchvision's InceptionC: branches of 1×1, one and two factorized 7×7, and a pool."""
    branch7x7 = conv(f"{name}.branch7x7_1", x, channels_7x7, (1, 1))
    branch7x7 = conv(f"{name}.branch7x7_2", branch7x7, channels_7x7, (1, 7))
    branch7x7 = conv(f"{name}.branch7x7_3", branch7x7, 192, (7, 1))
    branch7x7dbl = conv(f"{name}.branch7x7dbl_1", x, channels_7x7, (1, 1))
    branch7x7dbl = conv(f"{name}.branch7x7dbl_2", branch7x7dbl, channels_7x7, (7, 1))
    branch7x7dbl = conv(f"{name}.branch7x7dbl_3", branch7x7dbl, channels_7x7, (1, 7))
    branch7x7dbl = conv(f"{name}.branch7x7dbl_4", branch7x7dbl, channels_7x7, (7, 1))
    branch7x7dbl = conv(f"{name}.branch7x7dbl_5", branch7x7dbl, 192, (1, 7))
    return concat_branches(
        conv(f"{name}.branch1x1", x, 192, (1, 1)),
        branch7x7,
        branch7x7dbl,
        conv(f"{name}.branch_pool", avg_pool(x), 192, (1, 1)),
    )


def inception_d(conv: Conv, name: str, x: FeatureMap) -> FeatureMap:
    """Apply torchvision's InceptionD, which reduces 17×17 positions to 8×8."""
    branch3x3 = conv(f"{name}.branch3x3_1", x, 192, (1, 1))
    branch3x3 = conv(f"{name}.branch3x3_2", branch3x3, 320, (3, 3), stride=2)
    branch7x7x3 = conv(f"{name}.branch7x7x3_1", x, 192, (1, 1))
    branch7x7x3 = conv(f"{name}.branch7x7x3_2", branch7x7x3, 192, (1, 7))
    branch7x7x3 = conv(f"{name}.branch7x7x3_3", branch7x7x3, 192, (7, 1))
    branch7x7x3 = conv(f"{name}.branch7x7x3_4", branch7x7x3, 192, (3, 3), stride=2)
    return concat_branches(branch3x3, branch7x7x3, max_pool(x))


def inception_e(
    conv: Conv, name: str, x: FeatureMap, pool: Callable[[FeatureMap], FeatureMap]
) -> FeatureMap:
    """Apply torchvision's InceptionE, whose branches end in 1×3 beside 3×1 convolutions."""
    branch3x3 = conv(f"{name}.branch3x3_1", x, 384, (1, 1))
    branch3x3 = concat_branches(
        conv(f"{name}.branch3x3_2a", branch3x3, 384, (1, 3)),
        conv(f"{name}.branch3x3_2b", branch3x3, 384, (3, 1)),
    )
    branch3x3dbl = conv(f"{name}.branch3x3dbl_1", x, 448, (1, 1))
    branch3x3dbl = conv(f"{name}.branch3x3dbl_2", branch3x3dbl, 384, (3, 3))
    branch3x3dbl = concat_branches(
        conv(f"{name}.branch3x3dbl_3a", branch3x3dbl, 384, (1, 3)),
        conv(f"{name}.branch3x3dbl_3b", branch3x3dbl, 384, (3, 1)),
    )
    return concat_branches(
        conv(f"{name}.branch1x1", x, 320, (1, 1)),
        branch3x3,
        branch3x3dbl,
        conv(f"{name}.branch_pool", pool(x), 192, (1, 1)),
    )


def concat_branches(*branches: FeatureMap) -> FeatureMap:
    """Concatenate the channels of all branches."""
    return jnp.concatenate(branches, axis=-1)


def max_pool(x: FeatureMap, stride: int = 2) -> FeatureMap:
    """Return the maxima of 3×3 windows; with a stride of 1 the size stays."""
    padding = "SAME" if stride == 1 else "VALID"
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def avg_pool(x: FeatureMap) -> FeatureMap:
    """Return the means of 3×3 windows over the positions inside the image."""
    sums, counts = (
        lax.reduce_window(y, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME")
        for y in (x, jnp.ones_like(x[:1, :, :, :1]))
    )
    return sums / counts


def convolve(
    params: InceptionParams,
    name: str,
    x: FeatureMap,
    out_channels: int,
    kernel_size: tuple[int, int],
    stride: int = 1,
    padding: str = "SAME",
) -> FeatureMap:
    """Apply a convolution, its batch norm (folded into the kernel) and ReLU."""
    kernel, bias = params[name]
    y = lax.conv_general_dilated(
        x,
        kernel,
        window_strides=(stride, stride),
        padding="VALID" if stride == 2 else padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return jax.nn.relu(y + bias)


# --- the file ------------------------------------------------------------------------------------


@cache
def kernel_shapes() -> dict[str, tuple[int, int, int, int]]:
    """Return the shape [height, width, in, out] of every kernel, by abstract evaluation."""
    shapes = {}

    def conv(name, x, out_channels, kernel_size, **window):
        shapes[name] = (*kernel_size, x.shape[-1], out_channels)
        return convolve(
            {name: (jnp.zeros(shapes[name]), jnp.zeros(out_channels))},
            name,
            x,
            out_channels,
            kernel_size,
            **window,
        )

    jax.eval_shape(
        partial(inception_v3, conv),
        jax.ShapeDtypeStruct((1, INPUT_RESOLUTION, INPUT_RESOLUTION, 3), jnp.float32),
    )
    return shapes


def inception_tensor_shapes() -> TensorShapes:
    """Return names and shapes of all tensors that are read from a file."""
    shapes = {}
    for name, (height, width, in_channels, out_channels) in kernel_shapes().items():
        shapes[f"{name}.conv.weight"] = (out_channels, in_channels, height, width)
        shapes |= {f"{name}.bn.{key}": (out_channels,) for key in BATCH_NORM_KEYS}
    return shapes


def check_inception_file(file: Tensors):
    """Check that a file has the weights of FID.

    Torchvision's weights have the same names and shapes except for the number of classes.

    Raises:
        CheckpointError: The file has other weights.
    """
    if FIRST_KERNEL not in file.shapes:
        raise CheckpointError(
            f"{file.path} has no Inception v3 (there is no {FIRST_KERNEL}): give the weights of "
            "FID, pt_inception-2015-12-05."
        )
    if file.shapes.get(CLASS_WEIGHT, (1008,))[0] != 1008 or any(
        key.startswith("AuxLogits.") for key in file.shapes
    ):
        raise CheckpointError(
            f"{file.path} has the Inception v3 of torchvision, whose features differ: give "
            "the weights of FID, pt_inception-2015-12-05, as safetensors."
        )
    unused = (CLASS_WEIGHT, "fc.bias")
    used_shapes = {
        key: shape
        for key, shape in file.shapes.items()
        if key not in unused and not key.endswith(".num_batches_tracked")
    }
    check_shapes(inception_tensor_shapes(), used_shapes, file.path)


def load_inception_params(file: Tensors) -> InceptionParams:
    """Return kernels and biases with the batch norms folded in.

    A convolution followed by its batch norm, γ (w x − μ) / √(σ² + ε) + β, is one convolution.
    """
    params = {}
    for name in kernel_shapes():
        scale, shift, mean, variance = (
            file[f"{name}.bn.{key}"].astype(np.float64) for key in BATCH_NORM_KEYS
        )
        factor = scale / np.sqrt(variance + BATCH_NORM_EPSILON)
        kernel = file[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * factor
        params[name] = (
            jnp.asarray(kernel, jnp.float32),
            jnp.asarray(shift - mean * factor, jnp.float32),
        )
    return params
