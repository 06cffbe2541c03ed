"""Batches as a function of (seed, step) alone, for any number of hosts and processes."""

import multiprocessing
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np
from jaxtyping import Int, Int32

from radiance import config
from radiance.base.errors import DataError
from radiance.data.captions import first_caption, sample_caption
from radiance.data.images import Augmentation, ImageLoader, load_images
from radiance.data.sampler import NO_IMAGE, BatchSampler, BatchSpec
from radiance.data.source import Source
from radiance.model.transformer import visible_lengths
from radiance.text.encoder import LENGTH_STEP, TextEncoder, round_up_length

# Arrays by name: image [b, height, width, 3] uint8, text [b, l, d], lengths [b], weight [b], and
# in training dropped [b] (whether the caption was dropped) and the counts `cut` and `skipped`.
Batch = dict[str, Any]
MAX_TEXT_LENGTHS = 8  # text lengths that batches are padded to; each compiles a program
MIN_IMAGES_TO_FAIL = 8  # if none of this many images of a batch can be used, the storage is gone
PREFETCH_BATCHES = 2  # complete batches that wait for the trainer


class Batches:
    """Training batches: `batches[step]` is this host's part of the global batch of a step.

    Images, crops, flips and captions depend on the seed and the step alone. All hosts pad text to
    the same length, beyond which no caption of the global batch has a token that `masking` shows.

    Besides the arrays that the trainer needs, a batch has two counts: `cut`, the captions of all
    hosts that exceed the encoder's limit, and `skipped`, this host's broken images.

    Args:
        source: Source of images and captions.
        data: Settings of batches and augmentation.
        encoder: Text encoder.
        seed: Seed of the run.
        num_steps: Number of steps of the run.
        masking: Masking of padding tokens in the model (`model.masking`).
        rows: Rows of the global batch that this host reads; None for all.
    """

    def __init__(
        self,
        source: Source,
        data: config.Data,
        encoder: TextEncoder,
        seed: int,
        num_steps: int,
        masking: str,
        rows: Sequence[int] | None = None,
    ):
        self.source, self.data, self.encoder = source, data, encoder
        self.seed, self.num_steps, self.masking = seed, num_steps, masking
        self.rows = range(data.batch_size) if rows is None else rows
        self.sampler = BatchSampler(source, data, seed)
        self.image_loader = ImageLoader(source, self.sampler, data, seed, self.rows)
        self.broken_images: dict[int, str] = {}  # reasons, by image index

    def __getitem__(self, step: int) -> Batch:
        return self._build_batch(step, self.image_loader[step])

    def start(self, step: int) -> grain.DatasetIterator[Batch]:
        """Iterate over the batches from a step on, reading ahead.

        Images are decoded by threads, or by processes with threads. Text is encoded by a thread of
        this process, which owns the encoder's devices.

        Args:
            step: First step.

        Returns:
            An iterator, which must be closed. It raises DataError if too many images are broken.
        """
        read_options = grain.ReadOptions(
            num_threads=self.data.num_threads, prefetch_buffer_size=self.data.num_threads
        )
        image_dataset = grain.MapDataset.source(
            _StepSource(self.image_loader, step, self.num_steps)
        ).to_iter_dataset(read_options)
        if self.data.num_workers:
            import absl.flags

            absl.flags.FLAGS.mark_as_parsed()  # grain reads a flag in its processes
            image_dataset = image_dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self.data.num_workers, per_worker_buffer_size=2
                ),
                worker_init_fn=_exit_with_parent,
            )
        batch_dataset = image_dataset.map(
            lambda image_batch: self._build_batch(image_batch.pop("step"), image_batch)
        )
        return grain.experimental.ThreadPrefetchIterDataset(
            batch_dataset, prefetch_buffer_size=PREFETCH_BATCHES
        ).__iter__()

    def _build_batch(self, step: int, image_batch: dict[str, Any]) -> Batch:
        """Add the captions to the images of a step."""
        spec = self.sampler[step]
        self._report_broken(image_batch["broken"])
        num_images = int((spec.image_indices[list(self.rows)] != NO_IMAGE).sum())
        if num_images >= MIN_IMAGES_TO_FAIL and not image_batch["weight"].any():
            raise DataError(
                f"None of the {num_images} images of step {step + 1} can be used: "
                "check that the disk that stores them is still there."
            )

        return {
            "image": image_batch["image"],
            "weight": image_batch["weight"],
            **self._encode_step(step, spec),
            "skipped": np.int32(len(image_batch["broken"])),
        }

    def _encode_step(self, step: int, spec: BatchSpec) -> Batch:
        """Return the captions of a step: text, lengths, dropped and cut."""
        # Captions of all hosts decide the text length, since the hosts' arrays must have one shape.
        captions = self._sample_captions(step, spec)
        token_counts = [self.encoder.count_tokens(caption or "") for caption in captions]
        text_length = padded_text_length(max(token_counts), self.encoder.max_length, self.masking)
        num_truncated = sum(count > self.encoder.max_length for count in token_counts)

        local_captions = [captions[row] for row in self.rows]
        texts = encode_captions(
            self.encoder, local_captions, text_length, self.data.dropped_caption
        )
        if self.data.mask_group_size > 1:
            counts = np.minimum(token_counts, self.encoder.max_length)
            texts["lengths"] = share_longest(counts, self.data.mask_group_size)[list(self.rows)]
        return {
            **texts,
            "dropped": np.array([caption is None for caption in local_captions]),
            "cut": np.int32(num_truncated),
        }

    def _sample_captions(self, step: int, spec: BatchSpec) -> list[str | None]:
        """Return a global batch's captions: None if dropped, empty in rows without an image."""
        first_position = step * self.data.batch_size
        return [
            ""
            if index == NO_IMAGE
            else sample_caption(self.source, index, self.data, self.seed, first_position + row)
            for row, index in enumerate(spec.image_indices.tolist())
        ]

    def _report_broken(self, reasons: dict[int, str]):
        """Print each broken image once; raise DataError if there are too many."""
        for index in reasons.keys() - self.broken_images.keys():
            self.broken_images[index] = reasons[index]
            print(
                f"{self.source.name(index)!r} cannot be used ({reasons[index]}) and is skipped. "
                f"Broken images so far: {len(self.broken_images)}.",
                file=sys.stderr,
                flush=True,
            )
        if len(self.broken_images) > self.data.max_broken_fraction * len(self.source):
            raise DataError(
                f"{len(self.broken_images)} of the {len(self.source)} images cannot be used, which "
                f"is more than data.max_broken_fraction={self.data.max_broken_fraction}: "
                "replace them by intact files, or raise it."
            )


