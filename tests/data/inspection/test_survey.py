"""A survey's numbers against those counted by hand, or by a run's own order and batches."""

import json
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.data.batches import padded_text_length
from radiance.data.datasets import open_source
from radiance.data.inspection.lists import check_list_path, write_list
from radiance.data.inspection.survey import (
    BucketUsage,
    CaptionStatistics,
    Histogram,
    SourceUsage,
    survey_dataset,
)
from radiance.data.sampler import NO_IMAGE, BatchSampler
from radiance.data.source import Mixture, Span
from radiance.text.factory import make_token_counter
from radiance.text.hash_encoder import HashEncoder


class Listed:
    """Images that are known by their sizes and captions alone."""

    def __init__(self, sizes, captions, tagged=(), weights=None):
        self.sizes, self.texts, self.tagged = np.array(sizes, np.uint32), captions, tagged
        self.weights = (
            np.ones(len(sizes), np.float32) if weights is None else np.array(weights, np.float32)
        )
        self.spans, self.skipped, self.examples = [Span(0, len(sizes), 1.0)], {}, {}

    def __len__(self):
        return len(self.sizes)

    def captions(self, index):
        return self.texts[index]

    def tags(self, index):
        return index in self.tagged

    def name(self, index):
        return f"{index}.png"

    def address(self, index):
        return f"/images/{index}.png"


def settings(*changes, length=20, **data):
    more = dict(side=32, bucket_step=16, batch=4, bucket_ratio=3.0) | data
    return config.override(
        config.Config(data=config.Data(**more), text=config.Text(max_length=length)), changes
    )


def of(source, run):
    done = []
    found = survey_dataset(source, run, make_token_counter(run.text), done.append)
    assert sum(done) == len(source)
    return found


def words(count):
    """That many tokens, with the end of the sequence."""
    return "word " * (count - 1)


SIZES = [(32, 32)] * 5 + [(300, 200)] * 2 + [(40, 30), (31, 40), (512, 256)]


def test_sizes():
    found = of(Listed(SIZES, [("a",)] * 10), settings(enlarge=2.0))
    assert found.num_images == 10
    assert found.sources == [SourceUsage(10, 1.0, 10)]
    assert found.resolution_histogram == Histogram(
        (32, 48, 64, 96, 128, 192, 256, 384), (7, 0, 0, 0, 0, 2, 1)
    )
    assert found.aspect_ratios == {
        Fraction(4, 5): 1,
        Fraction(1): 5,
        Fraction(4, 3): 1,
        Fraction(3, 2): 2,
        Fraction(2): 1,
    }
    assert list(found.aspect_ratios) == sorted(found.aspect_ratios)
    assert found.weight_range == (1, 1, 1)


def test_shapes():
    found = of(Listed(SIZES, [("a",)] * 10), settings(enlarge=2.0))
    # 2:1 and 3:2 images are nearest to 48 × 16, of 3:1, or to the square; 40 × 30 covers 32 × 32 at 16/15 of its size, 31 × 40 at 32/31.
    assert found.buckets == [BucketUsage(32, 32, 9, 2, 1), BucketUsage(48, 16, 1, 0, 1)]
    assert found.num_programs == 2
    assert (found.num_upscaled, found.max_upscale) == (2, pytest.approx(32 / 30))
    assert of(Listed(SIZES[:7], [("a",)] * 7), settings()).num_upscaled == 0


@pytest.mark.parametrize("remainder", ["carry", "pad", "drop"])
def test_shapes_are_those_of_the_first_epoch(remainder):
    draw = np.random.default_rng(0)
    sources = [Listed(draw.integers(64, 200, (count, 2)), [("a",)] * count) for count in (50, 90)]
    run = settings(f"data.incomplete_batches={remainder}", "train.seed=5", other_sides=(64,))
    mixture = Mixture(sources, [3.0, 1.0])
    found = of(mixture, run)
    assert found.sources == [SourceUsage(50, 0.75, 105), SourceUsage(90, 0.25, 35)]
    assert sum(shape.num_images for shape in found.buckets) == 140
    assert len({shape[:2] for shape in found.buckets}) == len(found.buckets) > 4
    order = BatchSampler(mixture, run.data, 5)
    steps = sum(
        shape.num_batches + (remainder == "fill" and shape.num_leftover > 0)
        for shape in found.buckets
    )
    for width, height, images, batches, rest in found.buckets:
        ours = [order[step].image_indices for step in range(steps) if order[step][1:] == (width, height)]
        assert len(ours) == batches + (remainder == "fill" and rest > 0)
        assert sum((those != NO_IMAGE).sum() for those in ours) == images - rest * (
            remainder != "fill"
        )


def test_parts():
    mixture = Mixture(
        [Listed([(32, 32)] * count, [("a",)] * count) for count in (3, 5)], [3.0, 5.0]
    )
    assert of(mixture, settings()).sources == [SourceUsage(3, 3 / 8, 3), SourceUsage(5, 5 / 8, 5)]


def test_a_survey_of_what_fills_no_batch():
    found = of(Listed([(32, 32)] * 3, [("a",)] * 3), settings("data.incomplete_batches=drop"))
    assert found.buckets == [BucketUsage(32, 32, 3, 0, 3)]


