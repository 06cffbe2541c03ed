"""`shapes` as a source: scenes and captions are drawn when they are asked for, and pictures at the side that is asked for."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt32
from PIL import Image

from radiance import config
from radiance.data.datasets import Span
from radiance.data.shape_captions import Caption, caption
from radiance.data.shapes import Scene, Split, render, scene

VERSION = 1  # of scenes, pictures and captions: to be raised with any change of what (seed, index) gives


class Shapes:
    """The first pictures of a split's endless list, each with one caption. They are squares of any side; in validation there are pairs of shape and
    colour that training never shows. Raises ConfigError when captions have too little room.

    side: pixels of the largest picture that is asked for.
    """

    skipped: Mapping[str, int] = {}
    examples: Mapping[str, Sequence[str]] = {}

    def __init__(self, settings: config.Shapes, split: Split, side: int):
        self.settings, self.split, self.side = settings, split, side
        self.spans = [Span(0, len(self), 1.0)]
        self._caption(0)

    def __len__(self) -> int:
        return self.settings.count

    @property
    def sizes(self) -> UInt32[np.ndarray, "n 2"]:
        return np.broadcast_to(np.uint32(self.side), (len(self), 2))

    @property
    def weights(self) -> Float32[np.ndarray, " n"]:
        return np.broadcast_to(np.float32(1), len(self))

    def picture(self, index: int, cover: tuple[int, int] | None = None) -> Image.Image:
        return render(self._scene(index), self.side if cover is None else max(cover))

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._caption(index).text,)

    def tags(self, index: int) -> bool:
        return False

    def attributes(self, index: int) -> dict[str, Any]:
        """`shown` and `told`: the Facts of the picture, and those that its caption says."""
        return {"shown": self._scene(index).facts, "told": self._caption(index).facts}

    def name(self, index: int) -> str:
        return f"{self.split} {index} of seed {self.settings.seed}"

    def address(self, index: int) -> None:
        return None

    def fingerprint(self) -> str:
        return hashlib.sha256(f"shapes {VERSION} {self.split} {config.to_json(self.settings)}".encode()).hexdigest()

    def _scene(self, index: int) -> Scene:
        made = self.settings
        return scene(made.seed, index, self.split, made.objects, made.backgrounds)

    def _caption(self, index: int) -> Caption:
        return caption(self._scene(index), self.settings.law, self.settings.limit)
