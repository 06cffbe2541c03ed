"""Caption augmentation: frequencies, tags, and random numbers in a fixed order."""

import math

import numpy as np
import pytest

from radiance import config
from radiance.data.captions import augment_caption, has_direction_words


def settings(**changes):
    return config.Data(**{"caption_dropout": 0.0, **changes})


def sample_captions(captions, has_tags, data, count=2000):
    rng = np.random.default_rng(0)
    return [augment_caption(captions, has_tags, data, rng) for _ in range(count)]


def test_captions_are_equally_frequent():
    samples = sample_captions(["A", "B", "C"], False, settings())
    assert all(abs(samples.count(name) / 2000 - 1 / 3) < 0.04 for name in "ABC")


def test_dropout_and_lower_case_have_their_probabilities():
    data = settings(
        caption_dropout=0.1,
        lowercase_probability=0.25,
        caption_prefix="Mine: ",
        caption_suffix=" End",
    )
    samples = sample_captions(["A Cat, sitting"], False, data)
    assert abs(samples.count(None) / 2000 - 0.1) < 0.03
    assert abs(samples.count("Mine: a cat, sitting End") / 2000 - 0.9 * 0.25) < 0.03
    assert set(samples) == {None, "Mine: a cat, sitting End", "Mine: A Cat, sitting End"}


def test_tags_are_shuffled_and_dropped():
    tags = [f"tag {i}" for i in range(10)]
    data = settings(shuffle_tags=True, tag_dropout=0.3)
    samples = sample_captions([" , ".join(tags) + ","], True, data)
    lists = [text.split(", ") for text in samples]
    assert {len(names) for names in lists} == {8, 9, 10}  # ceil(10 u), u in (0.7, 1]
    assert all(len(set(names)) == len(names) and set(names) <= set(tags) for names in lists)
    first_counts = [sum(names[0] == tag for names in lists) for tag in tags]
    assert min(first_counts) > 140
    assert max(first_counts) < 260


def test_unshuffled_tags_keep_their_order():
    samples = sample_captions(["a, b, c, d"], True, settings(tag_dropout=1.0))
    lists = [text.split(", ") for text in samples]
    assert all(names == sorted(names) for names in lists)
    assert {len(names) for names in lists} == {1, 2, 3, 4}


def test_tags_are_cleaned_only_if_they_are_shuffled_or_dropped():
    shuffled = sample_captions(["b,a,  c"], True, settings(shuffle_tags=True))
    assert set(shuffled) > {"b, a, c"}
    assert set(sample_captions([" , "], True, settings(tag_dropout=1.0))) == {""}
    # The spelling that a cache of embeddings has.
    assert set(sample_captions(["b,a,  c"], True, settings())) == {"b,a,  c"}
    no_tags = sample_captions(["b,a,  c"], False, settings(shuffle_tags=True, tag_dropout=1.0))
    assert set(no_tags) == {"b,a,  c"}


def test_random_numbers_are_used_in_a_fixed_order():
    rng, other_rng = np.random.default_rng(5), np.random.default_rng(5)
    caption = augment_caption(
        ["x", "e, d, c, b, a"], True, settings(shuffle_tags=True, tag_dropout=0.5), rng
    )
    numbers = [other_rng.random() for _ in range(4)]
    tags = ["x"] if numbers[0] < 0.5 else ["e", "d", "c", "b", "a"]
    sort_keys = [other_rng.random() for _ in tags]
    num_kept = math.ceil(len(tags) * (1 - 0.5 * numbers[3]))
    order = sorted(range(len(tags)), key=sort_keys.__getitem__)[:num_kept]
    assert len(tags) == 5
    assert caption == ", ".join(tags[i] for i in order)
    assert rng.random() == other_rng.random()


DIRECTED = [
    "Left",
    "looking_right",
    "a left-handed man",
    "rightmost",
    "LEFTWARDS",
    "left, right",
    "to her left.",
    "all right",
    "right-hand side",
    "lefthand",
]
UNDIRECTED = [
    "copyright",
    "bright",
    "upright",
    "alright",
    "leftover",
    "rights",
    "a cleft",
    "righteous",
    "",
]


@pytest.mark.parametrize("caption", DIRECTED)
def test_direction_words_are_found(caption):
    assert has_direction_words(caption)


@pytest.mark.parametrize("caption", UNDIRECTED)
def test_other_words_are_not_direction_words(caption):
    assert not has_direction_words(caption)