def test_captions():
    texts = [(words(2),), (words(5), words(20)), (words(21),), (words(40), "a", "b")]
    found = of(Listed([(32, 32)] * 4, texts), settings(length=20)).captions
    lengths = Histogram(
        (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 42), (3, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2)
    )
    assert found == CaptionStatistics(
        7,
        1,
        3,
        lengths,
        {50: 5, 90: 40, 99: 40, 100: 40},
        num_truncated=2,
        num_tagged_images=0,
        tags_per_caption=(0, 0),
    )


def test_captions_with_what_stands_around_them():
    run = settings(
        "data.caption_prefix=one two ", "data.caption_suffix= three", "text.max_length=8"
    )
    found = of(Listed([(32, 32)] * 2, [("a",), ("a b c d e",)]), run).captions
    assert found.length_percentiles[50] == 5
    assert found.length_percentiles[100] == 9
    assert found.num_truncated == 1


def test_tags_and_weights():
    source = Listed(
        [(32, 32)] * 3,
        [("cat, dog, , bird",), ("a, b", "c"), ("no, tags, here",)],
        tagged=(0, 1),
        weights=[0.5, 1, 3],
    )
    found = of(source, settings())
    assert (found.captions.num_tagged_images, found.captions.tags_per_caption) == (2, (2, 3))
    assert found.weight_range == (0.5, 1.5, 3.0)


@pytest.mark.parametrize("masking", ["one_pad", "strict", "off"])
def test_widths_are_those_that_batches_can_have(masking):
    encoder = HashEncoder(8, 256)
    lengths = [2, 31, 32, 33, 100, 255, 256, 400]
    run = config.override(settings(length=256), [f"model.masking={masking}"])
    found = of(Listed([(32, 32)] * 8, [(words(length),) for length in lengths]), run)
    assert found.text_lengths == sorted(
        {
            padded_text_length(encoder.count_tokens(words(length)), encoder.max_length, masking)
            for length in lengths
        }
    )
    assert found.num_programs == len(found.text_lengths)
    assert len(found.text_lengths) == {"one_pad": 4, "strict": 4, "off": 1}[masking]


def test_a_list_of_a_folder(tmp_path):
    """Read as JSON, and with names by which the files are found."""
    for name, text in (("a.png", "a cat\na pet"), ("sub/b.png", "猫"), ("small.png", "small")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4) if name == "small.png" else (20, 16)).save(path)
        path.with_suffix(".txt").write_text(text)
    data = config.Data(
        source="folder",
        path=f"{tmp_path}/data",
        resolution=16,
        validation_fraction=1e-9,
        cache_dir=f"{tmp_path}/kept",
    )
    source = open_source(data, "train", verbose=False)
    assert dict(source.skip_examples) == {"too small": ["small.png"]}
    expected = [
        {
            "filename": "a.png",
            "caption_or_tags": ["a cat", "a pet"],
            "width": 20,
            "height": 16,
            "is_tag_based": False,
            "loss_weight": 1.0,
        },
        {
            "filename": "sub/b.png",
            "caption_or_tags": "猫",
            "width": 20,
            "height": 16,
            "is_tag_based": False,
            "loss_weight": 1.0,
        },
    ]
    for where, change in (
        ("data/kept.jsonl", ""),
        ("kept.jsonl", "data/"),
        ("new/kept.jsonl", f"{tmp_path}/data/"),
    ):
        check_list_path(tmp_path / where, source, data.sources)
        assert write_list(tmp_path / where, source, range(2)) == (2 if change else 0)
        lines = [json.loads(line) for line in (tmp_path / where).read_bytes().splitlines()]
        assert lines == [line | {"filename": change + line["filename"]} for line in expected]
        assert all((tmp_path / where).parent.joinpath(line["filename"]).is_file() for line in lines)
    assert not list(tmp_path.rglob("*.part"))


def test_a_list_says_weights_and_tags(tmp_path):
    source = Listed([(8, 9)] * 2, [("a, b",), ("c",)], tagged=(0,), weights=[0.1, 2])
    write_list(tmp_path / "kept.jsonl", source, [1, 0])
    lines = [json.loads(line) for line in (tmp_path / "kept.jsonl").read_text().splitlines()]
    assert [(line["is_tag_based"], line["loss_weight"], line["filename"]) for line in lines] == [
        (False, 2.0, "/images/1.png"),
        (True, 0.1, "/images/0.png"),
    ]


def test_lists_that_cannot_be_written(tmp_path, data_directory):
    source = Listed([(8, 8)], [("a",)])
    part = config.MixtureSource("jsonl", f"{tmp_path}/images.jsonl")
    with pytest.raises(config.ConfigError, match="is the list that is read"):
        check_list_path(tmp_path / "images.jsonl", source, [part])
    with pytest.raises(config.ConfigError, match="is a folder"):
        check_list_path(tmp_path, source, [part])
    data = config.Data(resolution=16, cache_dir=data_directory)
    with pytest.raises(config.ConfigError, match="The images of digits are no files"):
        check_list_path(tmp_path / "kept.jsonl", open_source(data, "train"), data.sources)
