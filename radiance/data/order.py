"""Which pictures make the batch of each step, and what shape they are cut to."""

import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64, Int64

from radiance import config
from radiance.data.buckets import shapes
from radiance.data.catalogue import DataError
from radiance.data.datasets import Source
from radiance.data.draws import Of, draws, shuffled

EMPTY = -1  # a row without a picture
HELD = 2  # epochs that are kept: the readers ahead may have begun the next one


class Chosen(NamedTuple):
    """A batch."""

    pictures: Int64[np.ndarray, " b"]
    width: int  # pixels
    height: int


class Epoch(NamedTuple):
    first: int  # step
    batches: list[Chosen]
    carried: tuple[Int64[np.ndarray, " some"], ...]  # of each shape: those that wait for the next epoch


class Order:
    """`order[step]` is the batch of that step, over all hosts. It follows from the source, the settings and the seed alone.

    An epoch shows each picture once. Of a mixture it shows as many pictures as there are, each part as many as its share
    says, and within each part none a second time before all were shown. In every epoch each picture draws one of the base
    resolutions that it is large enough for; pictures of one shape make batches, and the batches come in a random order.
    What is left of a shape is carried to the next epoch, fills a batch with EMPTY rows, or is dropped, as `data.remainder` says.

    Steps are meant to be asked for in about their order: to find one the epochs before it are gone through, once.
    """

    def __init__(self, source: Source, data: config.Data, seed: int):
        self.data, self.seed, self.spans = data, seed, source.spans
        self.shapes = shapes(*source.sizes.T, data)
        self._firsts = [0]  # steps at which epochs begin, as far as is known
        self._carried = [tuple(np.empty(0, np.int64) for _ in self.shapes.sizes)]  # into each of them
        self._held: OrderedDict[int, Epoch] = OrderedDict()
        self._lock = threading.Lock()
        if data.remainder == "drop" and (most := self._expected().max()) < data.batch:
            raise DataError(
                f"No shape has data.batch={data.batch} pictures in an epoch, but {most:.0f} at most, so data.remainder=drop may leave none: use "
                "carry or fill, or a smaller batch."
            )

    def _expected(self) -> Float64[np.ndarray, " shapes"]:
        """Pictures of each shape in an epoch, on average."""
        at = self.shapes.at
        total = sum(span.count for span in self.spans)
        often = np.concatenate([np.full(span.count, span.share * total / span.count) for span in self.spans])  # of a mixture, in an epoch
        share = often / np.maximum((at >= 0).sum(axis=0), 1)
        return np.array([((at == shape) * share).sum() for shape in range(len(self.shapes.sizes))])

    def __getstate__(self):
        return {name: value for name, value in vars(self).items() if name not in ("_held", "_lock")}

    def __setstate__(self, state):
        vars(self).update(state, _held=OrderedDict(), _lock=threading.Lock())

    def __getitem__(self, step: int) -> Chosen:
        with self._lock:
            while step >= self._firsts[-1]:
                self._epoch(len(self._firsts) - 1)
            epoch = self._epoch(int(np.searchsorted(self._firsts, step, side="right")) - 1)
        return epoch.batches[step - epoch.first]

    def _epoch(self, number: int) -> Epoch:
        if number not in self._held:
            self._held[number] = epoch = self._made(number)
            if len(self._held) > HELD:
                self._held.popitem(last=False)
            if number == len(self._firsts) - 1:
                self._firsts.append(epoch.first + len(epoch.batches))
                self._carried.append(epoch.carried)
        self._held.move_to_end(number)
        return self._held[number]

    def _made(self, number: int) -> Epoch:
        pictures, shape = self.drawn(number)
        size, batches, carried = self.data.batch, [], []
        for this, (before, (width, height)) in enumerate(zip(self._carried[number], self.shapes.sizes)):
            queue = np.concatenate([before, pictures[shape == this]])
            whole = len(queue) // size * size
            rest = queue[whole:]
            if self.data.remainder == "fill" and len(rest):
                queue = np.concatenate([queue, np.full(size - len(rest), EMPTY)])
                whole = len(queue)
            carried.append(rest if self.data.remainder == "carry" else rest[:0])
            batches += [Chosen(queue[i : i + size], width, height) for i in range(0, whole, size)]
        order = shuffled(draws(self.seed, Of.BATCHES, number), len(batches))
        return Epoch(self._firsts[number], [batches[i] for i in order], tuple(carried))

    def drawn(self, epoch: int) -> tuple[Int64[np.ndarray, " some"], Int64[np.ndarray, " some"]]:
        """The pictures of an epoch, and the shape that each is cut to."""
        pictures = self._pictures(epoch)
        return pictures, self._drawn_shapes(epoch, pictures)

    def _pictures(self, epoch: int) -> Int64[np.ndarray, " some"]:
        """Those of an epoch in a random order, in which no part comes before another."""
        total = sum(span.count for span in self.spans)
        shares = np.cumsum([span.share for span in self.spans])
        # How many of each part were seen before this epoch and will have been after it; each sums to whole epochs.
        before, after = (np.diff(np.rint(shares * total * epochs).astype(int), prepend=0).tolist() for epochs in (epoch, epoch + 1))
        found = []
        for part, (span, position, end) in enumerate(zip(self.spans, before, after)):
            while position < end:
                turn, inside = divmod(position, span.count)
                some = shuffled(draws(self.seed, Of.PICTURES, turn, part), span.count)[inside : inside + end - position]
                found.append(span.first + some)
                position += len(some)
        pictures = np.concatenate(found)
        return pictures if len(found) == 1 else pictures[shuffled(draws(self.seed, Of.PARTS, epoch), len(pictures))]

    def _drawn_shapes(self, epoch: int, pictures: Int64[np.ndarray, " some"]) -> Int64[np.ndarray, " some"]:
        """Of each picture, at one of the base resolutions that it has one for."""
        at = self.shapes.at[:, pictures]
        if len(at) == 1:
            return at[0].astype(np.int64)
        fits = at >= 0
        chosen = np.floor(draws(self.seed, Of.SIDES, epoch).random(len(pictures)) * fits.sum(axis=0))
        row = np.argmax(np.cumsum(fits, axis=0) > chosen, axis=0)
        return at[row, np.arange(len(pictures))].astype(np.int64)
