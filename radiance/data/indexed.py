"""A data source backed by a dataset index."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt32, UInt64
from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.data import decode
from radiance.data.buckets import assign_buckets, is_within_aspect_ratio
from radiance.data.index import DatasetIndex
from radiance.data.source import MAX_EXAMPLES, Span

DEFAULT_FRACTION = config.Data().validation_fraction
MAX_BOUND = 2.0**64 - 2**12  # of split hashes: uint64 cannot hold 2⁶⁴
TOO_LONG, TOO_SMALL = "aspect ratio too large", "too small"


class EmptySplitError(DataError):
    """A split of a data set without an image that can be used."""


class IndexedSource:
    """One split of a dataset index: the images that the settings can use, in the index's order.

    Args:
        dataset_index: Index of the dataset.
        data: Settings that decide the split and the buckets.
        split: "train" or "validation".
        verbose: True to print how many images were left out.

    Raises:
        EmptySplitError: No image of the split can be used.
    """

    def __init__(
        self, dataset_index: DatasetIndex, data: config.Data, split: str, verbose: bool = True
    ):
        self.dataset_index, self.background = dataset_index, data.background
        metadata = dataset_index.metadata
        has_bucket = _has_bucket(metadata, data)
        bound = _find_validation_bound(metadata["split_hash"][has_bucket], data)
        in_split = (metadata["split_hash"] < bound) == (split == "validation")
        self.record_indices: Int64[np.ndarray, " n"] = np.flatnonzero(in_split & has_bucket)

        skipped_names = _find_unusable(dataset_index, bound, split)
        skip_counts = {kind: len(names) for kind, names in skipped_names.items()}
        for kind, skipped in _find_without_bucket(metadata, data, has_bucket).items():
            skipped_indices = np.flatnonzero(in_split & skipped)
            if len(skipped_indices):
                skip_counts[kind] = len(skipped_indices)
                skipped_names[kind] = [
                    dataset_index.read_record(record_index).name
                    for record_index in skipped_indices[:MAX_EXAMPLES]
                ]
        self.skip_counts: Mapping[str, int] = dict(sorted(skip_counts.items()))
        self.skip_examples: Mapping[str, Sequence[str]] = {
            kind: skipped_names[kind][:MAX_EXAMPLES] for kind in self.skip_counts
        }

        if len(self) == 0:
            num_in_other_split = int((~in_split & has_bucket).sum())
            raise EmptySplitError(self._format_empty_error(data, split, num_in_other_split))
        if self.skip_counts and verbose:
            print(
                f"{dataset_index.title}, {split}: {len(self)} images; "
                f"left out: {self._format_skipped()}.",
                file=sys.stderr,
                flush=True,
            )

    def _format_skipped(self) -> str:
        """List kinds, counts and example names of the images that were left out."""
        return ", ".join(
            f"{count} × {kind} ({', '.join(map(repr, self.skip_examples[kind]))})"
            for kind, count in self.skip_counts.items()
        )

    def _format_empty_error(self, data: config.Data, split: str, num_in_other_split: int) -> str:
        """Return the message for an empty split, with a remedy for the most frequent reason."""
        remedies = {
            TOO_SMALL: f"lower data.resolution={data.resolution} or raise "
            f"data.max_upscale={data.max_upscale}",
            TOO_LONG: f"raise data.max_aspect_ratio={data.max_aspect_ratio}",
        }
        main_kind = max(self.skip_counts, key=self.skip_counts.__getitem__, default="")
        remedy = remedies.get(main_kind, "put more images with captions there")
        if num_in_other_split and split == "validation" and data.validation_fraction:
            remedy += ", or train without validation (data.validation_fraction=0)"
        elif num_in_other_split:
            remedy += f", or set data.validation_fraction={DEFAULT_FRACTION}"
        return (
            f"The {split} split of {self.dataset_index.title} is empty "
            f"(left out: {self._format_skipped() or 'none'}; "
            f"in the other split: {num_in_other_split}): {remedy}."
        )

    def __len__(self) -> int:
        return len(self.record_indices)

    @property
    def spans(self) -> Sequence[Span]:
        """A single span with all images."""
        return [Span(0, len(self), 1.0)]

    @cached_property
    def sizes(self) -> UInt32[np.ndarray, "n 2"]:
        """Width and height of each upright image in pixels."""
        metadata = self.dataset_index.metadata
        return np.stack(
            [metadata["width"][self.record_indices], metadata["height"][self.record_indices]],
            axis=-1,
        )

    @cached_property
    def loss_weights(self) -> Float32[np.ndarray, " n"]:
        """Weight of each image's loss."""
        return self.dataset_index.metadata["loss_weight"][self.record_indices]

    def load_image(self, index: int, cover_size: tuple[int, int] | None = None) -> Image.Image:
        """Decode an image; see `Source.load_image`."""
        content = self.dataset_index.read_file(self.record_indices[index])
        return decode.decode_image(content, cover_size, self.background)

    def captions(self, index: int) -> tuple[str, ...]:
        """Return all captions of an image."""
        return self.dataset_index.read_record(self.record_indices[index]).captions

    def has_tags(self, index: int) -> bool:
        """Return True if the captions of an image are comma-separated lists of tags."""
        return bool(self.dataset_index.metadata["has_tags"][self.record_indices[index]])

    def attributes(self, index: int) -> dict[str, Any]:
        """Return the known contents of an image."""
        return self.dataset_index.read_record(self.record_indices[index]).attributes

    def name(self, index: int) -> str:
        """Return the name of an image in messages."""
        return self.dataset_index.read_record(self.record_indices[index]).name

    def address(self, index: int) -> str | None:
        """Return the path or URL of an image's file, or None if it is a part of a larger file."""
        return self.dataset_index.address(self.record_indices[index])

    def fingerprint(self) -> str:
        """Return a hash of names, captions, sizes and file contents, but not of their location."""
        record_hashes = self.dataset_index.metadata["record_hash"][self.record_indices]
        return hashlib.sha256(record_hashes.tobytes()).hexdigest()


