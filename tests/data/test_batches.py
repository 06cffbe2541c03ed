import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.data import decode
from radiance.data.batches import Batches, make_validation_batches, padded_text_length
from radiance.data.datasets import DataError, describe_source, open_source
from radiance.data.source import Span
from radiance.text.hash_encoder import HashEncoder
from tests.helpers.toy_runs import toy_run


class Numbers:
    """Images whose grey says their index."""

    def __init__(self, count):
        self.count, self.spans = count, [Span(0, count, 1.0)]
        self.sizes = np.tile(np.array([10, 6], np.uint32), (count, 1))
        self.weights = np.ones(count, np.float32)

    def __len__(self):
        return self.count

    def image(self, index, cover=None):
        return Image.new("RGB", (10, 6), (index, index, index))

    def captions(self, index):
        return (f"number {index}", f"image {index}")

    def tags(self, index):
        return False


class Broken(Numbers):
    """None of them can be decoded."""

    def image(self, index, cover=None):
        raise decode.UnusableError("cut short")

    def name(self, index):
        return f"{index}.png"


class Tales(Numbers):
    """Captions of as many words as their index says."""

    def captions(self, index):
        return ("word " * index,)


def make(
    count=20,
    batch=6,
    rows=None,
    seed=3,
    dropout=0.0,
    steps=50,
    source=Numbers,
    masking="one_pad",
    limit=6,
    **more,
):
    data = config.Data(
        resolution=4, batch_size=batch, caption_dropout=dropout, num_threads=2, **more
    )
    return Batches(source(count), data, HashEncoder(8, limit), seed, steps, masking, rows)


def numbers(batch):
    return batch["image"][:, 0, 0, 0].astype(int)


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)


def test_batches_follow_from_seed_and_step():
    a, b, other = make(), make(), make(seed=4)
    assert same(a[7], b[7])
    assert not np.array_equal(a[7]["image"], other[7]["image"])


def test_every_epoch_is_another_permutation():
    batches = make(count=18)
    epochs = [
        np.concatenate([numbers(batches[3 * epoch + i]) for i in range(3)]) for epoch in range(3)
    ]
    assert all(sorted(epoch) == list(range(18)) for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])


@pytest.mark.parametrize(
    "parts", [[range(3), range(3, 6)], [[0, 1], [2, 3], [4, 5]], [[0, 3, 5], [1, 2, 4]]]
)
def test_hosts_together_read_the_same_batch(parts):
    whole = make(dropout=0.5)[4]
    for rows in parts:
        part = make(rows=rows, dropout=0.5)[4]
        for name in ("image", "text", "lengths"):
            assert np.array_equal(part[name], whole[name][list(rows)])


def test_reading_ahead_changes_nothing():
    batches = make(steps=9)
    ahead = list(batches.start(5))
    assert len(ahead) == 4
    assert all(same(batch, batches[5 + i]) for i, batch in enumerate(ahead))


@pytest.mark.slow
def test_processes_read_the_same_batches():
    data = dict(steps=12, dropout=0.3, mirror=0.5, crop="random")
    ahead = [list(make(**data, workers=workers).start(2)) for workers in (0, 2)]
    assert len(ahead[0]) == len(ahead[1]) == 10
    assert all(map(same, *ahead))


def test_captions_are_drawn_and_dropped_by_position():
    batches = make(count=20, batch=20, dropout=0.25, steps=200)
    lengths = np.concatenate([batches[i]["lengths"] for i in range(100)])
    assert abs((lengths == 1).mean() - 0.25) < 0.03  # the empty prompt is its end alone
    texts = batches.encoder(["number 3", "image 3"])[0]
    drawn = [batches[i]["text"][numbers(batches[i]) == 3][0] for i in range(30)]
    assert {next((j for j in (0, 1) if np.array_equal(x, texts[j])), None) for x in drawn} == {
        0,
        1,
        None,
    }


@pytest.mark.parametrize("masking", ["one_pad", "strict", "off"])
def test_text_is_cut_where_nobody_sees_it_alike_on_all_hosts(masking):
    arguments = dict(
        source=Tales, masking=masking, limit=128, count=60, batch=4, dropout=0.2, steps=20
    )
    whole = make(**arguments)
    widths = set()
    for step in range(20):
        batch = whole[step]
        width = batch["text"].shape[1]
        seen = {
            "one_pad": batch["lengths"].max() + 1,
            "strict": batch["lengths"].max(),
            "off": 128,
        }[masking]
        assert seen <= width < seen + 16
        assert width % 16 == 0
        assert batch["cut"] == 0
        captions = whole._sample_captions(step, whole.sampler[step])
        full, lengths = whole.encoder.pad_embeddings(
            whole.encoder.encode([caption or "" for caption in captions]), 128
        )
        assert np.array_equal(batch["text"], full[:, :width])
        assert np.array_equal(batch["lengths"], lengths)
        assert all(
            make(**arguments, rows=[row])[step]["text"].shape == (1, width, 8) for row in range(4)
        )
        widths.add(width)
    assert (len(widths) > 1) == (masking != "off")


def test_few_widths_are_compiled():
    lengths = {padded_text_length(i + 1, 512, "one_pad") for i in range(600)}
    assert lengths == set(range(64, 513, 64))


@pytest.mark.parametrize(("to", "length"), [("empty", 1), ("masked", 0)])
def test_captions_that_are_dropped(to, length):
    batches = make(dropout=0.5, batch=20, dropout_to=to)
    batch = batches[0]
    dropped = np.array(
        [caption is None for caption in batches._sample_captions(0, batches.sampler[0])]
    )
    assert 4 < dropped.sum() < 16
    assert (batch["lengths"][dropped] == length).all()
    assert (batch["lengths"][~dropped] == 3).all()


