"""Mixtures: how often each source is sampled, that no image is repeated early, and the settings."""

import hashlib
import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.data.batches import Batches, first_image_indices
from radiance.data.datasets import describe_source, open_source, open_splits
from radiance.data.indexed import EmptySplitError
from radiance.data.sampler import NO_IMAGE, BatchSampler
from radiance.data.source import Mixture
from radiance.text.hash_encoder import HashEncoder
from tests.helpers import toy_folders
from tests.helpers.toy_shards import fill_parquet, fill_tar


class NamedSource:
    """Images whose captions give the name of their source and their index."""

    def __init__(self, title, num_images, skip_counts=None):
        self.title, self.num_images = title, num_images
        self.skip_counts, self.skip_examples = skip_counts or {}, {}
        self.sizes = np.full((num_images, 2), 8, np.uint32)
        self.loss_weights = np.full(num_images, num_images, np.float32)

    def __len__(self):
        return self.num_images

    def load_image(self, index, cover_size=None):
        return f"image {self.title}{index}"

    def captions(self, index):
        return (self.name(index),)

    def has_tags(self, index):
        return self.title == "a"

    def attributes(self, index):
        return {self.title: index}

    def name(self, index):
        return f"{self.title}{index}"

    def address(self, index):
        return f"/{self.title}/{index}"

    def fingerprint(self):
        return hashlib.sha256(f"{self.title} {self.num_images}".encode()).hexdigest()


def make_mixture(counts=(10, 30, 7), weights=(1, 1, 2)):
    return Mixture([NamedSource(title, count) for title, count in zip("abc", counts)], weights)


def sample_epochs(source, num_epochs):
    """Return the images of each epoch; with batches of one image, none is carried."""
    sampler = BatchSampler(source, config.Data(resolution=8, batch_size=1), seed=5)
    return [
        [int(sampler[epoch * len(source) + i].image_indices[0]) for i in range(len(source))]
        for epoch in range(num_epochs)
    ]


# --- one source -----------------------------------------------------------------------------------


def test_images_of_a_source_follow_those_of_the_previous_one():
    source = make_mixture((2, 3, 1))
    indices = range(6)
    assert len(source) == 6
    assert [tuple(span) for span in source.spans] == [(0, 2, 0.25), (2, 3, 0.25), (5, 1, 0.5)]
    names = ["a0", "a1", "b0", "b1", "b2", "c0"]
    assert [source.name(i) for i in indices] == names
    assert [source.captions(i) for i in indices] == [(name,) for name in names]
    assert [source.load_image(i) for i in indices] == [f"image {name}" for name in names]
    assert [source.address(i) for i in indices] == [f"/{name[0]}/{name[1]}" for name in names]
    assert [source.has_tags(i) for i in indices] == [True, True, False, False, False, False]
    assert [source.attributes(i) for i in (1, 4, 5)] == [{"a": 1}, {"b": 2}, {"c": 0}]
    assert source.loss_weights.tolist() == [2, 2, 3, 3, 3, 1]
    assert source.sizes.shape == (6, 2)


def test_counts_of_unusable_images_are_summed():
    sources = [
        NamedSource("a", 2, {"no caption": 3, "animated": 1}),
        NamedSource("b", 2, {"no caption": 4}),
        NamedSource("c", 2),
    ]
    assert Mixture(sources, [1, 1, 1]).skip_counts == {"animated": 1, "no caption": 7}


def test_the_fingerprint_depends_on_the_sources_and_their_order():
    fingerprint = make_mixture().fingerprint()
    assert make_mixture().fingerprint() == fingerprint
    assert make_mixture((10, 30, 8)).fingerprint() != fingerprint
    a, b = NamedSource("a", 4), NamedSource("b", 4)
    assert Mixture([a, b], [1, 1]).fingerprint() != Mixture([b, a], [1, 1]).fingerprint()


# --- fractions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(1, 1, 2), (5, 3, 2), (1, 100, 1), (0.2, 0.2, 0.2)])
def test_every_epoch_has_the_fractions_of_the_sources(weights):
    source = make_mixture(weights=weights)
    totals = np.zeros(3)
    for num_epochs, images in enumerate(sample_epochs(source, 6), 1):
        totals += [
            sum(span.start <= index < span.start + span.num_images for index in images)
            for span in source.spans
        ]
        expected = [span.fraction * len(source) * num_epochs for span in source.spans]
        assert np.abs(totals - expected).max() < 1


