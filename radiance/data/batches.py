"""Batches as a function of (seed, step) alone, on any number of hosts and with any number of processes."""

import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from radiance import config
from radiance.data.captions import first_caption, sample_caption
from radiance.data.datasets import DataError
from radiance.data.images import Augmentation, ImageLoader, load_images
from radiance.data.sampler import NO_IMAGE, BatchSampler, BatchSpec
from radiance.data.source import Source
from radiance.model.transformer import visible_lengths
from radiance.text.encoder import LENGTH_STEP, TextEncoder, round_up_length

Batch = dict[
    str, np.ndarray
]  # image [b, height, width, 3] uint8, text [b, l, d], lengths [b], weight [b], dropped [b]
MAX_TEXT_LENGTHS = (
    8  # lengths that texts are cut to, at most: each is a program that must be compiled
)
MIN_IMAGES_TO_FAIL = 8  # images of a batch: that none of so many can be used is no chance
PREFETCH_BATCHES = 2  # batches that stand ready for the trainer, their text encoded


class Batches:
    """`batches[step]` is this host's `rows` of the global batch of that step (all when None).

    What is in a batch, which caption of an image is drawn, what is left of it, and what is seen of the image, follows from
    the seed and the step. Text is cut where no row of the global batch has a token that the model's `masking` shows.
    Besides what the trainer needs, a batch counts the captions of all hosts that were `cut` at the encoder's limit, and this host's images
    that were `skipped` because they are broken.
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
        self.source, self.data, self.encoder, self.seed, self.num_steps, self.masking = (
            source,
            data,
            encoder,
            seed,
            num_steps,
            masking,
        )
        self.rows = range(data.batch_size) if rows is None else rows
        self.sampler = BatchSampler(source, data, seed)
        self.image_loader = ImageLoader(source, self.sampler, data, seed, self.rows)
        self.broken_images: dict[int, str] = {}  # images that have been found impossible to decode

    def __getitem__(self, step: int) -> Batch:
        return self._build_batch(step, self.image_loader[step])

    def start(self, step: int) -> grain.DatasetIterator[Batch]:
        """Batches from `step` on, read ahead: images by threads, or by processes with threads, and text by a thread of this process,
        where the encoder's devices are. To be closed. Raises DataError when too many images are broken.
        """
        read_options = grain.ReadOptions(
            num_threads=self.data.num_threads, prefetch_buffer_size=self.data.num_threads
        )
        image_dataset = grain.MapDataset.source(
            _StepSource(self.image_loader, step, self.num_steps)
        ).to_iter_dataset(read_options)
        if self.data.num_workers:
            import absl.flags

            absl.flags.FLAGS.mark_as_parsed()  # grain reads one of them in its processes
            image_dataset = image_dataset.mp_prefetch(
                grain.MultiprocessingOptions(
                    num_workers=self.data.num_workers, per_worker_buffer_size=2
                )
            )
        batch_dataset = image_dataset.map(
            lambda image_batch: self._build_batch(image_batch.pop("step"), image_batch)
        )
        return grain.experimental.ThreadPrefetchIterDataset(
            batch_dataset, prefetch_buffer_size=PREFETCH_BATCHES
        ).__iter__()

    def _build_batch(self, step: int, image_batch: dict[str, Any]) -> Batch:
        """The batch of a step from its images."""
        self._report_broken(image_batch["broken"])
        spec = self.sampler[step]
        num_images = int((spec.indices[list(self.rows)] != NO_IMAGE).sum())
        if num_images >= MIN_IMAGES_TO_FAIL and not image_batch["weight"].any():
            raise DataError(
                f"None of the {num_images} images of step {step + 1} can be used: look whether the disk that they lie on is still there."
            )
        captions = self._sample_captions(
            step, spec
        )  # of all hosts, for their arrays must have one shape
        token_counts = [self.encoder.count_tokens(caption or "") for caption in captions]
        text_length = padded_text_length(max(token_counts), self.encoder.max_length, self.masking)
        local_captions = [captions[row] for row in self.rows]
        text, lengths = self.encoder.pad_embeddings(
            self.encoder.encode([caption or "" for caption in local_captions], truncate=True),
            text_length,
        )
        is_dropped = np.array([caption is None for caption in local_captions])
        if self.data.dropped_caption == "masked":
            lengths[is_dropped] = 0
        counts = {
            "cut": sum(count > self.encoder.max_length for count in token_counts),
            "skipped": len(image_batch["broken"]),
        }
        return {
            "image": image_batch["image"],
            "weight": image_batch["weight"],
            "text": text,
            "lengths": lengths,
            "dropped": is_dropped,
        } | {name: np.int32(count) for name, count in counts.items()}

    def _sample_captions(self, step: int, spec: BatchSpec) -> list[str | None]:
        """None for one that is dropped; empty where there is no image."""
        first_position = step * self.data.batch_size
        return [
            ""
            if index == NO_IMAGE
            else sample_caption(self.source, index, self.data, self.seed, first_position + row)
            for row, index in enumerate(spec.indices.tolist())
        ]

    def _report_broken(self, errors: dict[int, str]):
        """Tells of each broken image once. Raises DataError when there are too many."""
        for index in errors.keys() - self.broken_images.keys():
            self.broken_images[index] = errors[index]
            message = f"{self.source.name(index)!r} cannot be used ({errors[index]}) and is passed over. So far {len(self.broken_images)} were broken."
            print(message, file=sys.stderr, flush=True)
        if len(self.broken_images) > self.data.max_broken_fraction * len(self.source):
            raise DataError(
                f"{len(self.broken_images)} of the {len(self.source)} images cannot be used, which is more than "
                f"data.max_broken_fraction={self.data.max_broken_fraction}: put whole ones there, or raise it."
            )


class _StepSource:
    """The images of the steps from `first` on, as grain reads them."""

    def __init__(self, image_loader: ImageLoader, first_step: int, end_step: int):
        self.image_loader, self.first_step, self.end_step = image_loader, first_step, end_step

    def __len__(self) -> int:
        return self.end_step - self.first_step

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"step": self.first_step + index} | self.image_loader[self.first_step + index]


def padded_text_length(num_tokens: int, limit: int, masking: str) -> int:
    """Tokens that the texts of a batch are cut to when the longest has so many."""
    num_visible = visible_lengths(np.array([min(num_tokens, limit)]), limit, masking)
    return round_up_length(int(num_visible[0]), limit, max(LENGTH_STEP, limit // MAX_TEXT_LENGTHS))


def make_validation_batches(
    source: Source, data: config.Data, encoder: TextEncoder, num_images: int, masking: str
) -> list[Batch]:
    """The first `images` examples with their first caption, cut to squares from their centers, in batches of one shape; the last one is
    filled with rows of weight 0. Of a mixture, as many of each part as its share says.
    """
    indices = first_image_indices(source, min(num_images, len(source)))
    batch_size = min(data.batch_size, len(indices))
    text_length = padded_text_length(
        max(encoder.count_tokens(first_caption(source, i, data)) for i in indices),
        encoder.max_length,
        masking,
    )
    batches = []
    for start in range(0, len(indices), batch_size):
        batch_indices = indices[start : start + batch_size]
        batch_indices += [NO_IMAGE] * (batch_size - len(batch_indices))
        captions = ["" if i == NO_IMAGE else first_caption(source, i, data) for i in batch_indices]
        text, lengths = encoder.pad_embeddings(encoder.encode(captions, truncate=True), text_length)
        image_batch = load_images(
            source, batch_indices, (data.resolution, data.resolution), [Augmentation()] * batch_size
        )
        batches.append(
            {
                "image": image_batch.image,
                "text": text,
                "lengths": lengths,
                "weight": np.sign(image_batch.weight),
            }
        )
    if not any(batch["weight"].any() for batch in batches):
        raise DataError(
            f"None of the {len(indices)} images to validate with can be decoded ({source.name(indices[0])!r} is the first): put whole ones there."
        )
    return batches


def first_image_indices(source: Source, count: int) -> list[int]:
    """The first images of a source, at most `count`; of a mixture, of each part as many as its share says, part after part."""
    ends = np.rint(np.cumsum([span.fraction for span in source.spans]) * count).astype(int)
    return [
        span.start + i
        for span, num_from_span in zip(source.spans, np.diff(ends, prepend=0).tolist())
        for i in range(min(num_from_span, span.num_images))
    ]