class Pairs(Numbers):
    """Dark on the left and bright on the right, twice as wide as high; every second one says so."""

    def image(self, index, cover=None):
        return Image.fromarray(
            np.zeros((4, 8, 3), np.uint8) + np.arange(8, dtype=np.uint8)[:, None] * 30
        )

    def captions(self, index):
        return ("bright on the right",) if index % 2 else ("an image",)


def test_images_are_flipped_but_for_those_whose_caption_tells_left_from_right():
    plain = make(source=Pairs, count=40, batch=40)[0]["image"]
    batches = make(source=Pairs, count=40, batch=40, mirror=0.5)
    batch = batches[0]
    turned = np.array([not np.array_equal(a, b) for a, b in zip(batch["image"], plain)])
    told = batches.sampler[0].indices % 2 == 1
    assert not turned[told].any()
    assert 4 < turned[~told].sum() < 16
    assert np.array_equal(batch["image"][turned], plain[turned][:, :, ::-1])


def test_images_are_cut_at_random_and_alike_every_time():
    batches = make(source=Pairs, count=40, batch=40, crop="random")
    left = batches[0]["image"][:, 0, 0, 0]
    assert len(set(left)) > 20
    assert left.min() < 12
    assert left.max() > 100
    assert np.array_equal(left, batches[0]["image"][:, 0, 0, 0])
    assert not np.array_equal(left, batches[1]["image"][:, 0, 0, 0])
    assert (
        len(set(make(source=Pairs, count=40, batch=40)[0]["image"][:, 0, 0, 0])) == 1
    )  # from the center
    assert (
        len(
            set(
                make_validation_batches(
                    batches.source, batches.data, batches.encoder, 40, "one_pad"
                )[0]["image"][:, 0, 0, 0]
            )
        )
        == 1
    )


def test_losses_have_the_weights_of_the_images():
    batches = make(count=12, batch=8, remainder="fill")
    batches.source.loss_weights[:] = np.arange(12) / 4
    first, second = batches[0], batches[1]
    for batch in (first, second):
        there = batch["weight"] > 0
        assert np.array_equal(batch["weight"][there], numbers(batch)[there] / 4)
    filled = min((first, second), key=lambda batch: (batch["weight"] > 0).sum())
    assert (filled["image"][4:] == 128).all()
    assert not filled["weight"][4:].any()
    assert (filled["lengths"][4:] == 1).all()
    assert filled["skipped"] == 0


def test_a_host_may_have_rows_of_filling_alone():
    """Nothing is broken there. What is counted are images, and of too few nothing is said."""
    batches = make(count=20, batch=32, rows=range(24, 32), remainder="fill")
    assert not batches[0]["weight"].any()
    assert batches[0]["skipped"] == 0
    broken = make(source=Broken, count=9, batch=8, remainder="fill", broken_limit=1.0)
    filled = next(step for step in (0, 1) if (broken.sampler[step].indices >= 0).sum() == 1)
    assert not broken[filled]["weight"].any()
    assert broken[filled]["skipped"] == 1
    with pytest.raises(DataError, match="None of the 8 images of step"):
        broken[1 - filled]


def test_what_every_caption_begins_with_is_there_in_validation_too():
    data = config.Data(resolution=4, batch_size=4, caption_prefix="oh ", caption_suffix="!")
    words = HashEncoder(8, 6)
    (found,) = make_validation_batches(Numbers(4), data, words, 4, "off")
    expected, lengths = words.pad_embeddings(words.encode([f"oh number {i}!" for i in range(4)]), 6)
    np.testing.assert_array_equal(found["text"], expected)
    np.testing.assert_array_equal(found["lengths"], lengths)


def test_captions_over_the_limit_are_cut_and_counted():
    for batches in (make(), make(rows=range(2))):  # as two hosts tell it too
        batches.encoder = HashEncoder(8, 2)
        assert batches[0]["cut"] == 6
        assert batches[0]["lengths"].max() == 2


def test_fixed_batches_weigh_each_image_once():
    data = config.Data(resolution=4, batch_size=8)
    batches = make_validation_batches(Numbers(20), data, HashEncoder(8, 6), 18, "one_pad")
    seen = np.concatenate([numbers(b)[b["weight"] > 0] for b in batches])
    assert sorted(seen) == list(range(18))
    assert {len(b["image"]) for b in batches} == {8}


def test_digits(data_directory):
    run = toy_run("unused", data_directory)
    train, validation = (open_source(run.data, split) for split in ("train", "validation"))
    assert (len(train), len(validation)) == (1498, 299)
    assert train.load_image(0).size == (32, 32)
    assert train.attributes(0)["digit"] in range(10)
    assert len(set(train.captions(0))) == 5
    assert all(isinstance(c, str) for c in train.captions(0))
    told = describe_source(train, run.data, "train")
    assert told["count"] == 1498
    assert len(told["hash"]) == 64
    assert told["hash"] != validation.fingerprint()


def test_an_empty_data_set(data_directory):
    with pytest.raises(
        DataError,
        match="train split of digits is empty .*1498 × too small.*: lower data.resolution=64 or raise data.max_upscale=1.0.$",
    ):
        open_source(config.Data(cache_dir=data_directory, resolution=64), "train")


@pytest.mark.slow
def test_no_tensorflow(data_directory):
    code = (
        "import sys; from radiance import config; from radiance.data.datasets import open_source;"
        f"open_source(config.Data(directory={data_directory!r}, side=16), 'train').image(0); sys.exit('tensorflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
