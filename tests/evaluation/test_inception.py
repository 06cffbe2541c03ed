"""The Inception network of FID with random weights, against a PyTorch version from the paper."""

from functools import cache, partial
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from safetensors.numpy import save_file

from radiance.base.errors import CheckpointError
from radiance.base.images import to_image
from radiance.evaluation import inception
from radiance.evaluation.inception import InceptionExtractor
from radiance.weights.tensors import TensorLocation, Tensors


@cache
def tensors():
    """Return all tensors of a file, including unused ones.

    Norms are far from the identity, and the variance of activations stays about 1.
    """
    rng = np.random.default_rng(0)
    weights = {
        "fc.weight": np.zeros((1008, 2048), np.float32),
        "fc.bias": np.zeros(1008, np.float32),
    }
    for name, (height, width, inner, outer) in inception.kernel_shapes().items():
        std = np.sqrt(2 / (height * width * inner))
        weights[f"{name}.conv.weight"] = std * rng.standard_normal(
            (outer, inner, height, width), np.float32
        )
        weights[f"{name}.bn.weight"], weights[f"{name}.bn.running_var"] = rng.uniform(
            0.7, 1.3, (2, outer)
        )
        weights[f"{name}.bn.bias"], weights[f"{name}.bn.running_mean"] = rng.normal(
            0, 0.2, (2, outer)
        )
        weights[f"{name}.bn.num_batches_tracked"] = np.zeros((), np.int64)
    return {key: x if x.dtype == np.int64 else x.astype(np.float32) for key, x in weights.items()}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("inception") / "inception.safetensors"
    save_file(tensors(), path)
    return path


def natural_images(count, height, width):
    """Return smooth images with details, and a few values out of range."""
    rough = np.random.default_rng(5).standard_normal((count, height, width, 3))
    return (
        1.5 * scipy.ndimage.gaussian_filter(rough, (0, 5, 5, 0)) / 0.06 * 0.4 + 0.1 * rough
    ).astype(np.float32)


# --- the reference -------------------------------------------------------------------------------


# Blocks are (input channels, layers, branches). A layer is (input layer or None for the block's
# input, output channels, kernel size, stride); a branch is a chain of layers.
ONE, THREE, FIVE, ROW, COLUMN = (1, 1), (3, 3), (5, 5), (1, 7), (7, 1)


def figure_5(inner, pooled):
    layers = {
        "branch1x1": (None, 64, ONE, 1),
        "branch5x5_1": (None, 48, ONE, 1),
        "branch5x5_2": ("branch5x5_1", 64, FIVE, 1),
        "branch3x3dbl_1": (None, 64, ONE, 1),
        "branch3x3dbl_2": ("branch3x3dbl_1", 96, THREE, 1),
        "branch3x3dbl_3": ("branch3x3dbl_2", 96, THREE, 1),
        "branch_pool": (None, pooled, ONE, 1),
    }
    deep = [f"branch3x3dbl_{i}" for i in (1, 2, 3)]
    return (
        inner,
        layers,
        [["branch1x1"], ["branch5x5_1", "branch5x5_2"], deep, ["pool", "branch_pool"]],
    )


def to_17():
    layers = {
        "branch3x3": (None, 384, THREE, 2),
        "branch3x3dbl_1": (None, 64, ONE, 1),
        "branch3x3dbl_2": ("branch3x3dbl_1", 96, THREE, 1),
        "branch3x3dbl_3": ("branch3x3dbl_2", 96, THREE, 2),
    }
    deep = [f"branch3x3dbl_{i}" for i in (1, 2, 3)]
    return 288, layers, [["branch3x3"], deep, ["pool"]]


def figure_6(c):
    layers = {
        "branch1x1": (None, 192, ONE, 1),
        "branch7x7_1": (None, c, ONE, 1),
        "branch7x7_2": ("branch7x7_1", c, ROW, 1),
        "branch7x7_3": ("branch7x7_2", 192, COLUMN, 1),
        "branch7x7dbl_1": (None, c, ONE, 1),
        "branch7x7dbl_2": ("branch7x7dbl_1", c, COLUMN, 1),
        "branch7x7dbl_3": ("branch7x7dbl_2", c, ROW, 1),
        "branch7x7dbl_4": ("branch7x7dbl_3", c, COLUMN, 1),
        "branch7x7dbl_5": ("branch7x7dbl_4", 192, ROW, 1),
        "branch_pool": (None, 192, ONE, 1),
    }
    once, twice = (
        [f"branch7x7_{i}" for i in (1, 2, 3)],
        [f"branch7x7dbl_{i}" for i in (1, 2, 3, 4, 5)],
    )
    return 768, layers, [["branch1x1"], once, twice, ["pool", "branch_pool"]]


