"""The Inception network of the Fréchet inception distance (arXiv 1706.08500), with weights from a user's file.

FD(inception) is what the literature calls FID. The weights are those of the TensorFlow graph of 2015-12-05 in their PyTorch form, as
pytorch-fid and torch-fidelity name them. The network is Inception v3 (arXiv 1512.00567) as torchvision has it, but for:

- the average pools of the blocks 5b to 7b divide by the number of places inside the picture, where torchvision counts the padding too;
- the last block, 7c, has a maximum pool in place of the average;
- there are 1008 classes, whose layer is not used here, and no auxiliary classifier.

Pictures are rounded to 8 bits, enlarged as TensorFlow 1 did, and scaled to (x − 128) / 128, as in the original, in ADM's suite and in
torch-fidelity. (pytorch-fid enlarges between pixel centres and scales to x / 127.5 − 1: its numbers differ a little from these.)
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float32

from radiance.evaluation.features import Features, Pictures, digest
from radiance.weights.detect import check_shapes
from radiance.weights.files import CheckpointError, Shapes, Tensors, open_tensors

SIDE = 299
EPSILON = 1e-3  # of the batch norms
FIRST, CLASSES = "Conv2d_1a_3x3.conv.weight", "fc.weight"
NORM = ("weight", "bias", "running_mean", "running_var")

Picture = Float32[Array, "b height width c"]
Conv = Callable[..., Picture]  # (name, x, channels, (height, width), stride=1) → x; a stride of 2 has no padding
Params = dict[str, tuple[Float32[Array, "height width inner outer"], Float32[Array, " outer"]]]  # kernel and bias of every convolution


class Inception:
    """The extractor. Raises CheckpointError for a file that holds something else."""

    name = "inception"

    def __init__(self, path: str | Path):
        file = open_tensors(path)
        check_file(file)
        self.params = load(file)
        self.identity = digest(
            "inception 2015-12-05, 8 bits, resized as TensorFlow 1", file.fingerprint({key: key for key in tensor_shapes()})
        )

    def __call__(self, pictures: Pictures) -> Features:
        with jax.default_matmul_precision("highest"):
            return np.asarray(_features(self.params, pictures))


@jax.jit
def _features(params: Params, pictures: Float[Array, "b height width 3"]) -> Float32[Array, "b 2048"]:
    return network(partial(convolve, params), preprocess(pictures))


def preprocess(pictures: Float[Array, "b height width 3"]) -> Float32[Array, "b 299 299 3"]:
    """Pictures in [-1, 1] as the network takes them: in steps of 8 bits, 299 × 299, in [-1, 0.992]."""
    x = jnp.clip(jnp.rint((pictures.astype(jnp.float32) + 1) * 127.5), 0, 255)
    rows, columns = (_interpolation(n) for n in x.shape[1:3])
    return (jnp.einsum("ph,qw,bhwc->bpqc", rows, columns, x) - 128) / 128


def _interpolation(n: int) -> Float32[np.ndarray, "299 n"]:
    """Bilinear weights from n pixels to 299, at the places i · n / 299: the first pixels coincide, and not the middles."""
    place = np.arange(SIDE, dtype=np.float32) * np.float32(n / SIDE)
    below = np.minimum(place.astype(int), n - 1)
    weights, rows = np.zeros((SIDE, n), np.float32), np.arange(SIDE)
    np.add.at(weights, (rows, below), 1 - (place - below))
    np.add.at(weights, (rows, np.minimum(below + 1, n - 1)), place - below)
    return weights


# --- the network ------------------------------------------------------------------------------------------------------
# Written once, over a `conv`, so that one pass of shapes alone tells what the file must hold. Names are those of the file.


def network(conv: Conv, x: Float32[Array, "b 299 299 3"]) -> Float32[Array, "b 2048"]:
    x = conv("Conv2d_1a_3x3", x, 32, (3, 3), stride=2)
    x = conv("Conv2d_2a_3x3", x, 32, (3, 3), padding="VALID")
    x = conv("Conv2d_2b_3x3", x, 64, (3, 3))
    x = max_pool(x)
    x = conv("Conv2d_3b_1x1", x, 80, (1, 1))
    x = conv("Conv2d_4a_3x3", x, 192, (3, 3), padding="VALID")
    x = max_pool(x)
    for name, pooled in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
        x = squares(conv, name, x, pooled)
    x = smaller(conv, "Mixed_6a", x)
    for name, inner in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        x = lines(conv, name, x, inner)
    x = smallest(conv, "Mixed_7a", x)
    x = forks(conv, "Mixed_7b", x, mean_pool)
    x = forks(conv, "Mixed_7c", x, partial(max_pool, stride=1))
    return x.mean(axis=(1, 2))


def squares(conv: Conv, name: str, x: Picture, pooled: int) -> Picture:
    """1×1, 5×5 and two 3×3 side by side."""
    wide = conv(f"{name}.branch5x5_1", x, 48, (1, 1))
    wide = conv(f"{name}.branch5x5_2", wide, 64, (5, 5))
    deep = conv(f"{name}.branch3x3dbl_1", x, 64, (1, 1))
    deep = conv(f"{name}.branch3x3dbl_2", deep, 96, (3, 3))
    deep = conv(f"{name}.branch3x3dbl_3", deep, 96, (3, 3))
    return join(conv(f"{name}.branch1x1", x, 64, (1, 1)), wide, deep, conv(f"{name}.branch_pool", mean_pool(x), pooled, (1, 1)))


def smaller(conv: Conv, name: str, x: Picture) -> Picture:
    """From 35 to 17 places along a side."""
    deep = conv(f"{name}.branch3x3dbl_1", x, 64, (1, 1))
    deep = conv(f"{name}.branch3x3dbl_2", deep, 96, (3, 3))
    deep = conv(f"{name}.branch3x3dbl_3", deep, 96, (3, 3), stride=2)
    return join(conv(f"{name}.branch3x3", x, 384, (3, 3), stride=2), deep, max_pool(x))


def lines(conv: Conv, name: str, x: Picture, inner: int) -> Picture:
    """7×7 as a row and a column of seven, once and twice."""
    once = conv(f"{name}.branch7x7_1", x, inner, (1, 1))
    once = conv(f"{name}.branch7x7_2", once, inner, (1, 7))
    once = conv(f"{name}.branch7x7_3", once, 192, (7, 1))
    twice = conv(f"{name}.branch7x7dbl_1", x, inner, (1, 1))
    twice = conv(f"{name}.branch7x7dbl_2", twice, inner, (7, 1))
    twice = conv(f"{name}.branch7x7dbl_3", twice, inner, (1, 7))
    twice = conv(f"{name}.branch7x7dbl_4", twice, inner, (7, 1))
    twice = conv(f"{name}.branch7x7dbl_5", twice, 192, (1, 7))
    return join(conv(f"{name}.branch1x1", x, 192, (1, 1)), once, twice, conv(f"{name}.branch_pool", mean_pool(x), 192, (1, 1)))


def smallest(conv: Conv, name: str, x: Picture) -> Picture:
    """From 17 to 8 places along a side."""
    short = conv(f"{name}.branch3x3_1", x, 192, (1, 1))
    short = conv(f"{name}.branch3x3_2", short, 320, (3, 3), stride=2)
    long = conv(f"{name}.branch7x7x3_1", x, 192, (1, 1))
    long = conv(f"{name}.branch7x7x3_2", long, 192, (1, 7))
    long = conv(f"{name}.branch7x7x3_3", long, 192, (7, 1))
    long = conv(f"{name}.branch7x7x3_4", long, 192, (3, 3), stride=2)
    return join(short, long, max_pool(x))


def forks(conv: Conv, name: str, x: Picture, pool: Callable[[Picture], Picture]) -> Picture:
    """Branches that end in a row and a column of three side by side."""
    short = conv(f"{name}.branch3x3_1", x, 384, (1, 1))
    short = join(conv(f"{name}.branch3x3_2a", short, 384, (1, 3)), conv(f"{name}.branch3x3_2b", short, 384, (3, 1)))
    deep = conv(f"{name}.branch3x3dbl_1", x, 448, (1, 1))
    deep = conv(f"{name}.branch3x3dbl_2", deep, 384, (3, 3))
    deep = join(conv(f"{name}.branch3x3dbl_3a", deep, 384, (1, 3)), conv(f"{name}.branch3x3dbl_3b", deep, 384, (3, 1)))
    return join(conv(f"{name}.branch1x1", x, 320, (1, 1)), short, deep, conv(f"{name}.branch_pool", pool(x), 192, (1, 1)))


def join(*branches: Picture) -> Picture:
    return jnp.concatenate(branches, axis=-1)


def max_pool(x: Picture, stride: int = 2) -> Picture:
    padding = "SAME" if stride == 1 else "VALID"
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, stride, stride, 1), padding)


def mean_pool(x: Picture) -> Picture:
    """Over the places of a 3×3 window that lie inside the picture."""
    total, places = (lax.reduce_window(y, 0.0, lax.add, (1, 3, 3, 1), (1, 1, 1, 1), "SAME") for y in (x, jnp.ones_like(x[:1, :, :, :1])))
    return total / places


def convolve(
    params: Params, name: str, x: Picture, channels: int, size: tuple[int, int], stride: int = 1, padding: str = "SAME"
) -> Picture:
    """With the batch norm, which `load` has put into the kernel, and a ReLU."""
    kernel, bias = params[name]
    strided = dict(window_strides=(stride, stride), padding="VALID" if stride == 2 else padding)
    return jax.nn.relu(lax.conv_general_dilated(x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **strided) + bias)


# --- the file ---------------------------------------------------------------------------------------------------------


@cache
def kernel_shapes() -> dict[str, tuple[int, int, int, int]]:
    """[height, width, in, out] of every convolution, found by following the shapes through the network."""
    found = {}

    def conv(name, x, channels, size, **window):
        found[name] = (*size, x.shape[-1], channels)
        return convolve({name: (jnp.zeros(found[name]), jnp.zeros(channels))}, name, x, channels, size, **window)

    jax.eval_shape(partial(network, conv), jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32))
    return found


def tensor_shapes() -> Shapes:
    """Names and shapes of the tensors in a file that are used."""
    found = {}
    for name, (height, width, inner, outer) in kernel_shapes().items():
        found[f"{name}.conv.weight"] = (outer, inner, height, width)
        found |= {f"{name}.bn.{key}": (outer,) for key in NORM}
    return found


def check_file(file: Tensors):
    """Raises CheckpointError, also for torchvision's weights, which have the same names and shapes but for the classes."""
    if FIRST not in file.shapes:
        raise CheckpointError(f"{file.path} holds no Inception v3 (it has no {FIRST}): give the weights of FID, pt_inception-2015-12-05.")
    if file.shapes.get(CLASSES, (1008,))[0] != 1008 or any(key.startswith("AuxLogits.") for key in file.shapes):
        raise CheckpointError(
            f"{file.path} holds the Inception v3 of torchvision, whose features are others: give the weights of FID, "
            "pt_inception-2015-12-05, as safetensors."
        )
    unused = (CLASSES, "fc.bias")
    found = {key: shape for key, shape in file.shapes.items() if key not in unused and not key.endswith(".num_batches_tracked")}
    check_shapes(tensor_shapes(), found, file.path)


def load(file: Tensors) -> Params:
    """Kernels and biases with the batch norms put in: γ (w x − μ) / √(σ² + ε) + β is one convolution."""
    params = {}
    for name in kernel_shapes():
        scale, shift, mean, variance = (file[f"{name}.bn.{key}"].astype(np.float64) for key in NORM)
        factor = scale / np.sqrt(variance + EPSILON)
        kernel = file[f"{name}.conv.weight"].transpose(2, 3, 1, 0) * factor
        params[name] = (jnp.asarray(kernel, jnp.float32), jnp.asarray(shift - mean * factor, jnp.float32))
    return params
