"""Sources: captioned pictures by number, with what is known of each before it is decoded."""

import hashlib
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from jaxtyping import Float32, Int64, UInt32
from PIL import Image

from radiance import config
from radiance.data import decode
from radiance.data.buckets import fits, shapes
from radiance.data.catalogue import Catalogue, DataError, Listing

__all__ = ["Catalogued", "DataError", "Mixture", "Source", "Span", "describe", "open_source", "title"]

EXAMPLES = 3  # names of a kind of pictures that are left out


class Span(NamedTuple):
    """The pictures of one part of a source, which are numbered together."""

    first: int
    count: int
    share: float  # of the pictures that are seen; all shares sum to 1


class Source(Protocol):
    """One split of captioned pictures. Can be pickled, and read from many threads."""

    sizes: UInt32[np.ndarray, "n 2"]  # width and height, upright
    weights: Float32[np.ndarray, " n"]  # of their losses
    spans: Sequence[Span]
    skipped: Mapping[str, int]  # pictures that could not be used, by kind
    examples: Mapping[str, Sequence[str]]  # names of some of them

    def __len__(self) -> int: ...

    def picture(self, index: int, cover: tuple[int, int] | None = None) -> Image.Image:
        """Mode RGB. cover: (width, height) that it will be scaled to cover: it may come smaller than it is, but no smaller than that.

        Raises Broken when it cannot be decoded."""

    def captions(self, index: int) -> tuple[str, ...]: ...

    def tags(self, index: int) -> bool:
        """Whether the captions are lists of tags with commas between."""

    def attributes(self, index: int) -> dict[str, Any]:
        """What is known to be in the picture."""

    def name(self, index: int) -> str:
        """What messages call it."""

    def address(self, index: int) -> str | None:
        """Where its file is; None for a picture that is a part of one, as in shards."""

    def fingerprint(self) -> str:
        """A hash of the contents."""


class Catalogued:
    """A split of a catalogue: the pictures that can be used as the settings say. Ordered as the catalogue is.

    tell: whether a line says what was left out.
    """

    def __init__(self, catalogue: Catalogue, data: config.Data, split: str, tell: bool = True):
        self.catalogue, self.background = catalogue, data.background
        facts = catalogue.facts
        validation = facts["lot"] < np.uint64(min(data.validation * 2.0**64, 2.0**64 - 2**12))
        ours = validation == (split == "validation")
        fit = (shapes(facts["width"], facts["height"], data).at >= 0).any(axis=0)
        self.rows: Int64[np.ndarray, " n"] = np.flatnonzero(ours & fit)

        left_out = defaultdict(list)
        for unfit, lot in catalogue.unfit():
            if (lot < data.validation * 2**64) == (split == "validation"):
                left_out[unfit.kind].append(unfit.name)
        counts = {kind: len(names) for kind, names in left_out.items()}
        long = ~fits(facts["width"], facts["height"], data.bucket_ratio) & (data.bucket_step > 0)
        for kind, those in (("too long for its width", ours & long), ("too small", ours & ~fit & ~long)):
            if those.any():
                counts[kind] = int(those.sum())
                left_out[kind] = [catalogue.row(row).name for row in np.flatnonzero(those)[:EXAMPLES]]
        self.skipped: Mapping[str, int] = dict(sorted(counts.items()))
        self.examples: Mapping[str, Sequence[str]] = {kind: left_out[kind][:EXAMPLES] for kind in self.skipped}
        told = ", ".join(f"{count} × {kind} ({', '.join(map(repr, self.examples[kind]))})" for kind, count in self.skipped.items())
        if len(self.rows) == 0:
            cures = {
                "too small": f"lower data.side={data.side} or raise data.enlarge={data.enlarge}",
                "too long for its width": f"raise data.bucket_ratio={data.bucket_ratio}",
            }
            cure = cures.get(max(counts, key=counts.get, default=""), "put pictures with captions there")
            others = int((~ours & fit).sum())
            raise DataError(
                f"The {split} split of {catalogue.title} is empty (left out: {told or 'none'}; in the other split: {others}): {cure}"
                + (f", or change data.validation={data.validation}." if others else ".")
            )
        if told and tell:
            print(f"{catalogue.title}, {split}: {len(self)} pictures; left out: {told}.", file=sys.stderr, flush=True)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def spans(self) -> Sequence[Span]:
        return [Span(0, len(self), 1.0)]

    @cached_property
    def sizes(self) -> UInt32[np.ndarray, "n 2"]:
        facts = self.catalogue.facts
        return np.stack([facts["width"][self.rows], facts["height"][self.rows]], axis=-1)

    @cached_property
    def weights(self) -> Float32[np.ndarray, " n"]:
        return self.catalogue.facts["weight"][self.rows]

    def picture(self, index: int, cover: tuple[int, int] | None = None) -> Image.Image:
        return decode.picture(self.catalogue.read(self.rows[index]), cover, self.background)

    def captions(self, index: int) -> tuple[str, ...]:
        return self.catalogue.row(self.rows[index]).captions

    def tags(self, index: int) -> bool:
        return bool(self.catalogue.facts["tags"][self.rows[index]])

    def attributes(self, index: int) -> dict[str, Any]:
        return self.catalogue.row(self.rows[index]).attributes

    def name(self, index: int) -> str:
        return self.catalogue.row(self.rows[index]).name

    def address(self, index: int) -> str | None:
        return self.catalogue.address(self.rows[index])

    def fingerprint(self) -> str:
        """Of names, captions, sizes and of as much of each file as was looked at. Where the data set lies does not matter."""
        return hashlib.sha256(self.catalogue.facts["digest"][self.rows].tobytes()).hexdigest()


