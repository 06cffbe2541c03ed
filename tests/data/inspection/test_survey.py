"""Surveys, compared with hand-counted numbers and with batches; lists of images."""

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


class SizeSource:
    """A source whose images have sizes and captions but no pixels."""

    def __init__(self, sizes, captions, tagged=(), weights=None):
        self.sizes, self.texts, self.tagged = np.array(sizes, np.uint32), captions, tagged
        self.loss_weights = np.array([1] * len(sizes) if weights is None else weights, np.float32)
        self.spans, self.skip_counts, self.skip_examples = [Span(0, len(sizes), 1.0)], {}, {}

    def __len__(self):
        return len(self.sizes)

    def captions(self, index):
        return self.texts[index]

    def has_tags(self, index):
        return index in self.tagged

    def name(self, index):
        return f"{index}.png"

    def address(self, index):
        return f"/images/{index}.png"


def settings(*changes, max_length=20, **data):
    defaults = dict(resolution=32, bucket_step=16, batch_size=4, max_aspect_ratio=3.0)
    run = config.Config(
        data=config.Data(**defaults | data), text=config.Text(max_length=max_length)
    )
    return config.override(run, changes)


def survey(source, run):
    progress = []
    result = survey_dataset(source, run, make_token_counter(run.text), progress.append)
    assert sum(progress) == len(source)
    return result


def caption_of_length(num_tokens):
    """Return a caption with this number of tokens, end of sequence included."""
    return "word " * (num_tokens - 1)


SIZES = [(32, 32)] * 5 + [(300, 200)] * 2 + [(40, 30), (31, 40), (512, 256)]


def test_sizes_are_counted():
    result = survey(SizeSource(SIZES, [("a",)] * 10), settings(max_upscale=2.0))
    assert result.num_images == 10
    assert result.sources == [SourceUsage(10, 1.0, 10)]
    assert result.resolution_histogram == Histogram(
        (32, 48, 64, 96, 128, 192, 256, 384), (7, 0, 0, 0, 0, 2, 1)
    )
    assert result.aspect_ratios == {
        Fraction(4, 5): 1,
        Fraction(1): 5,
        Fraction(4, 3): 1,
        Fraction(3, 2): 2,
        Fraction(2): 1,
    }
    assert list(result.aspect_ratios) == sorted(result.aspect_ratios)
    assert result.weight_range == (1, 1, 1)


def test_buckets_are_counted():
    result = survey(SizeSource(SIZES, [("a",)] * 10), settings(max_upscale=2.0))
    # Images of 2:1 are nearest to 48 × 16, which is 3:1, and images of 3:2 to the square. To cover
    # 32 × 32, 40 × 30 is scaled by 16/15, and 31 × 40 by 32/31.
    assert result.buckets == [BucketUsage(32, 32, 9, 2, 1), BucketUsage(48, 16, 1, 0, 1)]
    assert result.num_programs == 2
    assert (result.num_upscaled, result.max_upscale) == (2, pytest.approx(32 / 30))
    assert survey(SizeSource(SIZES[:7], [("a",)] * 7), settings()).num_upscaled == 0


@pytest.mark.parametrize("incomplete_batches", ["carry", "pad", "drop"])
def test_buckets_are_those_of_the_first_epoch(incomplete_batches):
    rng = np.random.default_rng(0)
    sources = [
        SizeSource(rng.integers(64, 200, (count, 2)), [("a",)] * count) for count in (50, 90)
    ]
    run = settings(
        f"data.incomplete_batches={incomplete_batches}", "train.seed=5", extra_resolutions=(64,)
    )
    mixture = Mixture(sources, [3.0, 1.0])
    result = survey(mixture, run)
    assert result.sources == [SourceUsage(50, 0.75, 105), SourceUsage(90, 0.25, 35)]
    assert sum(bucket.num_images for bucket in result.buckets) == 140
    assert len({bucket[:2] for bucket in result.buckets}) == len(result.buckets) > 4
    sampler = BatchSampler(mixture, run.data, 5)
    is_padded = incomplete_batches == "pad"
    num_steps = sum(
        bucket.num_batches + (is_padded and bucket.num_leftover > 0) for bucket in result.buckets
    )
    batches = [sampler[step] for step in range(num_steps)]
    for width, height, num_images, num_batches, num_leftover in result.buckets:
        indices = [batch.image_indices for batch in batches if batch[1:] == (width, height)]
        assert len(indices) == num_batches + (is_padded and num_leftover > 0)
        num_sampled = sum((batch_indices != NO_IMAGE).sum() for batch_indices in indices)
        assert num_sampled == num_images - (0 if is_padded else num_leftover)


def test_parts_of_a_mixture_are_counted():
    mixture = Mixture(
        [SizeSource([(32, 32)] * count, [("a",)] * count) for count in (3, 5)], [3.0, 5.0]
    )
    assert survey(mixture, settings()).sources == [
        SourceUsage(3, 3 / 8, 3),
        SourceUsage(5, 5 / 8, 5),
    ]


