"""Near-duplicates: what is one image to people has one hash, photographs have their own, and the search misses no pair."""

import io
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from sklearn.datasets import load_sample_images

from radiance.data.decode import UnusableError
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
    keep_mask,
)

PHOTOGRAPHS = [Image.fromarray(pixels) for pixels in load_sample_images().images]


def encoded(image, quality):
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def halved(image):
    return image.resize((image.width // 2, image.height // 2), Image.Resampling.LANCZOS)


COPIES = {
    "encoded": lambda image: encoded(image, 50),
    "halved": halved,
    "brighter": lambda image: ImageEnhance.Brightness(image).enhance(1.15),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.8),
    "paler": lambda image: ImageEnhance.Color(image).enhance(0.6),
    "all": lambda image: encoded(halved(ImageEnhance.Contrast(image).enhance(1.15)), 60),
}


@dataclass
class Images:
    """A source of them; None is a broken one."""

    images: list

    def __len__(self):
        return len(self.pictures)

    def image(self, index, cover=None):
        if self.pictures[index] is None:
            raise UnusableError("broken image", "cut short")
        return self.pictures[index]

    @property
    def sizes(self):
        return np.array([image.size if image else (1, 1) for image in self.pictures])


@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("image", PHOTOGRAPHS, ids=["china", "flower"])
def test_copies_have_nearly_the_same_hash(image, copy):
    assert (hash_image(image) ^ hash_image(COPIES[copy](image))).bit_count() <= DEFAULT_DISTANCE


def test_other_images_have_other_hashes():
    """Parts of photographs, which overlap by three quarters at most."""
    boxes = [(x, y, x + 160, y + 160) for x in range(0, 480, 40) for y in range(0, 260, 40)]
    hashes = np.array(
        [hash_image(image.crop(box)) for image in PHOTOGRAPHS for box in boxes], np.uint64
    )
    apart = np.bitwise_count(hashes[:, None] ^ hashes)[np.triu_indices(len(hashes), 1)]
    assert apart.min() > 2 * DEFAULT_DISTANCE
    assert np.median(apart) == 32


def test_the_bits_are_the_signs_of_cosines():
    """An image of three frequencies, which are above the median, or, turned round, below it."""
    down, across = np.meshgrid(np.arange(32) + 0.5, np.arange(32) + 0.5, indexing="ij")
    there = ((1, 1), (1, 3), (8, 8))
    waves = sum(
        np.cos(np.pi / 32 * row * down) * np.cos(np.pi / 32 * column * across)
        for row, column in there
    )
    noise = np.random.default_rng(0).uniform(-2, 2, (32, 32))
    for sign, bit in ((1, "1"), (-1, "0")):
        bits = f"{hash_luma(np.rint(128 + sign * 20 * waves + noise).astype(np.uint8)):064b}"
        assert [bits[8 * (row - 1) + column - 1] for row, column in there] == [bit] * 3
        assert bits.count("1") == 32


def test_plain_images_are_not_compared():
    assert hash_image(Image.new("RGB", (50, 40), (200, 30, 30))) is None
    assert hash_image(encoded(Image.new("RGB", (50, 40), (20, 30, 90)), 30)) is None


def test_images_of_a_source():
    china, flower = PHOTOGRAPHS
    plain = Image.new("RGB", (9, 9))
    source = Images(
        [halved(china), None, flower, plain, encoded(china, 50), china, plain, halved(flower)]
    )
    done = []
    found = hash_source(source, num_threads=2, progress=done.append)
    assert sum(done) == 8
    assert found.errors == {1: "broken image (cut short)"}
    assert found.has_hash.tolist() == [
        True,
        False,
        True,
        False,
        True,
        True,
        False,
        True,
    ]
    alike = find_duplicate_groups(found, source.sizes)
    assert alike == [DuplicateGroup(2, (7,)), DuplicateGroup(4, (0, 5))]  # of equals the first one
    assert keep_mask(8, alike).tolist() == [False, True, True, True, True, False, True, False]
    assert find_duplicate_groups(hash_source(Images([plain, None]), 1), np.ones((2, 2))) == []


def clustered(count, seed=0):
    """Distinct values, of which many are a few bits away from another."""
    draw = np.random.default_rng(seed)
    centres = draw.integers(0, 2**64, count // 8, dtype=np.uint64)
    flips = (
        draw.integers(0, 64, (count, MAX_DISTANCE + 3)),
        draw.integers(0, MAX_DISTANCE + 3, count),
    )
    values = centres[draw.integers(0, len(centres), count)]
    for i in range(MAX_DISTANCE + 3):
        values ^= np.where(
            i < flips[1], np.uint64(1) << flips[0][:, i].astype(np.uint64), np.uint64(0)
        )
    return np.unique(values)


@pytest.mark.parametrize("distance", [0, 1, 2, 3, 4, 5, 6, 7, 8, MAX_DISTANCE])
def test_the_search_finds_what_comparing_all_finds(distance, monkeypatch):
    monkeypatch.setattr("radiance.data.inspection.duplicates.CHUNK", 100)
    values = clustered(600)
    near = np.triu(np.bitwise_count(values[:, None] ^ values) <= distance, 1)
    assert np.array_equal(find_close_pairs(values, distance), np.argwhere(near))
    assert near.sum() >= 20 * distance


def test_the_search_finds_each_way_to_differ():
    """Pairs whose few bits lie in one part, or in several, of the hash."""
    draw = np.random.default_rng(1)
    for distance in (4, 6, 7):
        values = draw.integers(0, 2**64, 500, dtype=np.uint64)
        flipped = np.argsort(draw.random((500, 64)), axis=1)[:, :distance].astype(np.uint64)
        others = values ^ (np.uint64(1) << flipped).sum(axis=1, dtype=np.uint64)
        assert find_close_pairs(np.concatenate([values, others]), distance).tolist() == [
            [i, 500 + i] for i in range(500)
        ]
        assert len(find_close_pairs(np.concatenate([values, others]), distance - 1)) == 0


def test_the_ends_of_the_range():
    ends = np.array([0, 1, 2**64 - 1, 2**64 - 2, 0xFFFF, 0xFFFE], np.uint64)
    assert find_close_pairs(ends, 2).tolist() == [[0, 1], [2, 3], [4, 5]]
    assert find_close_pairs(ends[:0], 4).tolist() == []
    assert find_close_pairs(ends[:1], 4).tolist() == []
    with pytest.raises(ValueError, match="must lie between 0 and 11"):
        find_close_pairs(ends, 12)


def test_what_is_left_out_is_near_to_what_stays():
    """Along a chain, too: there each is near to the next one alone."""
    chain = np.array([0, 0b111, 0b111111, 0b111111111], np.uint64)
    told = ImageHashes(chain, np.ones(4, bool), {})
    assert find_duplicate_groups(told, np.array([[9, 9], [8, 8], [7, 7], [6, 6]]), 4) == [
        DuplicateGroup(0, (1,)),
        DuplicateGroup(2, (3,)),
    ]
    assert find_duplicate_groups(told, np.array([[6, 6], [9, 9], [7, 7], [8, 8]]), 4) == [
        DuplicateGroup(1, (0, 2))
    ]

    draw = np.random.default_rng(2)
    hashes = draw.permutation(np.concatenate([clustered(600), clustered(600)[::3]]))
    sizes = draw.integers(1, 40, (len(hashes), 2))
    found = find_duplicate_groups(ImageHashes(hashes, np.ones(len(hashes), bool), {}), sizes, 4)
    stay = keep_mask(len(hashes), found)
    assert len({x for group in found for x in (group.representative, *group.duplicates)}) == sum(
        1 + len(group.duplicates) for group in found
    )
    for first, others in found:
        assert all(
            np.bitwise_count(hashes[first] ^ hashes[other]) <= 4
            and sizes[other].prod() <= sizes[first].prod()
            for other in others
        )
    apart = np.bitwise_count(hashes[stay][:, None] ^ hashes[stay])
    assert apart[np.triu_indices(stay.sum(), 1)].min() > 4
    assert stay.sum() < len(hashes) - 200