def to_8():
    layers = {
        "branch3x3_1": (None, 192, ONE, 1),
        "branch3x3_2": ("branch3x3_1", 320, THREE, 2),
        "branch7x7x3_1": (None, 192, ONE, 1),
        "branch7x7x3_2": ("branch7x7x3_1", 192, ROW, 1),
        "branch7x7x3_3": ("branch7x7x3_2", 192, COLUMN, 1),
        "branch7x7x3_4": ("branch7x7x3_3", 192, THREE, 2),
    }
    long = [f"branch7x7x3_{i}" for i in (1, 2, 3, 4)]
    return 768, layers, [["branch3x3_1", "branch3x3_2"], long, ["pool"]]


def figure_7(inner):
    layers = {
        "branch1x1": (None, 320, ONE, 1),
        "branch3x3_1": (None, 384, ONE, 1),
        "branch3x3_2a": ("branch3x3_1", 384, (1, 3), 1),
        "branch3x3_2b": ("branch3x3_1", 384, (3, 1), 1),
        "branch3x3dbl_1": (None, 448, ONE, 1),
        "branch3x3dbl_2": ("branch3x3dbl_1", 384, THREE, 1),
        "branch3x3dbl_3a": ("branch3x3dbl_2", 384, (1, 3), 1),
        "branch3x3dbl_3b": ("branch3x3dbl_2", 384, (3, 1), 1),
        "branch_pool": (None, 192, ONE, 1),
    }
    short = ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")]
    deep = ["branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")]
    return inner, layers, [["branch1x1"], short, deep, ["pool", "branch_pool"]]


