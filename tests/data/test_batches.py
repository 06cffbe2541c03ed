"""Training and validation batches: images, captions, text lengths, hosts and processes."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.data.batches import (
    Batches,
    CaptionBatches,
    encode_captions,
    make_validation_batches,
    padded_text_length,
)
from radiance.data.datasets import describe_source, open_source
from radiance.data.source import Span
from radiance.data.unusable import UnusableError
from radiance.text.hash_encoder import HashEncoder
from tests.helpers.toy_runs import toy_run


class IndexSource:
    """Images whose gray value is their index."""

    def __init__(self, num_images):
        self.num_images, self.spans = num_images, [Span(0, num_images, 1.0)]
        self.sizes = np.tile(np.array([10, 6], np.uint32), (num_images, 1))
        self.loss_weights = np.ones(num_images, np.float32)

    def __len__(self):
        return self.num_images

    def load_image(self, index, cover_size=None):
        return Image.new("RGB", (10, 6), (index, index, index))

    def captions(self, index):
        return (f"number {index}", f"image {index}")

    def has_tags(self, index):
        return False


class BrokenSource(IndexSource):
    """Images that cannot be decoded."""

    def load_image(self, index, cover_size=None):
        raise UnusableError("truncated")

    def name(self, index):
        return f"{index}.png"


class WordySource(IndexSource):
    """Captions that have as many words as their index."""

    def captions(self, index):
        return ("word " * index,)


class TwoSidedSource(IndexSource):
    """Images with a vertical gradient, twice as wide as high; every second caption has "right"."""

    def load_image(self, index, cover_size=None):
        gradient = np.arange(8, dtype=np.uint8)[:, None] * 30
        return Image.fromarray(np.zeros((4, 8, 3), np.uint8) + gradient)

    def captions(self, index):
        return ("bright on the right",) if index % 2 else ("an image",)


def make_batches(
    source=IndexSource,
    num_images=20,
    batch_size=6,
    rows=None,
    seed=3,
    num_steps=50,
    masking="one_pad",
    max_length=6,
    **changes,
):
    defaults = {"resolution": 4, "caption_dropout": 0.0, "num_threads": 2}
    data = config.Data(batch_size=batch_size, **defaults | changes)
    encoder = HashEncoder(8, max_length)
    return Batches(source(num_images), data, encoder, seed, num_steps, masking, rows)


def read_indices(batch):
    """Return the index of each image of an IndexSource from its pixels."""
    return batch["image"][:, 0, 0, 0].astype(int)


def is_same(batch, other):
    return batch.keys() == other.keys() and all(
        np.array_equal(batch[key], other[key]) for key in batch
    )


def test_batches_depend_on_seed_and_step_alone():
    batches, other_seed = make_batches(), make_batches(seed=4)
    assert is_same(batches[7], make_batches()[7])
    assert not np.array_equal(batches[7]["image"], other_seed[7]["image"])


def test_every_epoch_is_another_permutation():
    batches = make_batches(num_images=18)
    epochs = [
        np.concatenate([read_indices(batches[3 * epoch + i]) for i in range(3)])
        for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(18)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


@pytest.mark.parametrize(
    "rows_of_hosts",
    [[range(3), range(3, 6)], [[0, 1], [2, 3], [4, 5]], [[0, 3, 5], [1, 2, 4]]],
)
def test_hosts_together_read_the_global_batch(rows_of_hosts):
    global_batch = make_batches(caption_dropout=0.5)[4]
    for rows in rows_of_hosts:
        batch = make_batches(rows=rows, caption_dropout=0.5)[4]
        for name in ("image", "text", "lengths"):
            assert np.array_equal(batch[name], global_batch[name][list(rows)])


def test_captions_of_a_group_have_the_mask_of_the_longest():
    settings = {"source": WordySource, "num_images": 12, "caption_dropout": 0.3}
    own, shared = make_batches(**settings)[2], make_batches(**settings, mask_group_size=3)[2]
    longest = [own["lengths"][:3].max(), own["lengths"][3:].max()]
    assert shared["lengths"].tolist() == [longest[0]] * 3 + [longest[1]] * 3
    assert len({*own["lengths"]}) > 2
    assert np.array_equal(own["text"], shared["text"])
    host = make_batches(**settings, mask_group_size=3, rows=[0, 2, 4])[2]
    assert host["lengths"].tolist() == [longest[0], longest[0], longest[1]]
    for changes in ({"mask_group_size": 4}, {"mask_group_size": 3, "dropped_caption": "masked"}):
        with pytest.raises(config.ConfigError, match=r"data\.mask_group_size="):
            make_batches(**changes)


def test_reading_ahead_changes_nothing():
    batches = make_batches(num_steps=9)
    read_ahead = list(batches.start(5))
    assert len(read_ahead) == 4
    assert all(is_same(batch, batches[5 + i]) for i, batch in enumerate(read_ahead))


@pytest.mark.slow
def test_processes_read_the_same_batches():
    changes = {"caption_dropout": 0.3, "flip_probability": 0.5, "crop": "random"}
    by_threads, by_processes = (
        list(make_batches(num_steps=12, num_workers=num_workers, **changes).start(2))
        for num_workers in (0, 2)
    )
    assert len(by_threads) == len(by_processes) == 10
    assert all(map(is_same, by_threads, by_processes))


# --- captions -------------------------------------------------------------------------------------


def test_captions_are_sampled_and_dropped_in_every_step():
    batches = make_batches(batch_size=20, caption_dropout=0.25, num_steps=200)
    lengths = np.concatenate([batches[i]["lengths"] for i in range(100)])
    assert abs((lengths == 1).mean() - 0.25) < 0.03  # the empty prompt has only its end
    texts = batches.encoder(["number 3", "image 3"])[0]
    samples = [batches[i]["text"][read_indices(batches[i]) == 3][0] for i in range(30)]
    choices = {
        next((j for j in (0, 1) if np.array_equal(text, texts[j])), None) for text in samples
    }
    assert choices == {0, 1, None}


@pytest.mark.parametrize("masking", ["one_pad", "strict", "off"])
def test_all_hosts_cut_text_to_what_the_global_batch_shows(masking):
    arguments = {
        "source": WordySource,
        "masking": masking,
        "max_length": 128,
        "num_images": 60,
        "batch_size": 4,
        "caption_dropout": 0.2,
        "num_steps": 20,
    }
    batches = make_batches(**arguments)
    text_lengths = set()
    for step in range(20):
        batch = batches[step]
        text_length = batch["text"].shape[1]
        max_tokens = batch["lengths"].max()
        num_visible = {"one_pad": max_tokens + 1, "strict": max_tokens, "off": 128}[masking]
        assert num_visible <= text_length < num_visible + 16
        assert text_length % 16 == 0
        assert batch["cut"] == 0
        captions = batches._sample_captions(step, batches.sampler[step])
        uncut = encode_captions(batches.encoder, captions, 128)
        assert np.array_equal(batch["text"], uncut["text"][:, :text_length])
        assert np.array_equal(batch["lengths"], uncut["lengths"])
        for row in range(4):
            local_batch = make_batches(**arguments, rows=[row])[step]
            assert local_batch["text"].shape == (1, text_length, 8)
        text_lengths.add(text_length)
    assert (len(text_lengths) > 1) == (masking != "off")


def test_batches_of_captions_are_those_of_images_and_decode_none():
    data = config.Data(resolution=4, batch_size=4, caption_dropout=0.3)
    settings = (data, HashEncoder(8, 16), 3, 4, "one_pad", [1, 2])
    weights = np.linspace(0.5, 2, 10).astype(np.float32)
    sources = IndexSource(10), BrokenSource(10)
    for source in sources:
        source.loss_weights = weights
    expected = [Batches(sources[0], *settings)[step] for step in range(4)]
    batches = CaptionBatches(sources[1], *settings)
    iterator = batches.start(1)
    result = [batches[0], *(next(iterator) for _ in range(3))]
    iterator.close()
    for batch, complete in zip(result, expected, strict=True):
        del complete["image"]
        assert batch.keys() == complete.keys()
        assert all(np.array_equal(batch[name], complete[name]) for name in batch)


def test_there_are_few_text_lengths_to_compile():
    lengths = {padded_text_length(num_tokens, 512, "one_pad") for num_tokens in range(1, 601)}
    assert lengths == set(range(64, 513, 64))


@pytest.mark.parametrize(("dropped_caption", "length"), [("empty", 1), ("masked", 0)])
def test_dropped_captions_are_the_empty_prompt_or_masked(dropped_caption, length):
    batches = make_batches(batch_size=20, caption_dropout=0.5, dropped_caption=dropped_caption)
    batch = batches[0]
    captions = batches._sample_captions(0, batches.sampler[0])
    is_dropped = np.array([caption is None for caption in captions])
    assert 4 < is_dropped.sum() < 16
    assert np.array_equal(batch["dropped"], is_dropped)
    assert (batch["lengths"][is_dropped] == length).all()
    assert (batch["lengths"][~is_dropped] == 3).all()


def test_captions_over_the_limit_are_cut_and_counted():
    for batches in (make_batches(), make_batches(rows=range(2))):  # on each of two hosts too
        batches.encoder = HashEncoder(8, 2)
        assert batches[0]["cut"] == 6
        assert batches[0]["lengths"].max() == 2


def test_validation_captions_have_prefix_and_suffix():
    data = config.Data(resolution=4, batch_size=4, caption_prefix="oh ", caption_suffix="!")
    encoder = HashEncoder(8, 6)
    (batch,) = make_validation_batches(IndexSource(4), data, encoder, 4, "off")
    text, lengths = encoder.pad_embeddings(encoder.encode([f"oh number {i}!" for i in range(4)]), 6)
    np.testing.assert_array_equal(batch["text"], text)
    np.testing.assert_array_equal(batch["lengths"], lengths)


# --- images ---------------------------------------------------------------------------------------


def test_images_are_flipped_unless_their_caption_has_left_or_right():
    arguments = {"source": TwoSidedSource, "num_images": 40, "batch_size": 40}
    unflipped = make_batches(**arguments)[0]["image"]
    batches = make_batches(**arguments, flip_probability=0.5)
    image = batches[0]["image"]
    is_flipped = np.array([not np.array_equal(a, b) for a, b in zip(image, unflipped)])
    has_direction = batches.sampler[0].image_indices % 2 == 1
    assert not is_flipped[has_direction].any()
    assert 4 < is_flipped[~has_direction].sum() < 16
    assert np.array_equal(image[is_flipped], unflipped[is_flipped][:, :, ::-1])


def test_random_crops_depend_on_the_step_alone():
    arguments = {"source": TwoSidedSource, "num_images": 40, "batch_size": 40}
    batches = make_batches(**arguments, crop="random")
    left_edges = read_indices(batches[0])
    assert len(set(left_edges)) > 20
    assert left_edges.min() < 12
    assert left_edges.max() > 100
    assert np.array_equal(left_edges, read_indices(batches[0]))
    assert not np.array_equal(left_edges, read_indices(batches[1]))

    center_crops = make_batches(**arguments)[0]
    (validation_batch,) = make_validation_batches(
        batches.source, batches.data, batches.encoder, 40, "one_pad"
    )
    assert len(set(read_indices(center_crops))) == 1
    assert len(set(read_indices(validation_batch))) == 1


def test_losses_have_the_weights_of_the_images():
    batches = make_batches(num_images=12, batch_size=8, incomplete_batches="pad")
    batches.source.loss_weights[:] = np.arange(12) / 4
    first, second = batches[0], batches[1]
    for batch in (first, second):
        is_weighted = batch["weight"] > 0
        assert np.array_equal(batch["weight"][is_weighted], read_indices(batch)[is_weighted] / 4)
    padded = min((first, second), key=lambda batch: (batch["weight"] > 0).sum())
    assert (padded["image"][4:] == 128).all()
    assert not padded["weight"][4:].any()
    assert (padded["lengths"][4:] == 1).all()
    assert padded["skipped"] == 0


def test_a_host_may_have_padding_rows_alone():
    batches = make_batches(batch_size=32, rows=range(24, 32), incomplete_batches="pad")
    assert not batches[0]["weight"].any()
    assert batches[0]["skipped"] == 0


def test_a_batch_of_broken_images_raises_an_error_unless_it_has_few_images():
    batches = make_batches(
        BrokenSource,
        num_images=9,
        batch_size=8,
        incomplete_batches="pad",
        max_broken_fraction=1.0,
    )
    num_images = [(batches.sampler[step].image_indices >= 0).sum() for step in (0, 1)]
    padded_step = num_images.index(1)
    assert not batches[padded_step]["weight"].any()
    assert batches[padded_step]["skipped"] == 1
    with pytest.raises(DataError, match="None of the 8 images of step"):
        batches[1 - padded_step]


def test_validation_batches_have_each_image_once_with_weight_1():
    data = config.Data(resolution=4, batch_size=8)
    batches = make_validation_batches(IndexSource(20), data, HashEncoder(8, 6), 18, "one_pad")
    indices = np.concatenate([read_indices(batch)[batch["weight"] > 0] for batch in batches])
    assert sorted(indices) == list(range(18))
    assert {len(batch["image"]) for batch in batches} == {8}


# --- digits ---------------------------------------------------------------------------------------


def test_digits_are_a_source(data_directory):
    run = toy_run("unused", data_directory)
    train, validation = (open_source(run.data, split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (1498, 299)
    assert train.load_image(0).size == (32, 32)
    assert train.attributes(0)["digit"] in range(10)
    assert len(set(train.captions(0))) == 5
    assert all(isinstance(caption, str) for caption in train.captions(0))
    description = describe_source(train, run.data, "train")
    assert description["count"] == 1498
    assert len(description["hash"]) == 64
    assert description["hash"] != validation.fingerprint()


def test_a_split_without_usable_images_raises_an_error(data_directory):
    message = (
        r"train split of digits is empty .*1498 × too small.*: "
        r"lower data\.resolution=64 or raise data\.max_upscale=1\.0\.$"
    )
    with pytest.raises(DataError, match=message):
        open_source(config.Data(cache_dir=data_directory, resolution=64), "train")


@pytest.mark.slow
def test_digits_are_read_without_tensorflow(data_directory):
    code = (
        "import sys; from radiance import config; "
        "from radiance.data.datasets import open_source; "
        f"data = config.Data(cache_dir={data_directory!r}, resolution=16); "
        "open_source(data, 'train').load_image(0); sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
