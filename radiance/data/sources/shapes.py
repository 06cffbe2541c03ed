"""`shapes` as a source: scenes and captions are drawn when they are asked for, and images at the side that is asked for."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt32
from PIL import Image

from radiance import config
from radiance.data.source import Span
from radiance.shapes.captions import Caption, make_caption
from radiance.shapes.scenes import Scene, Split, render_scene, sample_scene

SHAPES_VERSION = (
    1  # of scenes, images and captions: to be raised with any change of what (seed, index) gives
)


class ShapesSource:
    """The first images of a split's endless list, each with one caption. They are squares of any side; in validation there are pairs of shape and
    color that training never shows. Raises ConfigError when captions have too little room.

    side: pixels of the largest image that is asked for.
    """

    skip_counts: Mapping[str, int] = {}
    skip_examples: Mapping[str, Sequence[str]] = {}

    def __init__(self, settings: config.Shapes, split: Split, resolution: int):
        self.settings, self.split, self.resolution = settings, split, resolution
        self.spans = [Span(0, len(self), 1.0)]
        self._make_caption(0)

    def __len__(self) -> int:
        return self.settings.num_images

    @property
    def sizes(self) -> UInt32[np.ndarray, "n 2"]:
        return np.broadcast_to(np.uint32(self.resolution), (len(self), 2))

    @property
    def loss_weights(self) -> Float32[np.ndarray, " n"]:
        return np.broadcast_to(np.float32(1), len(self))

    def load_image(self, index: int, cover_size: tuple[int, int] | None = None) -> Image.Image:
        return render_scene(
            self._sample_scene(index), self.resolution if cover_size is None else max(cover_size)
        )

    def captions(self, index: int) -> tuple[str, ...]:
        return (self._make_caption(index).text,)

    def has_tags(self, index: int) -> bool:
        return False

    def attributes(self, index: int) -> dict[str, Any]:
        """`shown` and `told`: the Facts of the image, and those that its caption says."""
        return {
            "shown": self._sample_scene(index).description,
            "told": self._make_caption(index).description,
        }

    def name(self, index: int) -> str:
        return f"{self.split} {index} of seed {self.settings.seed}"

    def address(self, index: int) -> None:
        return None

    def fingerprint(self) -> str:
        return hashlib.sha256(
            f"shapes {SHAPES_VERSION} {self.split} {config.to_json(self.settings)}".encode()
        ).hexdigest()

    def _sample_scene(self, index: int) -> Scene:
        settings = self.settings
        return sample_scene(
            settings.seed, index, self.split, settings.max_objects, settings.backgrounds
        )

    def _make_caption(self, index: int) -> Caption:
        return make_caption(
            self._sample_scene(index), self.settings.caption_lengths, self.settings.max_tokens
        )