def make_layers(torch):
    """Return classes of layers and blocks, and the two pools."""
    nn = torch.nn

    class Layer(nn.Module):
        def __init__(self, inner, outer, size, stride=1, padding=0):
            super().__init__()
            self.conv = nn.Conv2d(inner, outer, size, stride, padding, bias=False)
            self.bn = nn.BatchNorm2d(outer, eps=1e-3)

        def forward(self, x):
            return torch.relu(self.bn(self.conv(x)))

    average = partial(
        nn.functional.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False
    )
    halve = partial(nn.functional.max_pool2d, kernel_size=3, stride=2)

    class Block(nn.Module):
        """Parallel branches: chains of layers by name; a tuple of names is a fork."""

        def __init__(self, inner, layers, chains, pool=average):
            super().__init__()
            for name, (source, outer, size, stride) in layers.items():
                padding = tuple(n // 2 for n in size) if stride == 1 else 0
                inputs = inner if source is None else layers[source][1]
                setattr(self, name, Layer(inputs, outer, size, stride, padding))
            self.chains, self.pool = chains, pool

        def forward(self, x):
            branches = []
            for chain in self.chains:
                y = x
                for name in chain:
                    if name == "pool":
                        y = self.pool(y)
                    elif isinstance(name, tuple):
                        y = torch.cat([getattr(self, part)(y) for part in name], 1)
                    else:
                        y = getattr(self, name)(y)
                branches.append(y)
            return torch.cat(branches, 1)

    return Layer, Block, average, halve


def make_reference(torch):
    """Return the network of Szegedy et al. (arXiv 1512.00567, figures 5 to 7 and table 1).

    It has the tensor names of the file and the pools of the TensorFlow graph.
    """
    nn = torch.nn
    Layer, Block, _, halve = make_layers(torch)

    class Reference(nn.Module):
        def __init__(self):
            super().__init__()
            self.Conv2d_1a_3x3, self.Conv2d_2a_3x3 = Layer(3, 32, 3, 2), Layer(32, 32, 3)
            self.Conv2d_2b_3x3 = Layer(32, 64, 3, padding=1)
            self.Conv2d_3b_1x1, self.Conv2d_4a_3x3 = Layer(64, 80, 1), Layer(80, 192, 3)
            self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = (
                Block(*figure_5(192, 32)),
                Block(*figure_5(256, 64)),
                Block(*figure_5(288, 64)),
            )
            self.Mixed_6a = Block(*to_17(), pool=halve)
            self.Mixed_6b, self.Mixed_6c, self.Mixed_6d, self.Mixed_6e = (
                Block(*figure_6(c)) for c in (128, 160, 160, 192)
            )
            self.Mixed_7a = Block(*to_8(), pool=halve)
            self.Mixed_7b = Block(*figure_7(1280))
            self.Mixed_7c = Block(
                *figure_7(2048),
                pool=partial(nn.functional.max_pool2d, kernel_size=3, stride=1, padding=1),
            )
            self.fc = nn.Linear(2048, 1008)

        def forward(self, x):
            for name, layer in self.named_children():
                if name == "fc":
                    return x.mean((2, 3))
                x = layer(x)
                if name in ("Conv2d_2b_3x3", "Conv2d_4a_3x3"):
                    x = halve(x)

    return Reference().eval()


@pytest.mark.slow
@pytest.mark.reference
def test_features_agree_with_the_published_network(file):
    torch = pytest.importorskip("torch", reason="PyTorch is the reference")
    reference = make_reference(torch)
    reference.load_state_dict({key: torch.from_numpy(np.array(x)) for key, x in tensors().items()})
    images = natural_images(2, 64, 96)
    levels = torch.tensor(
        np.stack([np.asarray(to_image(x), np.float32) for x in images]).transpose(0, 3, 1, 2)
    )
    # Positions i · n / 299 as in TensorFlow 1; PyTorch's range from -1 (first pixel) to 1 (last).
    down, across = (2 * np.arange(299) * (n / 299) / (n - 1) - 1 for n in (64, 96))
    grid = torch.tensor(np.stack(np.meshgrid(across, down), axis=-1), dtype=torch.float32).expand(
        2, -1, -1, -1
    )
    with torch.no_grad():
        resized = torch.nn.functional.grid_sample(
            levels, grid, "bilinear", "border", align_corners=True
        )
        expected = reference((resized - 128) / 128).numpy()
    features = InceptionExtractor(file)(images)
    error = np.abs(features - expected).max() / np.abs(expected).max()
    print(f"features: {error:.1e}")
    assert features.shape == (2, 2048)
    assert features.dtype == np.float32
    assert expected.std() > 0.1
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    assert error < 2e-5


# --- its parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("height", "width"), [(299, 299), (32, 50), (400, 333)])
def test_resizing_agrees_with_scipy(height, width):
    """The positions are those of TensorFlow 1; the last pixel is repeated."""
    images = natural_images(1, height, width)
    levels = np.asarray(to_image(images[0]), np.float64)
    positions = np.meshgrid(
        np.arange(299) * height / 299, np.arange(299) * width / 299, indexing="ij"
    )
    expected = np.stack(
        [
            scipy.ndimage.map_coordinates(c, positions, order=1, mode="nearest")
            for c in levels.transpose(2, 0, 1)
        ],
        axis=-1,
    )
    resized = np.asarray(inception.preprocess_images(jnp.asarray(images)))[0]
    assert resized.min() == -1
    assert resized.max() == pytest.approx(127 / 128)
    np.testing.assert_allclose(resized, (expected - 128) / 128, atol=1e-4)


def test_average_pools_leave_out_the_padding():
    x = np.random.default_rng(0).standard_normal((1, 4, 5, 2)).astype(np.float32)
    means = np.asarray(inception.avg_pool(jnp.asarray(x)))
    np.testing.assert_allclose(means[0, 0, 0], x[0, :2, :2].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(means[0, 3, 2], x[0, 2:4, 1:4].mean(axis=(0, 1)), rtol=1e-5)
    np.testing.assert_allclose(means[0, 1, 1], x[0, :3, :3].mean(axis=(0, 1)), rtol=1e-5)


# --- the file ------------------------------------------------------------------------------------


def test_the_identity_depends_on_the_used_weights(file, tmp_path):
    identity, weights = InceptionExtractor(file).identity, dict(tensors())
    assert InceptionExtractor(file).identity == identity
    for key in [
        key for key in weights if key.endswith("num_batches_tracked") or key.startswith("fc.")
    ]:
        del weights[key]
    save_file(weights, tmp_path / "bare.safetensors")
    assert InceptionExtractor(tmp_path / "bare.safetensors").identity == identity
    weights["Mixed_7c.branch_pool.bn.bias"] = weights["Mixed_7c.branch_pool.bn.bias"] + np.float32(
        1e-3
    )
    save_file(weights, tmp_path / "changed.safetensors")
    assert InceptionExtractor(tmp_path / "changed.safetensors").identity != identity


FAULTS = {
    "torchvision": (
        lambda shapes: shapes | {"fc.weight": (1000, 2048)},
        "torchvision, whose features differ",
    ),
    "auxiliary": (
        lambda shapes: shapes | {"AuxLogits.fc.bias": (1000,)},
        "torchvision, whose features differ",
    ),
    "another": (lambda shapes: {"x": (3,)}, "has no Inception v3"),
    "missing": (
        lambda shapes: {k: s for k, s in shapes.items() if k != "Mixed_6c.branch1x1.bn.bias"},
        "missing Mixed_6c.branch1x1.bn.bias",
    ),
    "more": (
        lambda shapes: shapes | {"Mixed_8a.conv.weight": (3,)},
        "not expected Mixed_8a.conv.weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_other_files_are_errors(fault):
    change, message = FAULTS[fault]

    def open_shapes(shapes):
        return Tensors(
            Path("x"),
            {key: TensorLocation(Path("x"), 0, 0, shape, "F32") for key, shape in shapes.items()},
            {},
        )

    complete = {key: x.shape for key, x in tensors().items()}
    inception.check_inception_file(open_shapes(complete))
    with pytest.raises(CheckpointError, match=message):
        inception.check_inception_file(open_shapes(change(complete)))
