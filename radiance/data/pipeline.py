"""Batches as a function of (seed, step) alone, on any number of hosts."""

from collections.abc import Iterator, Sequence

import grain
import numpy as np

from radiance import config
from radiance.data.datasets import Source
from radiance.pictures import to_array
from radiance.text.encoders import Encoder

Batch = dict[str, np.ndarray]  # image [b, height, width, 3], text [b, l, d], lengths [b], weight [b]


class Batches:
    """`batches[step]` is this host's `rows` of the global batch of that step (all when None).

    Every epoch is a new permutation. Which caption is drawn, and whether it is dropped, depends on (seed, position) alone.
    """

    def __init__(self, source: Source, data: config.Data, encoder: Encoder, seed: int, steps: int, rows: Sequence[int] | None = None):
        self.source, self.data, self.encoder, self.seed, self.steps = source, data, encoder, seed, steps
        self.rows = range(data.batch) if rows is None else rows
        self.order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        pictures, captions = zip(*(self._example(step * self.data.batch + row) for row in self.rows))
        text, lengths = self.encoder(captions, cut=True)
        cut = sum(self.encoder.count(caption) > self.encoder.limit for caption in captions)
        weight = np.ones(len(captions), np.float32)
        return {"image": np.stack(pictures), "text": text, "lengths": lengths, "weight": weight, "cut": np.int32(cut)}

    def _example(self, position: int) -> tuple[np.ndarray, str]:
        example = self.source[self.order[position]]
        # Philox streams are fixed by NumPy's promise for bit generators; floor(random · n) does not lean on Generator's own methods.
        choice, dropped = np.random.Generator(np.random.Philox(key=[self.seed, position])).random(2)
        caption = "" if dropped < self.data.caption_dropout else example.captions[int(choice * len(example.captions))]
        return to_array(example.picture, self.data.side, self.data.side), caption

    def start(self, step: int) -> Iterator[Batch]:
        """Batches from `step` on, read ahead in threads."""
        ahead = grain.ReadOptions(num_threads=self.data.threads, prefetch_buffer_size=2 * self.data.threads)
        return iter(grain.MapDataset.source(self)[step:].to_iter_dataset(ahead))


def fixed_batches(source: Source, data: config.Data, encoder: Encoder, pictures: int) -> list[Batch]:
    """The first `pictures` examples with their first caption, in batches of one size; the last one is filled with rows of weight 0."""
    count = min(pictures, len(source))
    size = min(data.batch, count)
    batches = []
    for start in range(0, count, size):
        rows = [source[min(i, count - 1)] for i in range(start, start + size)]
        text, lengths = encoder([row.captions[0] for row in rows], cut=True)
        image = np.stack([to_array(row.picture, data.side, data.side) for row in rows])
        weight = (np.arange(start, start + size) < count).astype(np.float32)
        batches.append({"image": image, "text": text, "lengths": lengths, "weight": weight})
    return batches
