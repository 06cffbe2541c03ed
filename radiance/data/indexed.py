"""A data source backed by a dataset index."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float32, Int64, UInt32
from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.data import decode
from radiance.data.buckets import assign_buckets, is_within_aspect_ratio
from radiance.data.index import DatasetIndex
from radiance.data.source import MAX_EXAMPLES, Span


class IndexedSource:
    """A split of a dataset index: the images that can be used as the settings say. Ordered as the dataset index is.

    tell: whether a line says what was left out.
    """

    def __init__(
        self, dataset_index: DatasetIndex, data: config.Data, split: str, verbose: bool = True
    ):
        self.dataset_index, self.background = dataset_index, data.background
        metadata = dataset_index.metadata
        is_validation = metadata["lot"] < np.uint64(
            min(data.validation_fraction * 2.0**64, 2.0**64 - 2**12)
        )
        in_split = is_validation == (split == "validation")
        has_bucket = (
            assign_buckets(metadata["width"], metadata["height"], data).bucket_indices >= 0
        ).any(axis=0)
        self.record_indices: Int64[np.ndarray, " n"] = np.flatnonzero(in_split & has_bucket)

        skipped_names = defaultdict(list)
        for unusable, split_hash in dataset_index.iter_unusable():
            if (split_hash < data.validation_fraction * 2**64) == (split == "validation"):
                skipped_names[unusable.kind].append(unusable.name)
        skip_counts = {kind: len(names) for kind, names in skipped_names.items()}
        is_too_long = ~is_within_aspect_ratio(
            metadata["width"], metadata["height"], data.max_aspect_ratio
        ) & (data.bucket_step > 0)
        for kind, mask in (
            ("too long for its width", in_split & is_too_long),
            ("too small", in_split & ~has_bucket & ~is_too_long),
        ):
            if mask.any():
                skip_counts[kind] = int(mask.sum())
                skipped_names[kind] = [
                    dataset_index.read_record(record_index).name
                    for record_index in np.flatnonzero(mask)[:MAX_EXAMPLES]
                ]
        self.skip_counts: Mapping[str, int] = dict(sorted(skip_counts.items()))
        self.skip_examples: Mapping[str, Sequence[str]] = {
            kind: skipped_names[kind][:MAX_EXAMPLES] for kind in self.skip_counts
        }
        skip_summary = ", ".join(
            f"{count} × {kind} ({', '.join(map(repr, self.skip_examples[kind]))})"
            for kind, count in self.skip_counts.items()
        )
        if len(self.record_indices) == 0:
            remedies = {
                "too small": f"lower data.resolution={data.resolution} or raise data.max_upscale={data.max_upscale}",
                "too long for its width": f"raise data.max_aspect_ratio={data.max_aspect_ratio}",
            }
            remedy = remedies.get(
                max(skip_counts, key=skip_counts.get, default=""), "put images with captions there"
            )
            num_in_other_split = int((~in_split & has_bucket).sum())
            raise DataError(
                f"The {split} split of {dataset_index.title} is empty (left out: {skip_summary or 'none'}; in the other split: {num_in_other_split}): {remedy}"
                + (
                    f", or change data.validation_fraction={data.validation_fraction}."
                    if num_in_other_split
                    else "."
                )
            )
        if skip_summary and verbose:
            print(
                f"{dataset_index.title}, {split}: {len(self)} images; left out: {skip_summary}.",
                file=sys.stderr,
                flush=True,
            )

    def __len__(self) -> int:
        return len(self.record_indices)

    @property
    def spans(self) -> Sequence[Span]:
        return [Span(0, len(self), 1.0)]

    @cached_property
    def sizes(self) -> UInt32[np.ndarray, "n 2"]:
        metadata = self.dataset_index.metadata
        return np.stack(
            [metadata["width"][self.record_indices], metadata["height"][self.record_indices]],
            axis=-1,
        )

    @cached_property
    def loss_weights(self) -> Float32[np.ndarray, " n"]:
        return self.dataset_index.metadata["weight"][self.record_indices]

    def load_image(self, index: int, cover_size: tuple[int, int] | None = None) -> Image.Image:
        return decode.decode_image(
            self.dataset_index.read_file(self.record_indices[index]), cover_size, self.background
        )

    def captions(self, index: int) -> tuple[str, ...]:
        return self.dataset_index.read_record(self.record_indices[index]).captions

    def has_tags(self, index: int) -> bool:
        return bool(self.dataset_index.metadata["tags"][self.record_indices[index]])

    def attributes(self, index: int) -> dict[str, Any]:
        return self.dataset_index.read_record(self.record_indices[index]).attributes

    def name(self, index: int) -> str:
        return self.dataset_index.read_record(self.record_indices[index]).name

    def address(self, index: int) -> str | None:
        return self.dataset_index.address(self.record_indices[index])

    def fingerprint(self) -> str:
        """Of names, captions, sizes and of as much of each file as was looked at. Where the data set lies does not matter."""
        return hashlib.sha256(
            self.dataset_index.metadata["digest"][self.record_indices].tobytes()
        ).hexdigest()
