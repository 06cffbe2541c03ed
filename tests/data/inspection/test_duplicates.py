"""Near-duplicates: hashes of similar and of different images, close pairs, and groups."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from radiance.data.inspection.duplicates import (
    DEFAULT_DISTANCE,
    MAX_DISTANCE,
    DuplicateGroup,
    ImageHashes,
    find_close_pairs,
    find_duplicate_groups,
    hash_image,
    hash_luma,
    hash_source,
    make_keep_mask,
)
from radiance.data.unusable import UnusableError

PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def encode_jpeg(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def halve(image):
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


COPIES = {
    "encoded": lambda image: encode_jpeg(image, 50),
    "halved": halve,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "less saturated": lambda image: ImageEnhance.Color(image).enhance(0.6),
    "all": lambda image: encode_jpeg(halve(ImageEnhance.Contrast(image).enhance(1.15)), 60),
}


@dataclass
class ImageSource:
    """A source of images; None is a broken image."""

    images: list

    def __len__(self):
        return len(self.images)

    def load_image(self, index, cover_size=None):
        if self.images[index] is None:
            raise UnusableError("broken image", "cut short")
        return self.images[index]

    @property
    def sizes(self):
        return np.array([image.size if image else (1, 1) for image in self.images])


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("image", PHOTOGRAPHS, ids=["china", "flower"])
def test_copies_have_nearly_the_same_hash(image, copy):
    assert (hash_image(image) ^ hash_image(COPIES[copy](image))).bit_count() <= DEFAULT_DISTANCE


def test_different_images_have_distant_hashes():
    """The images are crops of photographs that overlap by three quarters at most."""
    boxes = [(x, y, x + 160, y + 160) for x in range(0, 480, 40) for y in range(0, 260, 40)]
    hashes = np.array(
        [hash_image(image.crop(box)) for image in PHOTOGRAPHS for box in boxes], np.uint64
    )
    distances = np.bitwise_count(hashes[:, None] ^ hashes)[np.triu_indices(len(hashes), 1)]
    assert distances.min() > 2 * DEFAULT_DISTANCE
    assert np.median(distances) == 32


def test_bits_belong_to_cosines():
    """The coefficients of an image of three cosines are above the median, or below if inverted."""
    y, x = np.meshgrid(np.arange(32) + 0.5, np.arange(32) + 0.5, indexing="ij")
    frequencies = ((1, 1), (1, 3), (8, 8))
    waves = sum(
        np.cos(np.pi / 32 * row * y) * np.cos(np.pi / 32 * column * x)
        for row, column in frequencies
    )
    noise = np.random.default_rng(0).uniform(-2, 2, (32, 32))
    for sign, bit in ((1, "1"), (-1, "0")):
        bits = f"{hash_luma(np.rint(128 + sign * 20 * waves + noise).astype(np.uint8)):064b}"
        assert [bits[8 * (row - 1) + column - 1] for row, column in frequencies] == [bit] * 3
        assert bits.count("1") == 32


def test_plain_images_have_no_hash():
    assert hash_image(Image.new("RGB", (50, 40), (200, 30, 30))) is None
    assert hash_image(encode_jpeg(Image.new("RGB", (50, 40), (20, 30, 90)), 30)) is None


def test_a_source_is_hashed_and_grouped():
    china, flower = PHOTOGRAPHS
    plain = Image.new("RGB", (9, 9))
    source = ImageSource(
        [halve(china), None, flower, plain, encode_jpeg(china, 50), china, plain, halve(flower)]
    )
    progress = []
    hashes = hash_source(source, num_threads=2, progress=progress.append)
    assert sum(progress) == 8
    assert hashes.errors == {1: "broken image (cut short)"}
    assert hashes.has_hash.tolist() == [
        True,
        False,
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    groups = find_duplicate_groups(hashes, source.sizes)
    # The representative of images of equal size is the first one.
    assert groups == [DuplicateGroup(2, (7,)), DuplicateGroup(4, (0, 5))]
    assert make_keep_mask(8, groups).tolist() == [False, True, True, True, True, False, True, False]
    assert find_duplicate_groups(hash_source(ImageSource([plain, None]), 1), np.ones((2, 2))) == []


def sample_clusters(count, seed=0):
    """Sample distinct hashes, many of which differ from others in a few bits."""
    rng = np.random.default_rng(seed)
    centers = rng.integers(0, 2**64, count // 8, dtype=np.uint64)
    flipped_bits = rng.integers(0, 64, (count, MAX_DISTANCE + 3)).astype(np.uint64)
    num_flipped = rng.integers(0, MAX_DISTANCE + 3, count)
    values = centers[rng.integers(0, len(centers), count)]
    for i in range(MAX_DISTANCE + 3):
        flips = np.uint64(1) << flipped_bits[:, i]
        values ^= np.where(i < num_flipped, flips, np.uint64(0))
    return np.unique(values)


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 4, 5, 6, 7, 8, MAX_DISTANCE])
def test_all_close_pairs_are_found(distance, monkeypatch):
    monkeypatch.setattr("radiance.data.inspection.duplicates.BLOCK_ROWS", 7)
    monkeypatch.setattr("radiance.data.inspection.duplicates.BLOCK_COLUMNS", 100)
    values = sample_clusters(600)
    is_close = np.triu(np.bitwise_count(values[:, None] ^ values) <= distance, 1)
    for num_threads in (1, 3):
        progress = []
        pairs = find_close_pairs(values, distance, num_threads, progress.append)
        assert np.array_equal(pairs, np.argwhere(is_close))
        assert sum(progress) == len(values)
    assert is_close.sum() >= 20 * distance


def test_pairs_at_exactly_the_distance_are_close():
    rng = np.random.default_rng(1)
    for distance in (4, 6, 7):
        values = rng.integers(0, 2**64, 500, dtype=np.uint64)
        flipped = np.argsort(rng.random((500, 64)), axis=1)[:, :distance].astype(np.uint64)
        others = values ^ (np.uint64(1) << flipped).sum(axis=1, dtype=np.uint64)
        hashes = np.concatenate([values, others])
        expected = [[i, 500 + i] for i in range(500)]
        assert find_close_pairs(hashes, distance).tolist() == expected
        assert len(find_close_pairs(hashes, distance - 1)) == 0


def test_extreme_hashes_and_distances():
    ends = np.array([0, 1, 2**64 - 1, 2**64 - 2, 0xFFFF, 0xFFFE], np.uint64)
    assert find_close_pairs(ends, 2).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert find_close_pairs(ends[:0], 4).tolist() == []
    assert find_close_pairs(ends[:1], 4).tolist() == []
    with pytest.raises(ValueError, match=r"must be between 0 and 11"):
        find_close_pairs(ends, 12)


def test_every_second_image_of_a_chain_is_kept():
    chain = np.array([0, 0b111, 0b111111, 0b111111111], np.uint64)
    hashes = ImageHashes(chain, np.ones(4, bool), {})
    assert find_duplicate_groups(hashes, np.array([[9, 9], [8, 8], [7, 7], [6, 6]]), 4) == [
        DuplicateGroup(0, (1,)),
        DuplicateGroup(2, (3,)),
    ]
    assert find_duplicate_groups(hashes, np.array([[6, 6], [9, 9], [7, 7], [8, 8]]), 4) == [
        DuplicateGroup(1, (0, 2))
    ]


def test_dropped_images_are_close_to_kept_images_of_at_least_their_size():
    rng = np.random.default_rng(2)
    hashes = rng.permutation(np.concatenate([sample_clusters(600), sample_clusters(600)[::3]]))
    sizes = rng.integers(1, 40, (len(hashes), 2))
    image_hashes = ImageHashes(hashes, np.ones(len(hashes), bool), {})
    groups = find_duplicate_groups(image_hashes, sizes, 4)
    is_kept = make_keep_mask(len(hashes), groups)
    members = [image for group in groups for image in (group.representative, *group.duplicates)]
    assert len(set(members)) == len(members)
    for representative, duplicates in groups:
        for duplicate in duplicates:
            assert np.bitwise_count(hashes[representative] ^ hashes[duplicate]) <= 4
            assert sizes[duplicate].prod() <= sizes[representative].prod()
    distances = np.bitwise_count(hashes[is_kept][:, None] ^ hashes[is_kept])
    assert distances[np.triu_indices(is_kept.sum(), 1)].min() > 4
    assert is_kept.sum() < len(hashes) - 200
