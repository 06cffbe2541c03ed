"""The interface of data sources, and mixtures of several."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, UInt32
from PIL import Image

MAX_EXAMPLES = 3  # names of a kind of images that are left out


class Span(NamedTuple):
    """The images of one part of a source, which are numbered together."""

    start: int
    num_images: int
    fraction: float  # of the images that are seen; all shares sum to 1


class Source(Protocol):
    """One split of captioned images. Can be pickled, and read from many threads."""

    sizes: UInt32[np.ndarray, "n 2"]  # width and height, upright
    loss_weights: Float32[np.ndarray, " n"]  # of their losses
    spans: Sequence[Span]
    skip_counts: Mapping[str, int]  # images that could not be used, by kind
    skip_examples: Mapping[str, Sequence[str]]  # names of some of them

    def __len__(self) -> int: ...

    def load_image(self, index: int, cover_size: tuple[int, int] | None = None) -> Image.Image:
        """Mode RGB. cover: (width, height) that it will be scaled to cover: it may come smaller than it is, but no smaller than that.

        Raises Broken when it cannot be decoded.
        """

    def captions(self, index: int) -> tuple[str, ...]: ...

    def has_tags(self, index: int) -> bool:
        """Whether the captions are lists of tags with commas between."""

    def attributes(self, index: int) -> dict[str, Any]:
        """What is known to be in the image."""

    def name(self, index: int) -> str:
        """What messages call it."""

    def address(self, index: int) -> str | None:
        """Where its file is; None for an image that is a part of one, as in shards."""

    def fingerprint(self) -> str:
        """A hash of the contents."""


class Mixture:
    """Several sources as one: their images are numbered one source after the other."""

    def __init__(self, sources: Sequence[Source], source_weights: Sequence[float]):
        self.sources = sources
        self.offsets = np.cumsum([0, *(len(source) for source in sources)])
        self.spans = [
            Span(int(f), len(s), weight / sum(source_weights))
            for f, s, weight in zip(self.offsets, sources, source_weights)
        ]
        self.sizes = np.concatenate([source.sizes for source in sources])
        self.loss_weights = np.concatenate([source.loss_weights for source in sources])
        self.skip_counts: Mapping[str, int] = {
            kind: sum(source.skip_counts.get(kind, 0) for source in sources)
            for kind in sorted(set().union(*(s.skip_counts for s in sources)))
        }
        self.skip_examples: Mapping[str, Sequence[str]] = {
            kind: [name for source in sources for name in source.skip_examples.get(kind, ())][
                :MAX_EXAMPLES
            ]
            for kind in self.skip_counts
        }

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def _locate(self, index: int) -> tuple[Source, int]:
        source_index = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return self.sources[source_index], index - int(self.offsets[source_index])

    def load_image(self, index: int, cover_size: tuple[int, int] | None = None) -> Image.Image:
        source, index = self._locate(index)
        return source.load_image(index, cover_size)

    def captions(self, index: int) -> tuple[str, ...]:
        source, index = self._locate(index)
        return source.captions(index)

    def has_tags(self, index: int) -> bool:
        source, index = self._locate(index)
        return source.has_tags(index)

    def attributes(self, index: int) -> dict[str, Any]:
        source, index = self._locate(index)
        return source.attributes(index)

    def name(self, index: int) -> str:
        source, index = self._locate(index)
        return source.name(index)

    def address(self, index: int) -> str | None:
        source, index = self._locate(index)
        return source.address(index)

    def fingerprint(self) -> str:
        return hashlib.sha256(
            "".join(source.fingerprint() for source in self.sources).encode()
        ).hexdigest()
