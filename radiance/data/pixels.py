"""The pixels of each step's batch. Worker processes run this, so it uses no device."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8

from radiance import config
from radiance.data.captions import drawn_caption, mentions_sides
from radiance.data.datasets import Source
from radiance.data.decode import Broken
from radiance.data.draws import Of, draws
from radiance.data.order import EMPTY, Order
from radiance.pictures import fitted


class View(NamedTuple):
    """What is seen of a picture at one step."""

    across: float = 0.5  # where it is cut, from 0 to 1
    down: float = 0.5
    mirrored: bool = False


class Drawn(NamedTuple):
    """Pictures of one shape."""

    image: UInt8[np.ndarray, "b height width 3"]  # grey where there is none
    weight: Float32[np.ndarray, " b"]  # of the losses; 0 where there is no picture
    broken: Mapping[int, str]  # why pictures cannot be used, by their numbers


class Pixels:
    """`pixels[step]` is what `rows` of that step's batch show."""

    def __init__(self, source: Source, order: Order, data: config.Data, seed: int, rows: Sequence[int]):
        self.source, self.order, self.data, self.seed, self.rows = source, order, data, seed, rows

    def __getitem__(self, step: int) -> dict[str, Any]:
        chosen = self.order[step]
        pictures = chosen.pictures[list(self.rows)]
        views = [self._view(step * self.data.batch + row, int(index)) for row, index in zip(self.rows, pictures)]
        return draw(self.source, pictures, (chosen.width, chosen.height), views)._asdict()

    def _view(self, position: int, index: int) -> View:
        if index == EMPTY:
            return View()
        across, down, mirrored = draws(self.seed, Of.VIEW, position).random(3)
        if self.data.crop == "centre":
            across = down = 0.5
        turned = mirrored < self.data.mirror and not mentions_sides(drawn_caption(self.source, index, self.data, self.seed, position) or "")
        return View(across, down, turned)


def draw(source: Source, pictures: Sequence[int], size: tuple[int, int], views: Sequence[View]) -> Drawn:
    """Pictures of a source at (width, height)."""
    image = np.full((len(pictures), size[1], size[0], 3), 128, np.uint8)
    weight, broken = np.zeros(len(pictures), np.float32), {}
    for row, (index, view) in enumerate(zip(pictures, views)):
        if index == EMPTY:
            continue
        try:
            found = fitted(source.picture(index, size), *size, view.across, view.down)
        except Broken as reason:
            broken[int(index)] = str(reason)
        else:
            image[row] = found[:, ::-1] if view.mirrored else found
            weight[row] = source.weights[index]
    return Drawn(image, weight, broken)