class Mixture:
    """Several sources as one: their pictures are numbered one source after the other."""

    def __init__(self, sources: Sequence[Source], shares: Sequence[float]):
        self.sources = sources
        self.firsts = np.cumsum([0, *(len(source) for source in sources)])
        self.spans = [Span(int(f), len(s), share / sum(shares)) for f, s, share in zip(self.firsts, sources, shares)]
        self.sizes = np.concatenate([source.sizes for source in sources])
        self.weights = np.concatenate([source.weights for source in sources])
        self.skipped: Mapping[str, int] = {
            kind: sum(source.skipped.get(kind, 0) for source in sources) for kind in sorted(set().union(*(s.skipped for s in sources)))
        }
        self.examples: Mapping[str, Sequence[str]] = {
            kind: [name for source in sources for name in source.examples.get(kind, ())][:EXAMPLES] for kind in self.skipped
        }

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def _at(self, index: int) -> tuple[Source, int]:
        part = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return self.sources[part], index - int(self.firsts[part])

    def picture(self, index: int, cover: tuple[int, int] | None = None) -> Image.Image:
        source, index = self._at(index)
        return source.picture(index, cover)

    def captions(self, index: int) -> tuple[str, ...]:
        source, index = self._at(index)
        return source.captions(index)

    def tags(self, index: int) -> bool:
        source, index = self._at(index)
        return source.tags(index)

    def attributes(self, index: int) -> dict[str, Any]:
        source, index = self._at(index)
        return source.attributes(index)

    def name(self, index: int) -> str:
        source, index = self._at(index)
        return source.name(index)

    def address(self, index: int) -> str | None:
        source, index = self._at(index)
        return source.address(index)

    def fingerprint(self) -> str:
        return hashlib.sha256("".join(source.fingerprint() for source in self.sources).encode()).hexdigest()


def open_source(data: config.Data, split: str, tell: bool = True) -> Source:
    """The source that the config names, prepared on first use. Raises DataError when it is empty, and ConfigError when there is none.

    split: train or validation. tell: whether a line says what was left out.
    """
    sources = [_opened(part, data, split, tell) for part in data.parts]
    return sources[0] if len(sources) == 1 else Mixture(sources, [part.share for part in data.parts])


def describe(source: Source, data: config.Data, split: str) -> dict[str, Any]:
    """What a run directory records of its data."""
    return {"source": data.source, "split": split, "count": len(source), "hash": source.fingerprint(), "skipped": dict(source.skipped)}


def _opened(part: config.Part, data: config.Data, split: str, tell: bool) -> Source:
    if part.source == "shapes":
        from radiance.data.shapes_source import Shapes

        return Shapes(part.shapes, split, max(data.sides))
    return Catalogued(_catalogue(part, data), data, split, tell)


def _catalogue(part: config.Part, data: config.Data) -> Catalogue:
    directory = Path(data.directory).expanduser()
    if part.source != "digits" and not part.path:
        raise config.ConfigError(f"data.source={part.source} needs data.path: where the pictures and captions are.")
    return Catalogue(_listing(part, directory), title(part), directory, data.threads)


def title(part: config.Part) -> str:
    """What messages call a data set."""
    return " ".join(word for word in (part.source, part.path) if word)


def _listing(part: config.Part, directory: Path) -> Listing:
    """Each kind is imported when it is asked for, for what it needs besides."""
    match part.source:
        case "folder":
            from radiance.data.folder import Folder

            return Folder(part.path)
        case "jsonl":
            from radiance.data.jsonl import Jsonl

            return Jsonl(part.path, part.root)
        case "digits":
            from radiance.data.digits import Digits
            from radiance.data.tfds import Tfds, prepared

            return Tfds(prepared(Digits, directory), "image", "captions")
        case "tar":
            from radiance.data.tar import Tar

            return Tar(part.path)
        case "parquet":
            from radiance.data.parquet import Parquet

            return Parquet(part.path, part.picture, part.caption, directory)
        case "tfds":
            from radiance.data.tfds import Tfds, named

            return Tfds(named(part.path, directory), part.picture, part.caption)
    raise NotImplementedError(part.source)
