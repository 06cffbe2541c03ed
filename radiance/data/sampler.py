"""Which images make the batch of each step, and what shape they are cut to."""

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from radiance import config
from radiance.base.errors import DataError
from radiance.base.random import RandomStream, make_rng, random_permutation
from radiance.data.buckets import assign_buckets
from radiance.data.source import Source

NO_IMAGE = -1  # a row without an image
MAX_CACHED_EPOCHS = 2  # epochs that are kept: the readers ahead may have begun the next one


class BatchSpec(NamedTuple):
    """A batch."""

    indices: Int64[np.ndarray, " b"]
    width: int  # pixels
    height: int


class Epoch(NamedTuple):
    first_step: int  # step
    batches: list[BatchSpec]
    leftovers: tuple[
        Int64[np.ndarray, " some"], ...
    ]  # of each shape: those that wait for the next epoch


class BatchSampler:
    """`order[step]` is the batch of that step, over all hosts. It follows from the source, the settings and the seed alone.

    An epoch shows each image once. Of a mixture it shows as many images as there are, each part as many as its share
    says, and within each part none a second time before all were shown. In every epoch each image draws one of the base
    resolutions that it is large enough for; images of one shape make batches, and the batches come in a random order.
    What is left of a shape is carried to the next epoch, fills a batch with EMPTY rows, or is dropped, as `data.incomplete_batches` says.

    Steps are meant to be asked for in about their order: to find one the epochs before it are gone through, once.
    """

    def __init__(self, source: Source, data: config.Data, seed: int):
        self.data, self.seed, self.spans = data, seed, source.spans
        self.assignment = assign_buckets(*source.sizes.T, data)
        self._first_steps = [0]  # steps at which epochs begin, as far as is known
        self._leftovers = [
            tuple(np.empty(0, np.int64) for _ in self.assignment.bucket_sizes)
        ]  # into each of them
        self._epoch_cache: OrderedDict[int, Epoch] = OrderedDict()
        self._lock = threading.Lock()
        if (
            data.incomplete_batches == "drop"
            and (max_count := self._expected_counts().max()) < data.batch_size
        ):
            raise DataError(
                f"No shape has data.batch_size={data.batch_size} images in an epoch, but {max_count:.0f} at most, so data.incomplete_batches=drop may leave none: use "
                "carry or fill, or a smaller batch."
            )

    def _expected_counts(self) -> Float64[np.ndarray, " shapes"]:
        """Images of each shape in an epoch, on average."""
        bucket_indices = self.assignment.bucket_indices
        total = sum(span.num_images for span in self.spans)
        expected_uses = np.concatenate(
            [
                np.full(span.num_images, span.fraction * total / span.num_images)
                for span in self.spans
            ]
        )  # of a mixture, in an epoch
        uses_per_bucket = expected_uses / np.maximum((bucket_indices >= 0).sum(axis=0), 1)
        return np.array(
            [
                ((bucket_indices == bucket_index) * uses_per_bucket).sum()
                for bucket_index in range(len(self.assignment.bucket_sizes))
            ]
        )

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("_epoch_cache", "_lock")}

    def __setstate__(self, state):
        vars(self).update(state, _epoch_cache=OrderedDict(), _lock=threading.Lock())

    def __getitem__(self, step: int) -> BatchSpec:
        with self._lock:
            while step >= self._first_steps[-1]:
                self._get_epoch(len(self._first_steps) - 1)
            epoch = self._get_epoch(int(np.searchsorted(self._first_steps, step, side="right")) - 1)
        return epoch.batches[step - epoch.first_step]

    def _get_epoch(self, epoch_index: int) -> Epoch:
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
        image_indices, image_buckets = self.sample_epoch(epoch_index)
        batch_size, batches, leftovers = self.data.batch_size, [], []
        for bucket_index, (previous, (width, height)) in enumerate(
            zip(self._leftovers[epoch_index], self.assignment.bucket_sizes)
        ):
            queue = np.concatenate([previous, image_indices[image_buckets == bucket_index]])
            num_used = len(queue) // batch_size * batch_size
            remainder = queue[num_used:]
            if self.data.incomplete_batches == "pad" and len(remainder):
                queue = np.concatenate([queue, np.full(batch_size - len(remainder), NO_IMAGE)])
                num_used = len(queue)
            leftovers.append(
                remainder if self.data.incomplete_batches == "carry" else remainder[:0]
            )
            batches += [
                BatchSpec(queue[i : i + batch_size], width, height)
                for i in range(0, num_used, batch_size)
            ]
        permutation = random_permutation(
            make_rng(self.seed, RandomStream.BATCH_ORDER, epoch_index), len(batches)
        )
        return Epoch(
            self._first_steps[epoch_index], [batches[i] for i in permutation], tuple(leftovers)
        )

    def sample_epoch(
        self, epoch_index: int
    ) -> tuple[Int64[np.ndarray, " some"], Int64[np.ndarray, " some"]]:
        """The images of an epoch, and the shape that each is cut to."""
        image_indices = self._sample_images(epoch_index)
        return image_indices, self._sample_buckets(epoch_index, image_indices)

    def _sample_images(self, epoch_index: int) -> Int64[np.ndarray, " some"]:
        """Those of an epoch in a random order, in which no part comes before another."""
        total = sum(span.num_images for span in self.spans)
        cumulative_fractions = np.cumsum([span.fraction for span in self.spans])
        # How many of each part were seen before this epoch and will have been after it; each sums to whole epochs.
        start_positions, end_positions = (
            np.diff(
                np.rint(cumulative_fractions * total * num_epochs).astype(int), prepend=0
            ).tolist()
            for num_epochs in (epoch_index, epoch_index + 1)
        )
        chunks = []
        for source_index, (span, position, end) in enumerate(
            zip(self.spans, start_positions, end_positions)
        ):
            while position < end:
                pass_index, offset = divmod(position, span.num_images)
                local_indices = random_permutation(
                    make_rng(self.seed, RandomStream.IMAGE_ORDER, pass_index, source_index),
                    span.num_images,
                )[offset : offset + end - position]
                chunks.append(span.start + local_indices)
                position += len(local_indices)
        image_indices = np.concatenate(chunks)
        return (
            image_indices
            if len(chunks) == 1
            else image_indices[
                random_permutation(
                    make_rng(self.seed, RandomStream.MIXTURE_ORDER, epoch_index), len(image_indices)
                )
            ]
        )

    def _sample_buckets(
        self, epoch_index: int, image_indices: Int64[np.ndarray, " some"]
    ) -> Int64[np.ndarray, " some"]:
        """Of each image, at one of the base resolutions that it has one for."""
        bucket_indices = self.assignment.bucket_indices[:, image_indices]
        if len(bucket_indices) == 1:
            return bucket_indices[0].astype(np.int64)
        has_bucket = bucket_indices >= 0
        rank = np.floor(
            make_rng(self.seed, RandomStream.RESOLUTION, epoch_index).random(len(image_indices))
            * has_bucket.sum(axis=0)
        )
        resolution_index = np.argmax(np.cumsum(has_bucket, axis=0) > rank, axis=0)
        return bucket_indices[resolution_index, np.arange(len(image_indices))].astype(np.int64)
