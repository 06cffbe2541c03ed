"""Feed batches to the devices, and count what they contain."""

import time
from typing import Any

import numpy as np

from radiance.training.inputs import RunInputs
from radiance.training.seeds import put_batches
from radiance.training.step import DeviceBatch


class BatchFeed:
    """An iterator over batches on the devices, with counts since the last row of metrics.

    Args:
        inputs: Inputs of the training.
        first_step: Number of steps done before this start.

    Attributes:
        wait_seconds: Time that the trainer waited for batches.
        num_cut_captions: Captions over the text encoder's limit, of each seed.
        num_skipped_images: Images that could not be decoded, of each seed.
        shapes: Height, width and text tokens of an image, step by step.
    """

    def __init__(self, inputs: RunInputs, first_step: int):
        self._mesh, self._batch_size = inputs.mesh, inputs.run.data.batch_size
        self._resolution = inputs.run.data.resolution  # of batches without images
        # Batches since the last row of metrics are read again for their counts.
        last_row_step = first_step - first_step % inputs.run.train.log_every
        self._num_done = min(first_step, inputs.run.train.steps - 1) - last_row_step
        self._iterators = [batches.start(last_row_step) for batches in inputs.batches]
        self.reset_counts()

    def skip_done(self):
        """Read and count the batches that were trained on since the last row of metrics."""
        for _ in range(self._num_done):
            self._read()

    def reset_counts(self):
        """Set all counts to zero, after a row of metrics."""
        self.wait_seconds = 0.0
        self.num_cut_captions = [0] * len(self._iterators)
        self.num_skipped_images = [0] * len(self._iterators)
        self.shapes: list[tuple[int, int, int]] = []

    def __next__(self) -> DeviceBatch:
        start_time = time.monotonic()
        batches = self._read()
        self.wait_seconds += time.monotonic() - start_time
        return put_batches(batches, self._mesh, self._batch_size)

    def _read(self) -> list[dict[str, np.ndarray]]:
        """Read and count the next batch of each seed."""
        batches: list[dict[str, Any]] = [next(iterator) for iterator in self._iterators]
        for seed, batch in enumerate(batches):
            self.num_cut_captions[seed] += int(batch.pop("cut"))
            self.num_skipped_images[seed] += int(batch.pop("skipped"))
        height, width = (
            batches[0]["image"].shape[-3:-1] if "image" in batches[0] else 2 * (self._resolution,)
        )
        self.shapes.append((height, width, batches[0]["text"].shape[1]))
        return batches

    def close(self):
        """Stop reading ahead."""
        for iterator in self._iterators:
            iterator.close()
