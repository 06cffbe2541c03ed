"""Batches of stored trajectories, for distillation."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal

import grain
import numpy as np

from radiance import config
from radiance.base.random import RandomStream, make_rng, random_permutation
from radiance.data.batches import PREFETCH_BATCHES, Batch, encode_captions, padded_text_length
from radiance.data.captions import augment_caption
from radiance.text.encoder import TextEncoder
from radiance.training.trajectories import Trajectories


class TrajectoryBatches:
    """Batches of trajectories; `batches[step]` depends only on the seed and the step.

    They have the interface of `data.batches.Batches`. Each epoch has every trajectory once.
    Captions are those of the trajectories, and are dropped with probability `data.caption_dropout`.

    Args:
        trajectories: The trajectories of the train split.
        data: Settings of the batch size and of caption dropout.
        encoder: The text encoder.
        seed: Seed of the order and of caption dropout.
        num_steps: Steps of the run.
        masking: `model.masking`.
        rows: Rows of the global batch that this host needs; None for all.
    """

    def __init__(
        self,
        trajectories: Trajectories,
        data: config.Data,
        encoder: TextEncoder,
        seed: int,
        num_steps: int,
        masking: str,
        rows: Sequence[int] | None = None,
    ):
        self.trajectories = trajectories
        self.data = data
        self.encoder = encoder
        self.seed = seed
        self.num_steps = num_steps
        self.masking = masking
        self.rows = range(data.batch_size) if rows is None else rows
        # All other rules were applied when the trajectories were generated.
        self._caption_rules = config.Data(caption_dropout=data.caption_dropout)
        self._epoch_order = lru_cache(maxsize=2)(self._shuffle_epoch)

    def _shuffle_epoch(self, epoch: int) -> np.ndarray:
        """Return the order of the trajectories in an epoch."""
        rng = make_rng(self.seed, RandomStream.IMAGE_ORDER, epoch)
        return random_permutation(rng, self.trajectories.num_trajectories)

    def __getitem__(self, step: int) -> Batch:
        # Captions of all hosts are chosen, because their arrays must have one shape.
        first_position = step * self.data.batch_size
        examples: list[tuple[int, str | None]] = []
        for position in range(first_position, first_position + self.data.batch_size):
            epoch, epoch_position = divmod(position, self.trajectories.num_trajectories)
            index = int(self._epoch_order(epoch)[epoch_position])
            examples.append((index, self._sample_caption(position, index)))
        num_tokens = max(self.encoder.count_tokens(caption or "") for _, caption in examples)
        text_length = padded_text_length(num_tokens, self.encoder.max_length, self.masking)

        host_examples = [examples[row] for row in self.rows]
        batch = make_trajectory_batch(
            self.trajectories, host_examples, self.encoder, text_length, self.data.dropped_caption
        )
        return batch | {"cut": np.int32(0), "skipped": np.int32(0)}

    def _sample_caption(self, position: int, index: int) -> str | None:
        """Return the caption of a trajectory, or None if it is dropped."""
        rng = make_rng(self.seed, RandomStream.CAPTION, position)
        return augment_caption([self.trajectories.caption(index)], False, self._caption_rules, rng)

    def start(self, step: int) -> grain.DatasetIterator[Batch]:
        """Return an iterator of the batches from `step` on, which reads ahead; close it."""
        steps = grain.MapDataset.range(step, self.num_steps)
        return grain.experimental.ThreadPrefetchIterDataset(
            steps.map(self.__getitem__).to_iter_dataset(), prefetch_buffer_size=PREFETCH_BATCHES
        ).__iter__()


def make_trajectory_batch(
    trajectories: Trajectories,
    examples: Sequence[tuple[int, str | None]],
    encoder: TextEncoder,
    text_length: int,
    dropped_caption: Literal["empty", "masked"] = "empty",
) -> Batch:
    """Return a batch of trajectories.

    Args:
        trajectories: The trajectories.
        examples: Index and caption of each row; the caption is None if it is dropped.
        encoder: The text encoder.
        text_length: Text tokens to which each row is padded or cut.
        dropped_caption: `data.dropped_caption`.
    """
    captions = [caption for _, caption in examples]
    return {
        "image": np.stack([trajectories.points(index) for index, _ in examples]),
        "seed": np.array([trajectories.seed(index) for index, _ in examples], np.uint32),
        **encode_captions(encoder, captions, text_length, dropped_caption),
        "weight": np.ones(len(examples), np.float32),
    }


def make_fixed_trajectory_batches(
    trajectories: Trajectories, encoder: TextEncoder, masking: str, batch_size: int
) -> list[Batch]:
    """Return all trajectories as batches of one shape, for validation.

    Args:
        trajectories: The trajectories.
        encoder: The text encoder.
        masking: `model.masking`.
        batch_size: Rows of a batch, at most.

    Returns:
        The batches; the last one is padded with rows of weight 0.
    """
    count = trajectories.num_trajectories
    captions = [trajectories.caption(index) for index in range(count)]
    num_tokens = max(map(encoder.count_tokens, captions))
    text_length = padded_text_length(num_tokens, encoder.max_length, masking)
    batch_size = min(batch_size, count)
    batches = []
    for start in range(0, count, batch_size):
        indices = [min(index, count - 1) for index in range(start, start + batch_size)]
        examples = [(index, captions[index]) for index in indices]
        batch = make_trajectory_batch(trajectories, examples, encoder, text_length)
        batch["weight"][count - start :] = 0
        batches.append(batch)
    return batches