def test_a_survey_of_too_few_images_for_a_batch():
    result = survey(
        SizeSource([(32, 32)] * 3, [("a",)] * 3), settings("data.incomplete_batches=drop")
    )
    assert result.buckets == [BucketUsage(32, 32, 3, 0, 3)]


def test_captions_are_counted():
    texts = [
        (caption_of_length(2),),
        (caption_of_length(5), caption_of_length(20)),
        (caption_of_length(21),),
        (caption_of_length(40), "a", "b"),
    ]
    result = survey(SizeSource([(32, 32)] * 4, texts), settings(max_length=20)).captions
    lengths = Histogram(
        (1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 42), (3, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2)
    )
    assert result == CaptionStatistics(
        7,
        1,
        3,
        lengths,
        {50: 5, 90: 40, 99: 40, 100: 40},
        num_truncated=2,
        num_tagged_images=0,
        tags_per_caption=(0, 0),
    )


def test_captions_are_counted_with_prefix_and_suffix():
    run = settings(
        "data.caption_prefix=one two ", "data.caption_suffix= three", "text.max_length=8"
    )
    result = survey(SizeSource([(32, 32)] * 2, [("a",), ("a b c d e",)]), run).captions
    assert result.length_percentiles[50] == 5
    assert result.length_percentiles[100] == 9
    assert result.num_truncated == 1


def test_tags_and_weights_are_counted():
    source = SizeSource(
        [(32, 32)] * 3,
        [("cat, dog, , bird",), ("a, b", "c"), ("no, tags, here",)],
        tagged=(0, 1),
        weights=[0.5, 1, 3],
    )
    result = survey(source, settings())
    assert (result.captions.num_tagged_images, result.captions.tags_per_caption) == (2, (2, 3))
    assert result.weight_range == (0.5, 1.5, 3.0)


@pytest.mark.parametrize("masking", ["one_pad", "strict", "off"])
def test_text_lengths_are_those_of_batches(masking):
    encoder = HashEncoder(8, 256)
    lengths = [2, 31, 32, 33, 100, 255, 256, 400]
    run = config.override(settings(max_length=256), [f"model.masking={masking}"])
    result = survey(
        SizeSource([(32, 32)] * 8, [(caption_of_length(length),) for length in lengths]), run
    )
    assert result.text_lengths == sorted(
        {
            padded_text_length(
                encoder.count_tokens(caption_of_length(length)), encoder.max_length, masking
            )
            for length in lengths
        }
    )
    assert result.num_programs == len(result.text_lengths)
    assert len(result.text_lengths) == {"one_pad": 4, "strict": 4, "off": 1}[masking]


def test_a_list_of_a_folder_names_its_files(tmp_path):
    for name, text in (("a.png", "a cat\na pet"), ("sub/b.png", "猫"), ("small.png", "small")):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4) if name == "small.png" else (20, 16)).save(path)
        path.with_suffix(".txt").write_text(text)
    data = config.Data(
        source="folder",
        path=f"{tmp_path}/data",
        resolution=16,
        validation_fraction=0.0,
        cache_dir=f"{tmp_path}/cache",
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
    for path, prefix in (
        ("data/images.jsonl", ""),
        ("list.jsonl", "data/"),
        ("new/images.jsonl", f"{tmp_path}/data/"),
    ):
        check_list_path(tmp_path / path, source, data.sources)
        assert write_list(tmp_path / path, source, range(2)) == (2 if prefix else 0)
        lines = [json.loads(line) for line in (tmp_path / path).read_bytes().splitlines()]
        assert lines == [line | {"filename": prefix + line["filename"]} for line in expected]
        assert all((tmp_path / path).parent.joinpath(line["filename"]).is_file() for line in lines)
    assert not list(tmp_path.rglob("*.part"))


def test_a_list_has_weights_and_tags(tmp_path):
    source = SizeSource([(8, 9)] * 2, [("a, b",), ("c",)], tagged=(0,), weights=[0.1, 2])
    write_list(tmp_path / "list.jsonl", source, [1, 0])
    lines = [json.loads(line) for line in (tmp_path / "list.jsonl").read_text().splitlines()]
    assert [(line["is_tag_based"], line["loss_weight"], line["filename"]) for line in lines] == [
        (False, 2.0, "/images/1.png"),
        (True, 0.1, "/images/0.png"),
    ]


def test_lists_that_cannot_be_written_are_errors(tmp_path, data_directory):
    source = SizeSource([(8, 8)], [("a",)])
    settings = config.MixtureSource("jsonl", f"{tmp_path}/images.jsonl")
    with pytest.raises(config.ConfigError, match=r"is the list that is read"):
        check_list_path(tmp_path / "images.jsonl", source, [settings])
    with pytest.raises(config.ConfigError, match=r"is a folder"):
        check_list_path(tmp_path, source, [settings])
    data = config.Data(resolution=16, cache_dir=data_directory)
    with pytest.raises(config.ConfigError, match=r"The images of digits have no files"):
        check_list_path(tmp_path / "list.jsonl", open_source(data, "train"), data.sources)
