"""Batches as a function of (seed, step) alone, on any number of hosts."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import Float32

from radiance import config
from radiance.data.captions import caption_of, mentions_sides
from radiance.data.datasets import Source
from radiance.data.decode import Broken
from radiance.model.transformer import visible_tokens
from radiance.pictures import to_array
from radiance.text.encoders import BUCKET, Encoder, bucket

Batch = dict[str, np.ndarray]  # image [b, height, width, 3], text [b, l, d], lengths [b], weight [b]
WIDTHS = 8  # lengths that texts are cut to, at most: each is a program that must be compiled


class View(NamedTuple):
    """What is seen of a picture at one step."""

    across: float = 0.5  # where it is cut, from 0 to 1
    down: float = 0.5
    mirrored: bool = False


class Batches:
    """`batches[step]` is this host's `rows` of the global batch of that step (all when None).

    Every epoch is a new permutation. Which caption is drawn, what is left of it, and what is
    seen of the picture, depends on (seed, position) alone. Text is
    cut where no row of the global batch has a token that the model's `masking` shows.
    """

    def __init__(
        self, source: Source, data: config.Data, encoder: Encoder, seed: int, steps: int, masking: str, rows: Sequence[int] | None = None
    ):
        self.source, self.data, self.encoder, self.seed, self.steps, self.masking = source, data, encoder, seed, steps, masking
        self.rows = range(data.batch) if rows is None else rows
        self.order = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        first = step * self.data.batch
        # Every host looks at the captions of all, for their arrays must have one shape.
        of_all = [self._caption(position) for position in range(first, first + self.data.batch)]
        width = text_width((caption or "" for caption in of_all), self.encoder, self.masking)
        captions = [of_all[row] for row in self.rows]
        views = [self._view(first + row, caption) for row, caption in zip(self.rows, captions)]
        pictures, weight = _pictures(self.source, [self.order[first + row] for row in self.rows], self.data.side, views)
        text, lengths = self.encoder.pad(self.encoder.encode([caption or "" for caption in captions], cut=True), width)
        if self.data.dropout_to == "masked":
            lengths[[caption is None for caption in captions]] = 0
        cut = sum(self.encoder.count(caption) > self.encoder.limit for caption in captions if caption)
        return {"image": pictures, "text": text, "lengths": lengths, "weight": weight, "cut": np.int32(cut)}

    def _caption(self, position: int) -> str | None:
        """None for one that is dropped."""
        index = self.order[position]
        return caption_of(self.source.captions(index), self.source.tags(index), self.data, self._draw(position, 0))

    def _view(self, position: int, caption: str | None) -> View:
        across, down, mirrored = self._draw(position, 1).random(3)
        if self.data.crop == "centre":
            across = down = 0.5
        return View(across, down, mirrored < self.data.mirror and not mentions_sides(caption or ""))

    def _draw(self, position: int, what: int) -> np.random.Generator:
        """Numbers of their own for each thing that is drawn; NumPy promises that Philox's stream stays as it is."""
        return np.random.Generator(np.random.Philox(key=[self.seed | what << 32, position]))

    def start(self, step: int) -> Iterator[Batch]:
        """Batches from `step` on, read ahead in threads."""
        ahead = grain.ReadOptions(num_threads=self.data.threads, prefetch_buffer_size=2 * self.data.threads)
        return iter(grain.MapDataset.source(self)[step:].to_iter_dataset(ahead))


def _pictures(
    source: Source, indices: Sequence[int], side: int, views: Sequence[View] | None = None
) -> tuple[Float32[np.ndarray, "b side side 3"], Float32[np.ndarray, " b"]]:
    """Pictures and their weights; in the place of a broken one is grey of weight 0. views: their centres, as they are, when None."""
    pixels, weights = np.zeros((len(indices), side, side, 3), np.float32), np.ones(len(indices), np.float32)
    for row, index in enumerate(indices):
        try:
            across, down, mirrored = views[row] if views else View()
            found = to_array(source[index].picture, side, side, across, down)
            pixels[row] = found[:, ::-1] if mirrored else found
        except Broken:
            weights[row] = 0
    return pixels, weights


def text_width(captions: Iterable[str], encoder: Encoder, masking: str) -> int:
    """Tokens that the texts of a batch are cut to: what is cut off is hidden in all of them."""
    if masking == "off":
        return encoder.limit
    counts = np.array([min(encoder.count(caption), encoder.limit) for caption in captions])
    return bucket(int(visible_tokens(counts, encoder.limit, masking).max()), encoder.limit, max(BUCKET, encoder.limit // WIDTHS))


def fixed_batches(source: Source, data: config.Data, encoder: Encoder, pictures: int, masking: str) -> list[Batch]:
    """The first `pictures` examples with their first caption, in batches of one shape; the last one is filled with rows of weight 0."""
    count = min(pictures, len(source))
    size = min(data.batch, count)
    width = text_width((source.captions(i)[0] for i in range(count)), encoder, masking)
    batches = []
    for start in range(0, count, size):
        rows = [min(i, count - 1) for i in range(start, start + size)]
        text, lengths = encoder.pad(encoder.encode([source.captions(i)[0] for i in rows], cut=True), width)
        image, weight = _pictures(source, rows, data.side)
        weight *= np.arange(start, start + size) < count
        batches.append({"image": image, "text": text, "lengths": lengths, "weight": weight})
    return batches
