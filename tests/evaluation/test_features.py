"""Extractors that need no file, the cache of features, and the comparison of features."""

import numpy as np
import pytest
from PIL import Image

from radiance.base.errors import DataError
from radiance.evaluation.features import (
    PixelExtractor,
    RandomNetworkExtractor,
    extract_features,
    load_or_extract_features,
)
from radiance.evaluation.metrics import compare_features

EXTRACTORS = [
    PixelExtractor(),
    PixelExtractor(8),
    RandomNetworkExtractor(),
    RandomNetworkExtractor(seed=1),
]
# The first weight of each kernel of the random network.
FIRST_WEIGHTS = [-0.6183286, 0.0741937, 0.0527003, -0.0025961]


def noise(count, height=32, width=32, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (count, height, width, 3)).astype(np.float32)


class CountingExtractor:
    """An extractor that counts its calls."""

    def __init__(self, extractor):
        self.extractor, self.calls = extractor, 0
        self.name, self.identity = extractor.name, extractor.identity

    def __call__(self, images):
        self.calls += 1
        return self.extractor(images)


@pytest.mark.parametrize(
    "extractor", [PixelExtractor(), RandomNetworkExtractor()], ids=lambda e: e.name
)
def test_features_do_not_depend_on_the_batch(extractor):
    images = noise(5, 24, 40)
    features = extract_features([images[:3], images[3:]], extractor)
    assert features.dtype == np.float32
    assert features.shape == (
        5,
        {"pixels16": 768, "random-network": 480}[extractor.name],
    )
    for i in range(5):
        np.testing.assert_allclose(
            features[i], extractor(images[i : i + 1])[0], rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(("height", "width"), [(32, 32), (48, 20)])
def test_pixels_agree_with_pillow(height, width):
    (image,) = noise(1, height, width)
    expected = np.stack(
        [
            Image.fromarray(c).resize((16, 16), Image.Resampling.BILINEAR)
            for c in image.transpose(2, 0, 1)
        ],
        axis=-1,
    )
    np.testing.assert_allclose(PixelExtractor()(image[None])[0], expected.ravel(), atol=1e-5)


def test_the_random_network_agrees_with_direct_sums():
    """SAME padding of an even side at stride 2 adds a row and a column at the end."""
    network, image = RandomNetworkExtractor(widths=(3, 2)), noise(1, 8, 8)[0]
    expected, x = [], image.astype(np.float64)
    for kernel in network.kernels:
        padded = np.pad(x, ((0, 1), (0, 1), (0, 0)))
        half = len(x) // 2
        x = np.array(
            [
                [
                    np.einsum("ijc,ijco->o", padded[2 * r : 2 * r + 3, 2 * c : 2 * c + 3], kernel)
                    for c in range(half)
                ]
                for r in range(half)
            ]
        )
        x = np.maximum(x, 0)
        expected.extend(x.mean(axis=(0, 1)))
    np.testing.assert_allclose(network(image[None])[0], expected, rtol=1e-5)


def test_random_weights_are_the_same_on_every_machine():
    """They come from a generator whose stream NumPy promises to keep."""
    kernels = RandomNetworkExtractor().kernels
    np.testing.assert_allclose([kernel[0, 0, 0, 0] for kernel in kernels], FIRST_WEIGHTS, atol=1e-6)
    for kernel in kernels:
        assert kernel.std() == pytest.approx(np.sqrt(2 / (9 * kernel.shape[2])), rel=0.05)


def test_identities_differ_and_are_reproducible():
    assert len({e.identity for e in EXTRACTORS}) == len(EXTRACTORS)
    assert RandomNetworkExtractor().identity == RandomNetworkExtractor().identity
    assert PixelExtractor(8).identity == PixelExtractor(8).identity


def test_images_without_features_are_errors():
    images = noise(6)
    images[5, 0, 0, 0] = np.nan
    with pytest.raises(DataError, match="Image 5 has pixels16 features that are not finite"):
        extract_features([images[:3], images[3:]], PixelExtractor())
    with pytest.raises(DataError, match="no images"):
        extract_features([], PixelExtractor())
    with pytest.raises(DataError, match="give a list of batches"):
        extract_features(images, PixelExtractor())


# --- the cache -----------------------------------------------------------------------------------


def unreadable_batches():
    """Fail if a batch is read."""
    raise AssertionError("The images were read again.")
    yield


def test_features_are_extracted_once(tmp_path):
    images = noise(6)
    first = load_or_extract_features(tmp_path / "new", PixelExtractor(), "data", 6, [images])
    np.testing.assert_array_equal(
        load_or_extract_features(
            tmp_path / "new", PixelExtractor(), "data", 6, unreadable_batches()
        ),
        first,
    )
    np.testing.assert_array_equal(first, PixelExtractor()(images))


@pytest.mark.parametrize(
    ("extractor", "fingerprint", "count"),
    [
        (RandomNetworkExtractor(), "data", 6),
        (PixelExtractor(8), "data", 6),
        (PixelExtractor(), "other data", 6),
        (PixelExtractor(), "data", 5),
    ],
    ids=["extractor", "setting", "data", "count"],
)
def test_features_of_another_provenance_are_not_used(tmp_path, extractor, fingerprint, count):
    """Not even if the file has the expected name."""
    load_or_extract_features(tmp_path, PixelExtractor(), "data", 6, [noise(6)])
    (wrong,) = tmp_path.iterdir()
    for is_copied in (False, True):
        counting = CountingExtractor(extractor)
        features = load_or_extract_features(
            tmp_path, counting, fingerprint, count, [noise(count, seed=1)]
        )
        assert counting.calls == 1
        np.testing.assert_array_equal(features, extractor(noise(count, seed=1)))
        if not is_copied:
            (other,) = set(tmp_path.iterdir()) - {wrong}
            other.write_bytes(wrong.read_bytes())


def test_features_of_other_weights_are_not_used(tmp_path):
    load_or_extract_features(tmp_path, RandomNetworkExtractor(), "data", 6, [noise(6)])
    other = CountingExtractor(RandomNetworkExtractor(seed=1))
    load_or_extract_features(tmp_path, other, "data", 6, [noise(6)])
    assert other.calls == 1


def test_a_damaged_file_is_replaced(tmp_path):
    first = load_or_extract_features(tmp_path, PixelExtractor(), "data", 6, [noise(6)])
    (path,) = tmp_path.iterdir()
    complete = path.read_bytes()
    path.write_bytes(complete[:-100])
    np.testing.assert_array_equal(
        load_or_extract_features(tmp_path, PixelExtractor(), "data", 6, [noise(6)]), first
    )
    assert path.read_bytes() == complete


def test_features_of_too_few_images_are_not_cached(tmp_path):
    with pytest.raises(DataError, match="7 images were expected, and there are 6"):
        load_or_extract_features(tmp_path, PixelExtractor(), "data", 7, [noise(6)])
    assert not list(tmp_path.iterdir())


# --- the comparison ------------------------------------------------------------------------------


def compare(generated, real, extractor):
    return compare_features(
        extract_features(generated, extractor), extract_features(real, extractor), extractor.name
    )


def test_metrics_are_named_after_their_features():
    metrics = compare([noise(40)], [noise(30, seed=1), noise(20, seed=2)], PixelExtractor(4))
    assert list(metrics) == [
        "FD(pixels4)",
        "KID(pixels4)",
        "KID(pixels4) standard error",
        "precision(pixels4)",
        "recall(pixels4)",
        "generated images",
        "real images",
    ]
    assert (metrics["generated images"], metrics["real images"]) == (40, 50)
    assert all(isinstance(value, float | int) for value in metrics.values())


@pytest.mark.parametrize(
    "extractor", [PixelExtractor(4), RandomNetworkExtractor(widths=(16, 32))], ids=lambda e: e.name
)
def test_metrics_detect_darker_and_repeated_images(extractor):
    """Real images against themselves, against darker ones, and against a few repeated ones."""
    real = noise(120)
    shuffled = compare([real[::-1]], [real], extractor)
    darker = compare([real - 0.3], [real], extractor)
    few = compare([np.tile(real[:4], (30, 1, 1, 1))], [real], extractor)
    name = extractor.name
    assert shuffled[f"FD({name})"] < 1e-9
    assert shuffled[f"precision({name})"] == shuffled[f"recall({name})"] == 1
    assert abs(shuffled[f"KID({name})"]) < 4 * shuffled[f"KID({name}) standard error"]
    assert darker[f"FD({name})"] > 1e-3
    assert darker[f"KID({name})"] > 10 * darker[f"KID({name}) standard error"]
    assert few[f"precision({name})"] == 1
    assert few[f"recall({name})"] < 0.2