class CaptionBatches(Batches):
    """Batches of captions alone: those of `Batches`, whose images are not decoded."""

    def __getitem__(self, step: int) -> Batch:
        spec = self.sampler[step]
        indices = spec.image_indices[list(self.rows)]
        return {
            "weight": np.where(indices == NO_IMAGE, 0, self.source.loss_weights[indices]),
            **self._encode_step(step, spec),
            "skipped": np.int32(0),
        }

    def start(self, step: int) -> grain.DatasetIterator[Batch]:
        """Return an iterator of the batches from `step` on, which reads ahead; close it."""
        steps = grain.MapDataset.range(step, self.num_steps)
        return grain.experimental.ThreadPrefetchIterDataset(
            steps.map(self.__getitem__).to_iter_dataset(), prefetch_buffer_size=PREFETCH_BATCHES
        ).__iter__()


class _StepSource:
    """The images of a range of steps, in the form that grain reads."""

    def __init__(self, image_loader: ImageLoader, first_step: int, end_step: int):
        self.image_loader, self.first_step, self.end_step = image_loader, first_step, end_step

    def __len__(self) -> int:
        return self.end_step - self.first_step

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"step": self.first_step + index} | self.image_loader[self.first_step + index]


def _exit_with_parent(worker_index: int, num_workers: int):
    """Make this process end when the trainer does, also when that is killed."""

    def watch_parent():
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()


