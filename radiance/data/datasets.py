"""Data sources of the settings, opened by the name of their format."""

from pathlib import Path
from typing import Any

from radiance import config
from radiance.data.index import DatasetIndex
from radiance.data.indexed import EmptySplitError, IndexedSource
from radiance.data.listing import Listing
from radiance.data.source import Mixture, Source


def open_source(data: config.Data, split: str, verbose: bool = True) -> Source:
    """Open one split of the data that the settings name; its index is built on first use.

    Args:
        data: Settings of the data.
        split: "train" or "validation".
        verbose: True to print how many images were left out.

    Returns:
        The source, which has at least one image.

    Raises:
        EmptySplitError: The split is empty.
        DataError: A dataset cannot be read.
        ConfigError: There is no such dataset.
    """
    if len(data.sources) == 1:
        return _open_mixture_source(data.sources[0], data, split, verbose)
    sources, weights = [], []
    for mixture_source in data.sources:
        try:
            sources.append(_open_mixture_source(mixture_source, data, split, verbose))
            weights.append(mixture_source.weight)
        except EmptySplitError:
            if _must_have_images(data, split):
                raise
    if not sources:
        raise EmptySplitError(
            "The validation split of the mixture is empty: set data.validation_fraction=0.05."
        )
    return Mixture(sources, weights)


def open_splits(data: config.Data, verbose: bool = True) -> dict[str, Source]:
    """Open the splits of the data by name, with their indexes built on first use.

    Args:
        data: Settings of the data.
        verbose: True to print how many images were left out.

    Returns:
        "train" and "validation". The second is absent if data.validation_fraction=0 holds out no
        image and no dataset has a validation split of its own.

    Raises:
        EmptySplitError: A split is empty that has to have images.
        DataError: A dataset cannot be read.
        ConfigError: There is no such dataset.
    """
    splits = {"train": open_source(data, "train", verbose)}
    try:
        splits["validation"] = open_source(data, "validation", verbose)
    except EmptySplitError:
        if _must_have_images(data, "validation"):
            raise
    return splits


def _must_have_images(data: config.Data, split: str) -> bool:
    """Return whether an empty split is an error."""
    return split == "train" or data.validation_fraction > 0


def describe_source(source: Source, data: config.Data, split: str) -> dict[str, Any]:
    """Return what a run directory records of its data, as a JSON object."""
    return {
        "source": data.source,
        "split": split,
        "count": len(source),
        "hash": source.fingerprint(),
        "skipped": dict(source.skip_counts),
    }


def dataset_title(mixture_source: config.MixtureSource) -> str:
    """Return the name of a dataset in messages."""
    return " ".join(word for word in (mixture_source.source, mixture_source.path) if word)


def _open_mixture_source(
    mixture_source: config.MixtureSource, data: config.Data, split: str, verbose: bool
) -> Source:
    """Open one part of a mixture, or the only source."""
    if mixture_source.source == "shapes":
        from radiance.data.sources.shapes import ShapesSource

        return ShapesSource(mixture_source.shapes, split, max(data.resolutions))
    return IndexedSource(_open_dataset_index(mixture_source, data), data, split, verbose)


def _open_dataset_index(mixture_source: config.MixtureSource, data: config.Data) -> DatasetIndex:
    """Open the index of a dataset, or build it."""
    cache_dir = Path(data.cache_dir).expanduser()
    if mixture_source.source != "digits" and not mixture_source.path:
        raise config.ConfigError(
            f"data.source={mixture_source.source} needs data.path: "
            "give the location of the images and captions."
        )
    listing = _open_listing(mixture_source, data)
    return DatasetIndex(listing, dataset_title(mixture_source), cache_dir, data.num_threads)


def _open_listing(mixture_source: config.MixtureSource, data: config.Data) -> Listing:
    """Open the listing of a dataset; formats are imported on demand, since some need packages."""
    cache_dir = Path(data.cache_dir).expanduser()
    match mixture_source.source:
        case "folder":
            from radiance.data.sources.folder import FolderListing

            return FolderListing(mixture_source.path)
        case "jsonl":
            from radiance.data.sources.jsonl import JsonlListing

            return JsonlListing(mixture_source.path, mixture_source.root, data.protocols)
        case "digits":
            from radiance.data.sources.digits import Digits
            from radiance.data.sources.tfds import TfdsListing
            from radiance.data.sources.tfds_preparation import prepare_dataset

            return TfdsListing(prepare_dataset(Digits, cache_dir), "image", "captions")
        case "tar":
            from radiance.data.sources.tar import TarListing

            return TarListing(mixture_source.path)
        case "parquet":
            from radiance.data.sources.parquet import ParquetListing

            return ParquetListing(
                mixture_source.path, mixture_source.image_key, mixture_source.caption_key, cache_dir
            )
        case "tfds":
            from radiance.data.sources.tfds import TfdsListing
            from radiance.data.sources.tfds_preparation import find_or_prepare_dataset

            return TfdsListing(
                find_or_prepare_dataset(mixture_source.path, cache_dir),
                mixture_source.image_key,
                mixture_source.caption_key,
            )
    raise NotImplementedError(mixture_source.source)