def _find_validation_bound(
    split_hashes: UInt64[np.ndarray, " usable"], data: config.Data
) -> np.uint64:
    """Return the bound that the split hashes of validation images stay below.

    It is at least 1, because 0 marks the validation split that a dataset has of its own, and below
    TRAIN_HASH. If the fraction holds out no image, the one with the smallest hash is held out.
    """
    bound = min(max(data.validation_fraction * 2.0**64, 1.0), MAX_BOUND)
    if data.validation_fraction and len(split_hashes):
        smallest, largest = split_hashes.min(), split_hashes.max()
        if bound <= smallest < min(largest, MAX_BOUND):
            return smallest + np.uint64(1)
    return np.uint64(bound)


def _has_bucket(metadata: np.ndarray, data: config.Data) -> Bool[np.ndarray, " records"]:
    """Return which images have a bucket at one of the resolutions."""
    assignment = assign_buckets(metadata["width"], metadata["height"], data)
    return np.any(assignment.bucket_indices >= 0, axis=0)


def _find_without_bucket(
    metadata: np.ndarray, data: config.Data, has_bucket: Bool[np.ndarray, " records"]
) -> dict[str, Bool[np.ndarray, " records"]]:
    """Return which images have no bucket, by reason."""
    is_too_long = ~is_within_aspect_ratio(
        metadata["width"], metadata["height"], data.max_aspect_ratio
    ) & (data.bucket_step > 0)
    return {TOO_LONG: is_too_long, TOO_SMALL: ~has_bucket & ~is_too_long}


def _find_unusable(
    dataset_index: DatasetIndex, bound: np.uint64, split: str
) -> dict[str, list[str]]:
    """Return the names of a split's images that cannot be used, by kind."""
    names = defaultdict(list)
    for unusable, split_hash in dataset_index.iter_unusable():
        if (split_hash < bound) == (split == "validation"):
            names[unusable.kind].append(unusable.name)
    return names