def share_longest(lengths: Int[np.ndarray, " b"], group_size: int) -> Int32[np.ndarray, " b"]:
    """Return the longest length of each group of consecutive captions in place of their own.

    Args:
        lengths: Tokens of each caption.
        group_size: Captions in a group; it divides their number.
    """
    longest = lengths.reshape(-1, group_size).max(axis=1)
    return np.repeat(longest, group_size).astype(np.int32)


def padded_text_length(num_tokens: int, limit: int, masking: str) -> int:
    """Return the text length of a batch whose longest caption has a number of tokens.

    Args:
        num_tokens: Number of tokens of the longest caption.
        limit: Maximum number of tokens (`text.max_length`).
        masking: Masking of padding tokens in the model.

    Returns:
        One of at most MAX_TEXT_LENGTHS lengths.
    """
    num_visible = visible_lengths(np.array([min(num_tokens, limit)]), limit, masking)
    return round_up_length(int(num_visible[0]), limit, max(LENGTH_STEP, limit // MAX_TEXT_LENGTHS))


def encode_captions(
    encoder: TextEncoder,
    captions: Sequence[str | None],
    text_length: int,
    dropped_caption: Literal["empty", "masked"] = "empty",
) -> Batch:
    """Encode captions and pad them to one length.

    Args:
        encoder: Text encoder; longer captions are truncated at its limit.
        captions: Captions; None for those that are dropped.
        text_length: Number of tokens of the result.
        dropped_caption: Replacement of dropped captions: the empty prompt, or no token at all.

    Returns:
        The arrays `text` [b, text_length, d] and `lengths` [b] of a batch.
    """
    embeddings = encoder.encode([caption or "" for caption in captions], truncate=True)
    text, lengths = encoder.pad_embeddings(embeddings, text_length)
    if dropped_caption == "masked":
        lengths[[caption is None for caption in captions]] = 0
    return {"text": text, "lengths": lengths}


def make_validation_batches(
    source: Source, data: config.Data, encoder: TextEncoder, num_images: int, masking: str
) -> list[Batch]:
    """Make batches of the first images of a source, with first captions and center crops.

    Args:
        source: Source of images and captions; each source of a mixture contributes its fraction.
        data: Settings of the data.
        encoder: Text encoder.
        num_images: Maximum number of images.
        masking: Masking of padding tokens in the model.

    Returns:
        Batches of one shape. The last one is padded with rows of weight 0.

    Raises:
        DataError: None of the images can be decoded.
    """
    indices = first_image_indices(source, min(num_images, len(source)))
    batch_size = min(data.batch_size, len(indices))
    max_tokens = max(encoder.count_tokens(first_caption(source, i, data)) for i in indices)
    text_length = padded_text_length(max_tokens, encoder.max_length, masking)
    size = (data.resolution, data.resolution)
    batches: list[Batch] = []
    for start in range(0, len(indices), batch_size):
        batch_indices = indices[start : start + batch_size]
        batch_indices += [NO_IMAGE] * (batch_size - len(batch_indices))
        captions = ["" if i == NO_IMAGE else first_caption(source, i, data) for i in batch_indices]
        images = load_images(source, batch_indices, size, [Augmentation()] * batch_size)
        batches.append(
            {
                "image": images.image,
                **encode_captions(encoder, captions, text_length),
                "weight": np.sign(images.weight),
            }
        )
    if not any(batch["weight"].any() for batch in batches):
        raise DataError(
            f"None of the {len(indices)} validation images can be decoded "
            f"(the first is {source.name(indices[0])!r}): replace them by intact files."
        )
    return batches


def first_image_indices(source: Source, count: int) -> list[int]:
    """Return the indices of the first images of a source, at most `count`.

    Of a mixture, each source contributes its fraction, one source after the other.
    """
    ends = np.rint(np.cumsum([span.fraction for span in source.spans]) * count).astype(int)
    return [
        span.start + i
        for span, num_from_span in zip(source.spans, np.diff(ends, prepend=0).tolist())
        for i in range(min(num_from_span, span.num_images))
    ]
