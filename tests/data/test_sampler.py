"""The batch sampler: each image once an epoch, in its bucket, and always the same batches."""

import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from radiance import config
from radiance.base.errors import DataError
from radiance.data.sampler import NO_IMAGE, BatchSampler
from radiance.data.source import Span


class SizeSource:
    """Images of which only the sizes are known."""

    def __init__(self, sizes, spans=None):
        self.sizes = np.array(sizes, np.uint32)
        self.spans = spans or [Span(0, len(sizes), 1.0)]


def photographs(num_images=200):
    """Return images of many aspect ratios; some are too small for the higher resolutions."""
    rng = np.random.default_rng(0)
    area = rng.uniform(130**2, 600**2, num_images)
    ratio = np.exp(rng.uniform(-0.65, 0.65, num_images))
    return SizeSource(np.stack([np.sqrt(area * ratio), np.sqrt(area / ratio)], -1))


def make_sampler(source=None, batch_size=8, seed=3, **changes):
    buckets = {"resolution": 64, "extra_resolutions": (128, 256), "bucket_step": 16}
    data = config.Data(batch_size=batch_size, **buckets | changes)
    return BatchSampler(source or photographs(), data, seed)


def make_square_sampler(num_images, batch_size=8, **changes):
    """Return a sampler of images with a single bucket."""
    source = SizeSource([(70, 64)] * num_images)
    square = {"extra_resolutions": (), "bucket_step": 0}
    return make_sampler(source, batch_size, **square, **changes)


def epoch_batches(sampler, epoch_index):
    """Return all batches of an epoch."""
    sampler[0]
    while len(sampler._first_steps) < epoch_index + 2:
        sampler[sampler._first_steps[-1]]
    first_step, end_step = sampler._first_steps[epoch_index : epoch_index + 2]
    return [sampler[step] for step in range(first_step, end_step)]


def count_images(batches):
    return Counter(int(i) for batch in batches for i in batch.image_indices)


def is_same(batch, other):
    return np.array_equal(batch.image_indices, other.image_indices) and batch[1:] == other[1:]


def test_the_docstring_example_is_true():
    source = SizeSource([(96, 64)] * 6 + [(64, 64)] * 4)
    sampler = make_sampler(source, batch_size=4, seed=0, extra_resolutions=())
    assert sampler.sample_epoch(0)[0].tolist() == [1, 8, 9, 4, 2, 7, 3, 5, 0, 6]
    assert sampler.sample_epoch(1)[0].tolist() == [0, 8, 9, 6, 1, 5, 2, 3, 7, 4]
    batches = [sampler[step] for step in range(5)]
    assert [batch.image_indices.tolist() for batch in batches] == [
        [8, 9, 7, 6],
        [1, 4, 2, 3],
        [8, 9, 6, 7],
        [5, 0, 0, 1],
        [5, 2, 3, 4],
    ]
    sizes = [(batch.width, batch.height) for batch in batches]
    assert sizes == [(64, 64), (80, 48), (64, 64), (80, 48), (80, 48)]


def test_every_image_is_used_once_an_epoch_with_padded_batches():
    sampler = make_sampler(incomplete_batches="pad")
    for epoch_index in range(4):
        counts = count_images(epoch_batches(sampler, epoch_index))
        assert counts.pop(NO_IMAGE) > 0
        assert counts == Counter(range(200))


def test_carried_images_are_neither_lost_nor_repeated():
    sampler = make_sampler(incomplete_batches="carry")
    total = Counter()
    for epoch_index in range(30):
        batches = epoch_batches(sampler, epoch_index)
        assert all(
            len(batch.image_indices) == 8 and NO_IMAGE not in batch.image_indices
            for batch in batches
        )
        total += count_images(batches)
        leftovers = sampler._leftovers[epoch_index + 1]
        carried = Counter(int(i) for indices in leftovers for i in indices)
        assert total + carried == Counter({i: epoch_index + 1 for i in range(200)})
        assert all(len(indices) < 8 for indices in leftovers)


def test_only_images_that_fill_no_batch_are_dropped():
    sampler = make_sampler(incomplete_batches="drop")
    missed = Counter()
    for epoch_index in range(20):
        counts = count_images(epoch_batches(sampler, epoch_index))
        assert set(counts.values()) == {1}
        assert 100 < len(counts) < 200
        missed += Counter(range(200)) - counts
    assert max(missed.values()) < 20  # not always the same ones


def test_images_are_in_buckets_that_fit():
    source, sampler = photographs(), make_sampler(incomplete_batches="pad")
    sizes = set()
    for epoch_index in range(6):
        for batch in epoch_batches(sampler, epoch_index):
            for index in batch.image_indices[batch.image_indices != NO_IMAGE]:
                width, height = source.sizes[index].astype(float)
                assert max(batch.width / width, batch.height / height) <= 1
                assert abs(np.log(width / height * batch.height / batch.width)) < 0.3
            sizes.add((batch.width, batch.height))
    assert {(64, 64), (128, 128), (256, 256)} < sizes
    assert len(sizes) > 12


