"""The data source `shapes`: scenes, captions and images are computed when they are requested."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt32
from PIL import Image

from radiance import config
from radiance.data.source import Span
from radiance.shapes.attributes import Split
from radiance.shapes.captions import Caption, make_caption
from radiance.shapes.scenes import Scene, render_scene, sample_scene

# Version of scenes, images and captions: increase it with any change of what (seed, index) gives.
SHAPES_VERSION = 1


class ShapesSource:
    """The first images of a split's unlimited sequence of scenes, each with one caption.

    Images are squares of any resolution. In validation some have pairs of shape and color that
    never occur in training.

    Args:
        settings: Settings of the scenes and captions.
        split: "train" or "validation".
        resolution: Width and height in pixels of the largest images that will be requested.

    Raises:
        ConfigError: `settings.max_tokens` is too small.
    """

    skip_counts: Mapping[str, int] = {}
    skip_examples: Mapping[str, Sequence[str]] = {}

    def __init__(self, settings: config.Shapes, split: Split, resolution: int):
        self.settings = settings
        self.split: Split = split
        self.resolution = resolution
        self.spans = [Span(0, len(self), 1.0)]
        self._make_caption(0)  # raises an error for settings without room for captions

    def __len__(self) -> int:
        return self.settings.num_images

    @property
    def sizes(self) -> UInt32[np.ndarray, "n 2"]:
        """Width and height of every image."""
        return np.broadcast_to(np.uint32(self.resolution), (len(self), 2))

    @property
    def loss_weights(self) -> Float32[np.ndarray, " n"]:
        """Loss weights of all images, which are 1."""
        return np.broadcast_to(np.float32(1), len(self))

    def load_image(self, index: int, cover_size: tuple[int, int] | None = None) -> Image.Image:
        """Render an image, at the longer side of `cover_size` (width, height) if it is given."""
        resolution = self.resolution if cover_size is None else max(cover_size)
        return render_scene(self._sample_scene(index), resolution)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return the one caption of an image."""
        return (self._make_caption(index).text,)

    def has_tags(self, index: int) -> bool:
        """Return False: captions are sentences."""
        return False

    def attributes(self, index: int) -> dict[str, Any]:
        """Return the descriptions of the whole `scene`, and of what the caption `described`."""
        return {
            "scene": self._sample_scene(index).description,
            "described": self._make_caption(index).description,
        }

    def name(self, index: int) -> str:
        """Return the name of an image in messages."""
        return f"{self.split} {index} of seed {self.settings.seed}"

    def address(self, index: int) -> None:
        """Return None: images have no files."""
        return None

    def fingerprint(self) -> str:
        """Return a hash of everything that determines the images and captions."""
        settings = config.to_json(self.settings)
        return hashlib.sha256(
            f"shapes {SHAPES_VERSION} {self.split} {settings}".encode()
        ).hexdigest()

    def _sample_scene(self, index: int) -> Scene:
        settings = self.settings
        return sample_scene(
            settings.seed, index, self.split, settings.max_objects, settings.backgrounds
        )

    def _make_caption(self, index: int) -> Caption:
        settings = self.settings
        return make_caption(
            self._sample_scene(index),
            settings.caption_lengths,
            settings.max_tokens,
            settings.named_backgrounds,
        )
