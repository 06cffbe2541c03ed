"""What is said of an image: shares, tags, and numbers drawn in a fixed order."""

import math

import numpy as np
import pytest

from radiance import config
from radiance.data.captions import augment_caption, has_direction_words


def rules(**changes):
    return config.Data(**{"caption_dropout": 0.0, **changes})


def said(captions, tags, changed, count=2000):
    draw = np.random.default_rng(0)
    return [augment_caption(captions, tags, changed, draw) for _ in range(count)]


def test_one_of_the_captions():
    told = said(["A", "B", "C"], False, rules())
    assert all(abs(told.count(name) / 2000 - 1 / 3) < 0.04 for name in "ABC")


def test_shares():
    told = said(
        ["A Cat, sitting"],
        False,
        rules(
            caption_dropout=0.1,
            lowercase_probability=0.25,
            caption_prefix="Mine: ",
            caption_suffix=" End",
        ),
    )
    assert abs(told.count(None) / 2000 - 0.1) < 0.03
    assert abs(told.count("Mine: a cat, sitting End") / 2000 - 0.9 * 0.25) < 0.03
    assert set(told) == {None, "Mine: a cat, sitting End", "Mine: A Cat, sitting End"}


def test_tags_are_shuffled_and_dropped():
    tags = [f"tag {i}" for i in range(10)]
    told = said([" , ".join(tags) + ","], True, rules(shuffle_tags=True, tag_dropout=0.3))
    lists = [text.split(", ") for text in told]
    assert {len(names) for names in lists} == {8, 9, 10}  # ceil(10 u), u in (0.7, 1]
    assert all(len(set(names)) == len(names) and set(names) <= set(tags) for names in lists)
    first = [sum(names[0] == tag for names in lists) for tag in tags]
    assert min(first) > 140
    assert max(first) < 260


def test_tags_in_their_order():
    lists = [text.split(", ") for text in said(["a, b, c, d"], True, rules(tag_dropout=1.0))]
    assert all(names == sorted(names) for names in lists)
    assert {len(names) for names in lists} == {
        1,
        2,
        3,
        4,
    }
    assert set(said(["b,a,  c"], True, rules(shuffle_tags=True))) > {"b, a, c"}
    assert set(said([" , "], True, rules(tag_dropout=1.0))) == {""}
    assert set(said(["b,a,  c"], True, rules())) == {"b,a,  c"}  # as a cache of captions has it
    assert set(said(["b,a,  c"], False, rules(shuffle_tags=True, tag_dropout=1.0))) == {"b,a,  c"}


def test_the_numbers_that_are_drawn():
    draw, again = np.random.default_rng(5), np.random.default_rng(5)
    told = augment_caption(
        ["x", "e, d, c, b, a"], True, rules(shuffle_tags=True, tag_dropout=0.5), draw
    )
    numbers = [again.random() for _ in range(4)]
    names = ["x"] if numbers[0] < 0.5 else ["e", "d", "c", "b", "a"]
    keys = [again.random() for _ in names]
    order = sorted(range(len(names)), key=keys.__getitem__)[
        : math.ceil(len(names) * (1 - 0.5 * numbers[3]))
    ]
    assert len(names) == 5
    assert told == ", ".join(names[i] for i in order)
    assert draw.random() == again.random()


SIDED = "Left|looking_right|a left-handed man|rightmost|LEFTWARDS|left, right|to her left.|all right|right-hand side|lefthand"
UNSIDED = "copyright|bright|upright|alright|leftover|rights|a cleft|righteous|"


@pytest.mark.parametrize("caption", SIDED.split("|"))
def test_sides(caption):
    assert has_direction_words(caption)


@pytest.mark.parametrize("caption", UNSIDED.split("|"))
def test_no_sides(caption):
    assert not has_direction_words(caption)
