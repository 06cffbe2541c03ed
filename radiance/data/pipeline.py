"""Batches as a function of (seed, step) alone, on any number of hosts and with any number of processes."""

import sys
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from radiance import config
from radiance.data.captions import drawn_caption, first_caption
from radiance.data.datasets import DataError, Source
from radiance.data.order import EMPTY, Chosen, Order
from radiance.data.pixels import Pixels, View, draw
from radiance.model.transformer import visible_tokens
from radiance.text.encoders import BUCKET, Encoder, bucket

Batch = dict[str, np.ndarray]  # image [b, height, width, 3] uint8, text [b, l, d], lengths [b], weight [b], dropped [b]
WIDTHS = 8  # lengths that texts are cut to, at most: each is a program that must be compiled
MANY = 8  # pictures of a batch: that none of so many can be used is no chance
AHEAD = 2  # batches that stand ready for the trainer, their text encoded


class Batches:
    """`batches[step]` is this host's `rows` of the global batch of that step (all when None).

    What is in a batch, which caption of a picture is drawn, what is left of it, and what is seen of the picture, follows from
    the seed and the step. Text is cut where no row of the global batch has a token that the model's `masking` shows.
    Besides what the trainer needs, a batch counts the captions of all hosts that were `cut` at the encoder's limit, and this host's pictures
    that were `skipped` because they are broken.
    """

    def __init__(
        self, source: Source, data: config.Data, encoder: Encoder, seed: int, steps: int, masking: str, rows: Sequence[int] | None = None
    ):
        self.source, self.data, self.encoder, self.seed, self.steps, self.masking = source, data, encoder, seed, steps, masking
        self.rows = range(data.batch) if rows is None else rows
        self.order = Order(source, data, seed)
        self.pixels = Pixels(source, self.order, data, seed, self.rows)
        self.broken: dict[int, str] = {}  # pictures that have been found impossible to decode

    def __getitem__(self, step: int) -> Batch:
        return self._complete(step, self.pixels[step])

    def start(self, step: int) -> grain.DatasetIterator[Batch]:
        """Batches from `step` on, read ahead: pictures by threads, or by processes with threads, and text by a thread of this process,
        where the encoder's devices are. To be closed. Raises DataError when too many pictures are broken."""
        reading = grain.ReadOptions(num_threads=self.data.threads, prefetch_buffer_size=self.data.threads)
        pictures = grain.MapDataset.source(_Steps(self.pixels, step, self.steps)).to_iter_dataset(reading)
        if self.data.workers:
            import absl.flags

            absl.flags.FLAGS.mark_as_parsed()  # grain reads one of them in its processes
            pictures = pictures.mp_prefetch(grain.MultiprocessingOptions(num_workers=self.data.workers, per_worker_buffer_size=2))
        whole = pictures.map(lambda drawn: self._complete(drawn.pop("step"), drawn))
        return grain.experimental.ThreadPrefetchIterDataset(whole, prefetch_buffer_size=AHEAD).__iter__()

    def _complete(self, step: int, drawn: dict[str, Any]) -> Batch:
        """The batch of a step from its pictures."""
        self._note(drawn["broken"])
        chosen = self.order[step]
        there = int((chosen.pictures[list(self.rows)] != EMPTY).sum())
        if there >= MANY and not drawn["weight"].any():
            raise DataError(
                f"None of the {there} pictures of step {step + 1} can be used: look whether the disk that they lie on is still there."
            )
        captions = self._captions(step, chosen)  # of all hosts, for their arrays must have one shape
        tokens = [self.encoder.count(caption or "") for caption in captions]
        width = width_for(max(tokens), self.encoder.limit, self.masking)
        ours = [captions[row] for row in self.rows]
        text, lengths = self.encoder.pad(self.encoder.encode([caption or "" for caption in ours], cut=True), width)
        dropped = np.array([caption is None for caption in ours])
        if self.data.dropout_to == "masked":
            lengths[dropped] = 0
        counts = {
            "cut": sum(count > self.encoder.limit for count in tokens),
            "skipped": len(drawn["broken"]),
        }
        return {"image": drawn["image"], "weight": drawn["weight"], "text": text, "lengths": lengths, "dropped": dropped} | {
            name: np.int32(count) for name, count in counts.items()
        }

    def _captions(self, step: int, chosen: Chosen) -> list[str | None]:
        """None for one that is dropped; empty where there is no picture."""
        first = step * self.data.batch
        return [
            "" if index == EMPTY else drawn_caption(self.source, index, self.data, self.seed, first + row)
            for row, index in enumerate(chosen.pictures.tolist())
        ]

    def _note(self, broken: dict[int, str]):
        """Tells of each broken picture once. Raises DataError when there are too many."""
        for index in broken.keys() - self.broken.keys():
            self.broken[index] = broken[index]
            told = (
                f"{self.source.name(index)!r} cannot be used ({broken[index]}) and is passed over. So far {len(self.broken)} were broken."
            )
            print(told, file=sys.stderr, flush=True)
        if len(self.broken) > self.data.broken_limit * len(self.source):
            raise DataError(
                f"{len(self.broken)} of the {len(self.source)} pictures cannot be used, which is more than "
                f"data.broken_limit={self.data.broken_limit}: put whole ones there, or raise it."
            )


class _Steps:
    """The pictures of the steps from `first` on, as grain reads them."""

    def __init__(self, pixels: Pixels, first: int, end: int):
        self.pixels, self.first, self.end = pixels, first, end

    def __len__(self) -> int:
        return self.end - self.first

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"step": self.first + index} | self.pixels[self.first + index]


def width_for(longest: int, limit: int, masking: str) -> int:
    """Tokens that the texts of a batch are cut to when the longest has so many."""
    visible = visible_tokens(np.array([min(longest, limit)]), limit, masking)
    return bucket(int(visible[0]), limit, max(BUCKET, limit // WIDTHS))


def fixed_batches(source: Source, data: config.Data, encoder: Encoder, pictures: int, masking: str) -> list[Batch]:
    """The first `pictures` examples with their first caption, cut to squares from their centres, in batches of one shape; the last one is
    filled with rows of weight 0. Of a mixture, as many of each part as its share says."""
    chosen = first_pictures(source, min(pictures, len(source)))
    size = min(data.batch, len(chosen))
    width = width_for(max(encoder.count(first_caption(source, i, data)) for i in chosen), encoder.limit, masking)
    batches = []
    for start in range(0, len(chosen), size):
        rows = chosen[start : start + size]
        rows += [EMPTY] * (size - len(rows))
        captions = ["" if i == EMPTY else first_caption(source, i, data) for i in rows]
        text, lengths = encoder.pad(encoder.encode(captions, cut=True), width)
        drawn = draw(source, rows, (data.side, data.side), [View()] * size)
        batches.append({"image": drawn.image, "text": text, "lengths": lengths, "weight": np.sign(drawn.weight)})
    if not any(batch["weight"].any() for batch in batches):
        raise DataError(
            f"None of the {len(chosen)} pictures to validate with can be decoded ({source.name(chosen[0])!r} is the first): put whole ones there."
        )
    return batches


def first_pictures(source: Source, count: int) -> list[int]:
    """The first pictures of a source, at most `count`; of a mixture, of each part as many as its share says, part after part."""
    ends = np.rint(np.cumsum([span.share for span in source.spans]) * count).astype(int)
    return [span.first + i for span, wanted in zip(source.spans, np.diff(ends, prepend=0).tolist()) for i in range(min(wanted, span.count))]
