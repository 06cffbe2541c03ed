"""Captions of `shapes`: correct, with lengths that do not depend on the image."""

import re

import numpy as np
import pytest

from radiance.config import ConfigError
from radiance.shapes.attributes import BACKGROUNDS, COLORS, SIZES
from radiance.shapes.captions import FILLERS, VOCABULARY, make_caption, split_tokens
from radiance.shapes.scenes import SHAPES, SceneObject, sample_scene

NUMBERS = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
TRAINING_SCENES = [sample_scene(3, i) for i in range(600)]
VALIDATION_SCENES = [sample_scene(3, i, "validation") for i in range(600)]


def num_tokens(text):
    return len(split_tokens(text)) + 1  # the end of the sequence


def parse_caption(text):
    """Return the number of objects, the objects and the background that a caption describes."""
    count_phrase, *phrases = re.split(r"[:,] ", text.rstrip("."))
    objects, background = set(), None
    for phrase in phrases:
        words = phrase.split()
        size, color, shape = (
            next((word for word in words if word in names), None)
            for names in (SIZES, COLORS, SHAPES)
        )
        if shape:
            cell = next((word for word in words if re.fullmatch("[a-d][1-4]", word)), None)
            if cell:
                row, column = int(cell[1]) - 1, "abcd".index(cell[0])
            else:
                row, column = (
                    NUMBERS[words[words.index(axis) + 1]] - 1 for axis in ("row", "column")
                )
            objects.add(SceneObject(size, color, shape, row, column))
        background = next((word for word in words if word in BACKGROUNDS), background)
    count = next(NUMBERS[word] for word in count_phrase.split() if word in NUMBERS)
    return count, objects, background


@pytest.mark.parametrize(
    ("caption_lengths", "max_tokens"),
    [("short", 256), ("mixed", 64), ("mixed", 256), ("full", 256)],
)
def test_captions_are_correct_and_described_correctly(caption_lengths, max_tokens):
    num_complete = 0
    for scene in TRAINING_SCENES[:300] + VALIDATION_SCENES[:300]:
        text, description = make_caption(scene, caption_lengths, max_tokens)
        objects = set(description.objects)
        assert parse_caption(text) == (len(scene.objects), objects, description.background), text
        assert description.num_objects == len(scene.objects)
        assert objects
        assert objects <= set(scene.objects)
        assert description.background in (None, scene.background)
        assert set(split_tokens(text)) <= set(VOCABULARY)
        num_complete += len(description.objects) == description.num_objects
    assert num_complete >= {"short": 150, "mixed": 350, "full": 600}[caption_lengths]


@pytest.mark.parametrize(
    ("caption_lengths", "max_tokens", "median"),
    [("short", 256, 12), ("mixed", 64, 23), ("mixed", 256, 71), ("full", 100, 100)],
)
def test_length_does_not_depend_on_the_image(caption_lengths, max_tokens, median):
    """With other objects in the image, more or fewer, a caption has as many tokens as before."""
    lengths = [
        num_tokens(make_caption(scene, caption_lengths, max_tokens).text)
        for scene in TRAINING_SCENES
    ]
    assert abs(np.median(lengths) - median) <= 0.15 * median
    assert min(lengths) >= 10
    assert max(lengths) <= max_tokens
    five_objects = next(scene.objects for scene in TRAINING_SCENES if len(scene.objects) == 5)
    for num_objects in (1, 5):
        changed_scenes = [
            scene._replace(objects=five_objects[:num_objects]) for scene in TRAINING_SCENES
        ]
        changed_lengths = [
            num_tokens(make_caption(scene, caption_lengths, max_tokens).text)
            for scene in changed_scenes
        ]
        assert changed_lengths == lengths


def test_half_of_the_captions_name_the_background():
    for caption_lengths in ("short", "mixed", "full"):
        captions = [make_caption(scene, caption_lengths, 256) for scene in TRAINING_SCENES]
        fraction = np.mean([caption.description.background is not None for caption in captions])
        assert abs(fraction - 0.5) < 0.09


def test_a_setting_decides_how_many_captions_name_the_background():
    def make_captions(**settings):
        return [make_caption(scene, "short", 20, **settings) for scene in TRAINING_SCENES]

    some, all_named = make_captions(), make_captions(named_backgrounds=1.0)
    assert all(caption.description.background for caption in all_named)
    assert not any(c.description.background for c in make_captions(named_backgrounds=0.0))
    # The others stay as they are.
    assert all(
        one == other
        for one, other in zip(some, all_named)
        if one.description.background is not None
    )


def test_fillers_do_not_mention_attributes():
    attributes = {*SIZES, *COLORS, *SHAPES, *BACKGROUNDS, *NUMBERS}
    attributes |= {"row", "column", "rows", "columns"}
    assert not attributes & {word for text in FILLERS for word in text.split()}


def test_a_limit_without_room_is_an_error():
    with pytest.raises(ConfigError, match=r"max_tokens=19 is too small .* at least 20"):
        make_caption(TRAINING_SCENES[0], "mixed", 19)