def test_all_images_of_a_source_are_used_before_any_is_repeated():
    source = make_mixture()
    sampled = list(chain.from_iterable(sample_epochs(source, 12)))
    for start, num_images, _ in source.spans:
        counts = Counter(index for index in sampled if start <= index < start + num_images)
        assert len(counts) == min(num_images, counts.total())
        assert max(counts.values()) - min(counts[start + i] for i in range(num_images)) <= 1


def test_each_pass_over_a_source_has_its_own_order():
    """Equal sources differ, and so do two passes over a source. An epoch has half of each."""
    source = make_mixture((8, 8, 16), (1, 1, 6))
    halves = [
        [
            {index % 8 for index in epoch if index // 8 == source_index}
            for epoch in sample_epochs(source, 6)
        ]
        for source_index in (0, 1)
    ]
    assert all(len(half) == 4 for source_halves in halves for half in source_halves)
    assert all(
        source_halves[epoch] | source_halves[epoch + 1] == set(range(8))
        for source_halves in halves
        for epoch in (0, 2, 4)
    )
    assert halves[0] != halves[1]
    assert all(source_halves[0] != source_halves[2] for source_halves in halves)


def test_batches_mix_the_sources():
    source = make_mixture((400, 400), (1, 1))
    sampler = BatchSampler(source, config.Data(resolution=8, batch_size=40), seed=5)
    assert all(8 <= (sampler[step].image_indices < 400).sum() <= 32 for step in range(40))


@pytest.mark.parametrize("incomplete_batches", ["carry", "pad", "drop"])
def test_batches_have_the_fractions_of_the_sources(incomplete_batches):
    source = make_mixture()
    data = config.Data(resolution=8, batch_size=6, incomplete_batches=incomplete_batches)
    sampler = BatchSampler(source, data, seed=5)
    sampled = np.concatenate([sampler[step].image_indices for step in range(1600)])
    sampled = sampled[sampled != NO_IMAGE]
    for start, num_images, fraction in source.spans:
        in_span = (start <= sampled) & (sampled < start + num_images)
        assert abs(in_span.mean() - fraction) < 0.02


def test_batches_that_can_never_be_filled_raise_an_error():
    """An epoch of 100 images has ten of the first source's 60.

    It has 45 of each of the second source's two buckets, so that no bucket fills a batch of 50.
    """
    source = make_mixture((60, 40), (1, 9))
    source.sizes[60:] = [(16, 8), (8, 16)] * 20
    data = config.Data(
        resolution=8,
        batch_size=50,
        incomplete_batches="drop",
        bucket_step=4,
        max_aspect_ratio=3.0,
    )
    message = "No bucket has data.batch_size=50 images in an epoch, but 45 at most"
    with pytest.raises(DataError, match=message):
        BatchSampler(source, data, seed=5)


def test_validation_images_have_the_fractions_of_the_sources():
    source = make_mixture((10, 30, 7), (1, 2, 1))
    names = [source.name(i) for i in first_image_indices(source, 8)]
    assert names == ["a0", "a1", "b0", "b1", "b2", "b3", "c0", "c1"]
    counts = Counter(source.name(i)[0] for i in first_image_indices(source, 40))
    assert counts == {"a": 10, "b": 20, "c": 7}  # the last source has no more


# --- settings -------------------------------------------------------------------------------------

MIXTURE = (
    '[{"source": "folder", "path": "scans", "weight": 2}, '
    '{"source": "tar", "path": "shards/*.tar"}]'
)


def test_mixtures_are_set_on_the_command_line():
    run = config.override(config.Config(), ["data.source=mixture", f"data.mixture={MIXTURE}"])
    assert run.data.sources == (
        config.MixtureSource("folder", "scans", weight=2.0),
        config.MixtureSource("tar", "shards/*.tar"),
    )
    assert config.from_json(config.Config, config.to_json(run)) == run
    assert config.override(run, ["data.source=digits", "data.mixture=[]"]).data == config.Data()


def mixture_of(source):
    return ["data.source=mixture", f"data.mixture=[{source}]"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["data.source=mixture"], r"data\.source=mixture and data\.mixture=\[…\] belong together"),
        ([f"data.mixture={MIXTURE}"], r"data\.source=mixture and data\.mixture=\[…\] belong tog"),
        (
            ["data.source=mixture", f"data.mixture={MIXTURE}", "data.path=x"],
            r"data\.path=x is .* a mixture",
        ),
        (mixture_of("{source: folder}"), r"data\.mixture=.*: this list is not JSON: write"),
        (
            mixture_of('{"source": "folder", "part": 2}'),
            r"Unknown key 'part': did you mean 'path'\?",
        ),
        (mixture_of('{"source": "fold"}'), r"source='fold': did you mean 'folder'\?"),
        (mixture_of('{"source": "mixture"}'), r"source='mixture'"),
        (mixture_of('{"path": "x", "weight": 0}'), r"0\.0 of x in .*mixture must be more than 0"),
        (mixture_of('{"path": "x", "weight": -1}'), r"-1\.0 of x"),
        (mixture_of('{"path": "x", "weight": "2"}'), r"weight='2': float is expected"),
        (mixture_of('{"source": "tar", "root": "x"}'), r"data\.root=x is .*for data\.source=jsonl"),
    ],
)
def test_impossible_settings_raise_an_error(changes, message):
    with pytest.raises(config.ConfigError, match=message):
        config.override(config.Config(), changes)


