"""The interface of data sources, and mixtures of several."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, UInt32
from PIL import Image

MAX_EXAMPLES = 3  # names that are reported for each kind of unusable images


class Span(NamedTuple):
    """A range of consecutive image indices, which belong to one part of a mixture."""

    start: int
    num_images: int
    fraction: float  # of all samples that come from this span; the fractions sum to 1


class Source(Protocol):
    """One split of captioned images.

    A source can be pickled, and read by many threads at once.
    """

    @property
    def sizes(self) -> UInt32[np.ndarray, "n 2"]:
        """Width and height of each upright image in pixels."""
        ...

    @property
    def loss_weights(self) -> Float32[np.ndarray, " n"]:
        """Weight of each image's loss."""
        ...

    @property
    def spans(self) -> Sequence[Span]:
        """The parts of a mixture; a single span for any other source."""
        ...

    @property
    def skip_counts(self) -> Mapping[str, int]:
        """Number of images that cannot be used, by kind."""
        ...

    @property
    def skip_examples(self) -> Mapping[str, Sequence[str]]:
        """Up to MAX_EXAMPLES names of images that cannot be used, by kind."""
        ...

    def __len__(self) -> int: ...

    def load_image(self, index: int, cover_size: tuple[int, int] | None = None) -> Image.Image:
        """Decode an image.

        Args:
            index: Index of the image.
            cover_size: Width and height that the image will be scaled to cover. The result may be
                smaller than the stored image, but never smaller than this size.

        Returns:
            The upright image in mode RGB.

        Raises:
            UnusableError: The image cannot be decoded.
        """
        ...

    def captions(self, index: int) -> tuple[str, ...]:
        """Return all captions of an image."""
        ...

    def has_tags(self, index: int) -> bool:
        """Return True if the captions of an image are comma-separated lists of tags."""
        ...

    def attributes(self, index: int) -> dict[str, Any]:
        """Return the known contents of an image."""
        ...

    def name(self, index: int) -> str:
        """Return the name of an image in messages."""
        ...

    def address(self, index: int) -> str | None:
        """Return the path or URL of an image's file, or None if it is a part of a larger file."""
        ...

    def fingerprint(self) -> str:
        """Return a hash of the contents."""
        ...


class Mixture:
    """Several sources as one; the images of a source follow those of the previous one.

    Args:
        sources: Sources to mix.
        source_weights: Relative sampling weight of each source; they are normalized to sum to 1.
    """

    def __init__(self, sources: Sequence[Source], source_weights: Sequence[float]):
        self.sources = sources
        self.offsets = np.cumsum([0, *(len(source) for source in sources)])
        self.spans = [
            Span(int(offset), len(source), weight / sum(source_weights))
            for offset, source, weight in zip(self.offsets, sources, source_weights)
        ]
        self.sizes = np.concatenate([source.sizes for source in sources])
        self.loss_weights = np.concatenate([source.loss_weights for source in sources])
        kinds = sorted(set().union(*(source.skip_counts for source in sources)))
        self.skip_counts: Mapping[str, int] = {
            kind: sum(source.skip_counts.get(kind, 0) for source in sources) for kind in kinds
        }
        self.skip_examples: Mapping[str, Sequence[str]] = {
            kind: [name for source in sources for name in source.skip_examples.get(kind, ())][
                :MAX_EXAMPLES
            ]
            for kind in kinds
        }

    def __len__(self) -> int:
        return int(self.offsets[-1])

    def _locate(self, index: int) -> tuple[Source, int]:
        """Return the source of an image, and the image's index within that source."""
        source_index = int(np.searchsorted(self.offsets, index, side="right")) - 1
        return self.sources[source_index], index - int(self.offsets[source_index])

    # Each of these methods asks the source of the image; see `Source`.

    def load_image(self, index: int, cover_size: tuple[int, int] | None = None) -> Image.Image:
        """Decode an image."""
        source, local_index = self._locate(index)
        return source.load_image(local_index, cover_size)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return all captions of an image."""
        source, local_index = self._locate(index)
        return source.captions(local_index)

    def has_tags(self, index: int) -> bool:
        """Return True if the captions of an image are comma-separated lists of tags."""
        source, local_index = self._locate(index)
        return source.has_tags(local_index)

    def attributes(self, index: int) -> dict[str, Any]:
        """Return the known contents of an image."""
        source, local_index = self._locate(index)
        return source.attributes(local_index)

    def name(self, index: int) -> str:
        """Return the name of an image in messages."""
        source, local_index = self._locate(index)
        return source.name(local_index)

    def address(self, index: int) -> str | None:
        """Return the path or URL of an image's file, or None if it is a part of a larger file."""
        source, local_index = self._locate(index)
        return source.address(local_index)

    def fingerprint(self) -> str:
        """Return a hash of the contents of all sources, in their order."""
        fingerprints = "".join(source.fingerprint() for source in self.sources)
        return hashlib.sha256(fingerprints.encode()).hexdigest()
