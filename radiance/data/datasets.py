"""Sources: captioned images by number, with what is known of each before it is decoded."""

from pathlib import Path
from typing import Any

from radiance import config
from radiance.base.errors import DataError
from radiance.data.index import DatasetIndex
from radiance.data.indexed import IndexedSource
from radiance.data.listing import Listing
from radiance.data.source import Mixture, Source, Span

__all__ = [
    "DataError",
    "IndexedSource",
    "Mixture",
    "Source",
    "Span",
    "dataset_title",
    "describe_source",
    "open_source",
]


def open_source(data: config.Data, split: str, verbose: bool = True) -> Source:
    """The source that the config names, prepared on first use. Raises DataError when it is empty, and ConfigError when there is none.

    split: train or validation. tell: whether a line says what was left out.
    """
    sources = [
        _open_mixture_source(mixture_source, data, split, verbose)
        for mixture_source in data.sources
    ]
    return (
        sources[0]
        if len(sources) == 1
        else Mixture(sources, [mixture_source.weight for mixture_source in data.sources])
    )


def describe_source(source: Source, data: config.Data, split: str) -> dict[str, Any]:
    """What a run directory records of its data."""
    return {
        "source": data.source,
        "split": split,
        "count": len(source),
        "hash": source.fingerprint(),
        "skipped": dict(source.skip_counts),
    }


def _open_mixture_source(
    mixture_source: config.MixtureSource, data: config.Data, split: str, verbose: bool
) -> Source:
    if mixture_source.source == "shapes":
        from radiance.data.sources.shapes import ShapesSource

        return ShapesSource(mixture_source.shapes, split, max(data.resolutions))
    return IndexedSource(_open_dataset_index(mixture_source, data), data, split, verbose)


def _open_dataset_index(mixture_source: config.MixtureSource, data: config.Data) -> DatasetIndex:
    cache_dir = Path(data.cache_dir).expanduser()
    if mixture_source.source != "digits" and not mixture_source.path:
        raise config.ConfigError(
            f"data.source={mixture_source.source} needs data.path: where the images and captions are."
        )
    return DatasetIndex(
        _open_listing(mixture_source, cache_dir),
        dataset_title(mixture_source),
        cache_dir,
        data.num_threads,
    )


def dataset_title(mixture_source: config.MixtureSource) -> str:
    """What messages call a data set."""
    return " ".join(word for word in (mixture_source.source, mixture_source.path) if word)


def _open_listing(mixture_source: config.MixtureSource, cache_dir: Path) -> Listing:
    """Each kind is imported when it is asked for, for what it needs besides."""
    match mixture_source.source:
        case "folder":
            from radiance.data.sources.folder import FolderListing

            return FolderListing(mixture_source.path)
        case "jsonl":
            from radiance.data.sources.jsonl import JsonlListing

            return JsonlListing(mixture_source.path, mixture_source.root)
        case "digits":
            from radiance.data.sources.digits import Digits
            from radiance.data.sources.tfds import TfdsListing, prepare_dataset

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
            from radiance.data.sources.tfds import TfdsListing, find_or_prepare_dataset

            return TfdsListing(
                find_or_prepare_dataset(mixture_source.path, cache_dir),
                mixture_source.image_key,
                mixture_source.caption_key,
            )
    raise NotImplementedError(mixture_source.source)
