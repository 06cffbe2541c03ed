"""Sampling of batches: which images form the batch of each step, and their size in pixels."""

import threading
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from radiance import config
from radiance.base.errors import DataError
from radiance.base.random import RandomStream, make_rng, random_permutation
from radiance.data.buckets import assign_buckets
from radiance.data.source import Source, Span

NO_IMAGE = -1  # image index of a row without an image
MAX_CACHED_EPOCHS = 2  # a reader that is ahead may have begun the next epoch

ImageIndices = Int64[np.ndarray, " images"]


class BatchSpec(NamedTuple):
    """The images of one batch.

    Attributes:
        image_indices: Index of each row's image within the source, or NO_IMAGE.
        width: Width of the images in pixels.
        height: Height of the images in pixels.
    """

    image_indices: Int64[np.ndarray, " batch"]
    width: int
    height: int


class Epoch(NamedTuple):
    """The batches of one epoch.

    Attributes:
        first_step: Step of the first batch.
        batches: Batches in the order of their steps.
        leftovers: For each bucket, the images that are carried into the next epoch.
    """

    first_step: int
    batches: list[BatchSpec]
    leftovers: tuple[ImageIndices, ...]


class BatchSampler:
    """The global batch of each step: `sampler[step]` is a `BatchSpec`.

    It depends on the source's sizes and spans, the settings and the seed alone. An epoch is made in
    three stages:

    1. Images. An epoch has each image once. An epoch of a mixture has as many images as all sources
       together, divided by the sources' fractions. No image of a source is repeated before all its
       other images were used.
    2. Buckets. Each image samples one of the resolutions that it is large enough for, which decides
       its bucket.
    3. Batches. The images of one bucket are cut into batches, and all batches are shuffled. Images
       that fill no batch are carried into the next epoch, padded with NO_IMAGE rows, or dropped
       (`data.incomplete_batches`).

    For example, let images 0 to 5 have 96×64 pixels and images 6 to 9 have 64×64, with
    `resolution=64`, `bucket_step=16`, `batch_size=4`, `incomplete_batches=carry` and seed 0:

        epoch 0, image indices   1 8 9 4 2 7 3 5 0 6
            bucket 80×48         1 4 2 3 | 5 0             5 and 0 are carried
            bucket 64×64         8 9 7 6
            steps 0 and 1        8 9 7 6 | 1 4 2 3         the batches, shuffled
        epoch 1, image indices   0 8 9 6 1 5 2 3 7 4
            bucket 80×48         5 0 0 1 | 5 2 3 4         the carried images come first
            bucket 64×64         8 9 6 7
            steps 2 to 4         8 9 6 7 | 5 0 0 1 | 5 2 3 4

    Steps should be requested in roughly increasing order: epochs are made one after the other, and
    only the last ones are cached.

    Args:
        source: Source of the images.
        data: Settings of resolutions, buckets and batches.
        seed: Seed of the run.

    Raises:
        DataError: With `drop`, no bucket has enough images for a batch.
    """

    def __init__(self, source: Source, data: config.Data, seed: int):
        self.data, self.seed, self.spans = data, seed, source.spans
        widths, heights = source.sizes.T
        self.assignment = assign_buckets(widths, heights, data)
        # First step of each known epoch, and of the one after it; leftovers that each begins with.
        self._first_steps = [0]
        self._leftovers = [tuple(np.empty(0, np.int64) for _ in self.assignment.bucket_sizes)]
        self._epoch_cache: OrderedDict[int, Epoch] = OrderedDict()
        self._lock = threading.Lock()
        if data.incomplete_batches == "drop":
            max_count = self._expected_bucket_counts().max()
            if max_count < data.batch_size:
                raise DataError(
                    f"No bucket has data.batch_size={data.batch_size} images in an epoch, but "
                    f"{max_count:.0f} at most, so data.incomplete_batches=drop may leave none: "
                    "use carry or pad, or a smaller batch."
                )

    def _expected_bucket_counts(self) -> Float64[np.ndarray, " buckets"]:
        """Return the expected number of images of each bucket in an epoch."""
        # Uses of each image in an epoch; below or above 1 in mixtures.
        uses_per_image = np.concatenate(
            [
                np.full(span.num_images, span.fraction * self._epoch_size / span.num_images)
                for span in self.spans
            ]
        )
        # An image is used equally often at each of its resolutions.
        bucket_indices = self.assignment.bucket_indices
        num_resolutions = np.maximum((bucket_indices >= 0).sum(axis=0), 1)
        uses_per_resolution = uses_per_image / num_resolutions
        return np.array(
            [
                ((bucket_indices == bucket_index) * uses_per_resolution).sum()
                for bucket_index in range(len(self.assignment.bucket_sizes))
            ]
        )

    @property
    def _epoch_size(self) -> int:
        """Number of images in an epoch, leftovers excluded."""
        return sum(span.num_images for span in self.spans)

    def __getstate__(self):
        excluded = ("_epoch_cache", "_lock")
        return {name: value for name, value in vars(self).items() if name not in excluded}

    def __setstate__(self, state):
        vars(self).update(state, _epoch_cache=OrderedDict(), _lock=threading.Lock())

    def __getitem__(self, step: int) -> BatchSpec:
        with self._lock:
            while step >= self._first_steps[-1]:
                self._get_epoch(len(self._first_steps) - 1)
            epoch_index = int(np.searchsorted(self._first_steps, step, side="right")) - 1
            epoch = self._get_epoch(epoch_index)
        return epoch.batches[step - epoch.first_step]

    def _get_epoch(self, epoch_index: int) -> Epoch:
        """Return an epoch from the cache, or make it; all epochs before it are known."""
        if epoch_index not in self._epoch_cache:
            self._epoch_cache[epoch_index] = epoch = self._make_epoch(epoch_index)
            if len(self._epoch_cache) > MAX_CACHED_EPOCHS:
                self._epoch_cache.popitem(last=False)
            if epoch_index == len(self._first_steps) - 1:
                self._first_steps.append(epoch.first_step + len(epoch.batches))
                self._leftovers.append(epoch.leftovers)
        self._epoch_cache.move_to_end(epoch_index)
        return self._epoch_cache[epoch_index]

    def _make_epoch(self, epoch_index: int) -> Epoch:
        """Make the batches of an epoch."""
        image_indices, bucket_indices = self.sample_epoch(epoch_index)

        # Cut the images of each bucket into batches.
        batches: list[BatchSpec] = []
        leftovers: list[ImageIndices] = []
        for bucket_index, (width, height) in enumerate(self.assignment.bucket_sizes):
            carried = self._leftovers[epoch_index][bucket_index]
            bucket_images = np.concatenate([carried, image_indices[bucket_indices == bucket_index]])
            batch_rows, leftover = self._cut_into_batches(bucket_images)
            batches += [BatchSpec(rows, width, height) for rows in batch_rows]
            leftovers.append(leftover)

        # Shuffle the batches of all buckets.
        rng = make_rng(self.seed, RandomStream.BATCH_ORDER, epoch_index)
        batches = [batches[i] for i in random_permutation(rng, len(batches))]
        return Epoch(self._first_steps[epoch_index], batches, tuple(leftovers))

    def _cut_into_batches(
        self, bucket_images: ImageIndices
    ) -> tuple[list[Int64[np.ndarray, " batch"]], Int64[np.ndarray, " leftover"]]:
        """Cut the images of a bucket into batches; return also what the next epoch begins with."""
        batch_size, incomplete_batches = self.data.batch_size, self.data.incomplete_batches
        num_in_batches = len(bucket_images) // batch_size * batch_size
        in_batches, leftover = np.split(bucket_images, [num_in_batches])
        if incomplete_batches == "pad" and len(leftover):
            padding = np.full(batch_size - len(leftover), NO_IMAGE)
            in_batches = np.concatenate([bucket_images, padding])
        if incomplete_batches != "carry":
            leftover = leftover[:0]
        return list(in_batches.reshape(-1, batch_size)), leftover

    def sample_epoch(self, epoch_index: int) -> tuple[ImageIndices, ImageIndices]:
        """Sample the images of an epoch and their buckets.

        Args:
            epoch_index: Index of the epoch, from 0.

        Returns:
            Index of each image within the source in random order, and index of its bucket.
        """
        image_indices = self._sample_images(epoch_index)
        return image_indices, self._sample_buckets(epoch_index, image_indices)

    def _sample_images(self, epoch_index: int) -> ImageIndices:
        """Sample the images of an epoch in random order."""
        # Position of each source at the start and end of the epoch: the number of its images that
        # were used by then. The positions of all sources sum to whole epochs.
        cumulative_fractions = np.cumsum([span.fraction for span in self.spans])
        start_positions, end_positions = (
            np.diff(
                np.rint(cumulative_fractions * self._epoch_size * num_epochs).astype(int),
                prepend=0,
            ).tolist()
            for num_epochs in (epoch_index, epoch_index + 1)
        )

        # The images between these positions, source after source.
        chunks = [
            chunk
            for source_index, span in enumerate(self.spans)
            for chunk in self._iter_shuffled(
                source_index, span, start_positions[source_index], end_positions[source_index]
            )
        ]
        image_indices = np.concatenate(chunks)
        if len(chunks) == 1:
            return image_indices

        # Mix the sources.
        rng = make_rng(self.seed, RandomStream.MIXTURE_ORDER, epoch_index)
        return image_indices[random_permutation(rng, len(image_indices))]

    def _iter_shuffled(
        self, source_index: int, span: Span, position: int, end: int
    ) -> Iterator[ImageIndices]:
        """Yield a source's images from one position to another; each pass has its own order."""
        while position < end:
            pass_index, start_in_pass = divmod(position, span.num_images)
            rng = make_rng(self.seed, RandomStream.IMAGE_ORDER, pass_index, source_index)
            end_in_pass = start_in_pass + end - position
            local_indices = random_permutation(rng, span.num_images)[start_in_pass:end_in_pass]
            yield span.start + local_indices
            position += len(local_indices)

    def _sample_buckets(self, epoch_index: int, image_indices: ImageIndices) -> ImageIndices:
        """Sample one of each image's resolutions; return the image's bucket there."""
        bucket_indices = self.assignment.bucket_indices[:, image_indices]
        if len(bucket_indices) == 1:
            return bucket_indices[0].astype(np.int64)
        has_bucket = bucket_indices >= 0
        u = make_rng(self.seed, RandomStream.RESOLUTION, epoch_index).random(len(image_indices))
        # Rank of the sampled resolution among those at which the image has a bucket.
        rank = np.floor(u * has_bucket.sum(axis=0))
        resolution_index = np.argmax(np.cumsum(has_bucket, axis=0) > rank, axis=0)
        return bucket_indices[resolution_index, np.arange(len(image_indices))].astype(np.int64)