def test_resolutions_are_sampled_uniformly_in_every_epoch():
    source = SizeSource([(300, 300)] * 300)
    sampler = make_sampler(source, incomplete_batches="pad")
    resolutions = np.zeros((20, 300), int)
    for epoch_index in range(20):
        for batch in epoch_batches(sampler, epoch_index):
            indices = batch.image_indices[batch.image_indices != NO_IMAGE]
            resolutions[epoch_index, indices] = batch.width
    fractions = [(resolutions == resolution).mean() for resolution in (64, 128, 256)]
    assert np.allclose(fractions, 1 / 3, atol=0.02)
    assert (resolutions[0] == resolutions[1]).mean() < 0.5
    assert all(len(set(of_image)) == 3 for of_image in resolutions.T)


def test_epochs_and_seeds_differ_and_batches_are_shuffled():
    sampler = make_sampler(incomplete_batches="pad")
    first, second = epoch_batches(sampler, 0), epoch_batches(sampler, 1)
    assert [tuple(batch.image_indices) for batch in first] != [
        tuple(batch.image_indices) for batch in second
    ]
    other_seed = make_sampler(seed=4, incomplete_batches="pad")
    assert tuple(other_seed[0].image_indices) != tuple(first[0].image_indices)
    widths = [batch.width for batch in first]
    assert widths != sorted(widths)


@pytest.mark.parametrize("incomplete_batches", ["carry", "pad", "drop"])
def test_steps_may_be_read_in_any_order_by_many_threads_and_after_pickling(incomplete_batches):
    def new_sampler():
        return make_sampler(incomplete_batches=incomplete_batches)

    in_order = new_sampler()
    expected = [in_order[step] for step in range(150)]

    out_of_order = new_sampler()
    assert is_same(out_of_order[140], expected[140])
    assert is_same(out_of_order[3], expected[3])
    with ThreadPoolExecutor(8) as pool:
        in_threads = list(pool.map(new_sampler().__getitem__, range(150)))
    assert all(map(is_same, in_threads, expected))
    unpickled = pickle.loads(pickle.dumps(out_of_order))
    assert all(is_same(unpickled[step], expected[step]) for step in (0, 77, 149))


def test_epochs_of_one_bucket_follow_each_other_without_gaps():
    sampler = make_square_sampler(20)
    indices = np.concatenate([sampler[step].image_indices for step in range(10)])
    assert all(sorted(indices[i : i + 20]) == list(range(20)) for i in range(0, 80, 20))


def test_fewer_images_than_a_batch_are_repeated_or_padded_but_not_dropped():
    sampler = make_square_sampler(3)
    assert count_images(sampler[step] for step in range(3)) == {0: 8, 1: 8, 2: 8}
    padded = make_square_sampler(3, incomplete_batches="pad")
    assert count_images([padded[0]]) == {NO_IMAGE: 5, 0: 1, 1: 1, 2: 1}
    message = "No bucket has data.batch_size=8 images in an epoch, but 3 at most"
    with pytest.raises(DataError, match=message):
        make_square_sampler(3, incomplete_batches="drop")
    enough = make_square_sampler(8, incomplete_batches="drop")
    assert sorted(enough[5].image_indices) == list(range(8))
    # A third of 10 images at each resolution, although all might have the same by chance.
    with pytest.raises(DataError, match="but 3 at most"):
        make_sampler(SizeSource([(300, 300)] * 10), incomplete_batches="drop")


def test_sources_of_a_mixture_have_their_fractions():
    spans = [Span(0, 30, 0.2), Span(30, 10, 0.5), Span(40, 60, 0.3)]
    source = SizeSource([(70, 70)] * 100, spans)
    sampler = make_sampler(source, batch_size=10, extra_resolutions=(), bucket_step=0)
    indices = np.concatenate([sampler[step].image_indices for step in range(60)])
    for start, num_images, fraction in spans:
        counts = Counter(i for i in indices.tolist() if start <= i < start + num_images)
        assert sum(counts.values()) == round(600 * fraction)
        # No image is repeated before all others of its source were used.
        assert max(counts.values()) - min(counts.values()) <= 1
    epoch = indices[:100]
    counts_in_epoch = [
        ((epoch >= span.start) & (epoch < span.start + span.num_images)).sum() for span in spans
    ]
    assert counts_in_epoch == [20, 50, 30]


def test_batches_are_the_same_in_all_versions():
    sampler = make_sampler(incomplete_batches="carry")
    first_images = [
        (int(sampler[step].image_indices[0]), sampler[step].width, sampler[step].height)
        for step in (0, 1, 50, 99)
    ]
    assert first_images == [(128, 64, 64), (34, 48, 80), (88, 64, 64), (163, 112, 144)]