# --- sources on disk ------------------------------------------------------------------------------


def fill(folder):
    """Write datasets of three formats, with gray levels from 0, from 0 and from 200 on."""
    fill_tar(folder / "tar")
    fill_parquet(folder / "parquet")
    (folder / "folder").mkdir()
    for i in range(5):
        Image.new("L", (12, 10), 200 + i).save(folder / "folder" / f"{i}.png")
        (folder / "folder" / f"{i}.txt").write_text(f"grey {200 + i}")
    Image.new("L", (12, 10)).save(folder / "folder" / "no_caption.png")
    return folder


def settings(folder, **changes):
    sources = [
        {"source": "tar", "path": f"{folder}/tar"},
        {"source": "parquet", "path": f"{folder}/parquet/train-*"},
        {"source": "folder", "path": f"{folder}/folder", "weight": 2.0},
    ]
    data = config.Data(
        resolution=8,
        max_upscale=2.0,
        num_threads=2,
        validation_fraction=0.0,
        caption_dropout=0.0,
        cache_dir=f"{folder}/prepared",
    )
    overrides = [
        "data.source=mixture",
        f"data.mixture={json.dumps(sources)}",
        *(f"data.{name}={value}" for name, value in changes.items()),
    ]
    return config.override(config.Config(data=data, model=config.Model(patch=4)), overrides).data


def read_batches(data, num_steps):
    source, encoder = open_source(data, "train"), HashEncoder(8, 6)
    return list(Batches(source, data, encoder, 0, num_steps, "one_pad").start(0))


def test_sources_of_all_formats_are_mixed(tmp_path):
    data = settings(fill(tmp_path), batch_size=8)
    description = describe_source(open_source(data, "train"), data, "train")
    assert description["source"] == "mixture"
    assert description["count"] == 18 + 18 + 5
    assert description["skipped"] == {"no caption": 1}
    levels = np.concatenate([batch["image"][:, 0, 0, 0] for batch in read_batches(data, 10)])
    assert abs((levels >= 200).mean() - 0.5) < 0.05
    assert len(set(levels.tolist())) == 23


@pytest.mark.slow
def test_processes_read_the_same_batches_as_threads(tmp_path):
    fill(tmp_path)
    by_threads, by_processes = (
        read_batches(settings(tmp_path, batch_size=5, num_workers=num_workers), 6)
        for num_workers in (0, 2)
    )
    assert all(
        np.array_equal(a[name], b[name])
        for a, b in zip(by_threads, by_processes, strict=True)
        for name in a
    )


@pytest.mark.parametrize("has_shapes", [True, False])
def test_a_mixture_may_hold_out_no_image_of_a_source(has_shapes, tmp_path):
    toy_folders.fill(tmp_path / "images", 3)
    other = (
        config.MixtureSource(source="shapes", weight=3)
        if has_shapes
        else config.MixtureSource(source="folder", path=str(tmp_path / "images"))
    )
    folder = config.MixtureSource(source="folder", path=str(tmp_path / "images"))
    data = config.Data(
        source="mixture",
        mixture=(folder, other),
        validation_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
        resolution=8,
    )
    splits = open_splits(data)
    assert len(splits["train"].spans) == 2
    if has_shapes:  # they have a validation split of their own
        assert len(splits["validation"].spans) == 1
    else:
        assert "validation" not in splits
        with pytest.raises(EmptySplitError, match=r"set data\.validation_fraction=0\.05"):
            open_source(data, "validation")
