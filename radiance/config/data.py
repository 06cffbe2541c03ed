"""Settings of images and captions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from radiance.base.settings import (
    Section,
    require,
    require_at_least,
    require_fraction,
    resumable,
)
from radiance.shapes.attributes import MAX_OBJECTS, Background, CaptionLengths

CACHE_DIR = "~/.cache/radiance"
PROTOCOLS = ("file", "http", "https", "s3", "gs", "az", "hf")
# Protocols of fsspec that interpret files, or open further files that these name.
COMPOUND_PROTOCOLS = (
    *("reference", "zip", "tar", "libarchive", "dir", "generic", "git", "dask"),
    *("cached", "filecache", "simplecache", "blockcache", "asyncwrapper"),
)


@dataclass(frozen=True)
class Shapes(Section):
    """The procedural data set `shapes`, whose captions describe the images exactly."""

    caption_lengths: CaptionLengths = "mixed"
    """Lengths of captions in tokens. short: up to 20; mixed: up to max_tokens, mostly short; full:
    as many as max_tokens allows."""
    max_tokens: int = 64
    """Longest caption in tokens, including the end of the sequence."""
    max_objects: int = MAX_OBJECTS
    """Maximum number of objects in an image, from 1 to 5. From images of one object, a small model
    learns in minutes what captions mean."""
    backgrounds: tuple[Background, ...] = get_args(Background)
    """Background colors. With black alone, a small model soon learns where objects are
    (experiments/one_shape.py)."""
    named_backgrounds: float = 0.5
    """Fraction of the captions that name the background."""
    num_images: int = 2**20
    """Images in an epoch, and in the validation split."""
    seed: int = 0
    """Seed of scenes and captions, from 0 to 2³² − 1."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require(
            1 <= self.max_objects <= MAX_OBJECTS,
            f"data.shapes.max_objects={self.max_objects} must be a whole number from 1 to "
            f"{MAX_OBJECTS}.",
        )
        require(
            0 < len(self.backgrounds) == len(set(self.backgrounds)),
            f"data.shapes.backgrounds={self.backgrounds}: name at least one of "
            f"{', '.join(get_args(Background))}, each once.",
        )
        require(
            self.num_images >= 1, f"data.shapes.num_images={self.num_images} must be at least 1."
        )
        require_fraction(self, "named_backgrounds")
        require(
            0 <= self.seed < 2**32,
            f"data.shapes.seed={self.seed} must be a whole number from 0 to 2**32 - 1.",
        )


@dataclass(frozen=True)
class MixtureSource(Section):
    """One data set of a mixture; its settings have the same meaning as in `data`."""

    source: Literal["digits", "shapes", "folder", "jsonl", "tfds", "tar", "parquet"] = "folder"
    """Format of the data set."""
    path: str = ""
    """Location of the data set."""
    root: str = ""
    """Folder of the images of a JSONL file."""
    image_key: str = "image"
    """Feature or column of the image."""
    caption_key: str = "text"
    """Feature or column of the caption."""
    shapes: Shapes = field(default_factory=Shapes)
    """Settings of source=shapes."""
    weight: float = 1.0
    """Fraction of the images that are seen, relative to the weights of the other sources."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require(
            self.source not in ("digits", "shapes") or not self.path,
            f"data.path={self.path} is not used by data.source={self.source}: choose another "
            "source.",
        )
        require(
            self.source == "jsonl" or not self.root,
            f"data.root={self.root} is only for data.source=jsonl: set that too.",
        )
        require(
            self.weight > 0,
            f"weight={self.weight} of {self.path or self.source} in data.mixture must be more "
            "than 0.",
        )


@dataclass(frozen=True)
class Data(Section):
    """Images and captions, and how batches are formed from them."""

    source: Literal["digits", "shapes", "folder", "jsonl", "tfds", "tar", "parquet", "mixture"] = (
        "digits"
    )
    """Format of the data set."""
    path: str = resumable("")
    """folder: the folder; jsonl: the file; tar and parquet: a shard, a folder of shards or a
    pattern; tfds: the name."""
    root: str = resumable("")
    """Folder of the images of a JSONL file; empty: the folder of the file."""
    protocols: tuple[str, ...] = resumable(PROTOCOLS)
    """Protocols of the URLs that a JSONL file may contain; "file" allows absolute paths too. []
    allows only paths below the root."""
    image_key: str = "image"
    """Feature (tfds) or column (parquet) of the image."""
    caption_key: str = "text"
    """Feature (tfds) or column (parquet) of the caption, a list of captions or a label; nested
    features are written as "captions/text"."""
    shapes: Shapes = field(default_factory=Shapes)
    """Settings of source=shapes."""
    mixture: tuple[MixtureSource, ...] = ()
    """Data sets of source=mixture."""
    validation_fraction: float = 0.05
    """Fraction of the images in the validation split, chosen by hashes of their names, and at least
    one image. 0: all images are for training, and there is no validation loss. digits, shapes and
    most of tfds have their own split."""
    cache_dir: str = resumable(CACHE_DIR)
    """Folder of prepared data sets and dataset indexes."""
    resolution: int = 512
    """Pixels: images have the area of a square with this side."""
    extra_resolutions: tuple[int, ...] = ()
    """Further resolutions in pixels. In every epoch, each image is assigned one at random among
    those that it is large enough for."""
    bucket_step: int = 0
    """Pixels: widths and heights are multiples of it, and images approximately keep their
    proportions. 0: all images are squares."""
    max_aspect_ratio: float = 2.0
    """Images whose aspect ratio is at least this are skipped, unless all images are squares."""
    max_upscale: float = 1.0
    """Largest factor that an image is upscaled by. Images that are too small for every resolution
    are skipped."""
    incomplete_batches: Literal["carry", "pad", "drop"] = "carry"
    """What happens to images of an epoch that do not fill a batch of their size: they wait for
    the next epoch, the batch is padded with empty rows, or they are dropped in this epoch."""
    batch_size: int = 256
    """Images in a training step, over all devices and hosts."""
    crop: Literal["center", "random"] = "center"
    """Position of the crop in images of another aspect ratio."""
    flip_probability: float = 0.0
    """Probability of a horizontal flip. Images whose caption contains "left" or "right" are never
    flipped."""
    background: tuple[int, int, int] = (255, 255, 255)
    """8-bit sRGB color behind transparent pixels."""
    max_broken_fraction: float = resumable(0.1)
    """Training stops when a larger fraction of the images cannot be decoded."""
    caption_dropout: float = 0.1
    """Fraction of captions that are dropped, for classifier-free guidance."""
    dropped_caption: Literal["empty", "masked"] = "empty"
    """Replacement of a dropped caption: the empty prompt, or no text token at all."""
    mask_group_size: int = 1
    """Number of consecutive captions in a batch that share the mask of the longest one, as in
    trainers that pad a batch to its longest caption. 1: each has its own mask."""
    shuffle_tags: bool = False
    """Shuffle captions that are lists of tags, each time anew."""
    tag_dropout: float = 0.0
    """Largest fraction of a caption's tags that is dropped."""
    lowercase_probability: float = 0.0
    """Fraction of captions that are converted to lower case."""
    caption_prefix: str = ""
    """Text before every caption that is not dropped, in training and validation, such as
    "a painting of "."""
    caption_suffix: str = ""
    """Text after every caption that is not dropped."""
    num_workers: int = resumable(0)
    """Processes on each host that decode images; 0: threads of the trainer decode them."""
    num_threads: int = resumable(4)
    """Threads that decode images in each process."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require_at_least(self, 1, "resolution", "batch_size", "num_threads")
        require_at_least(self, 0, "num_workers")
        require_fraction(
            self,
            "flip_probability",
            "max_broken_fraction",
            "caption_dropout",
            "tag_dropout",
            "lowercase_probability",
        )
        require(
            self.mask_group_size >= 1 and self.batch_size % self.mask_group_size == 0,
            f"data.mask_group_size={self.mask_group_size} must divide "
            f"data.batch_size={self.batch_size}.",
        )
        require(
            self.mask_group_size == 1 or self.dropped_caption == "empty",
            f"data.mask_group_size={self.mask_group_size} would show padding in place of dropped "
            "captions: leave data.dropped_caption=empty.",
        )
        require(
            all(0 <= c <= 255 for c in self.background),
            f"data.background={self.background}: three numbers from 0 to 255 are needed.",
        )
        require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction={self.validation_fraction} must be at least 0 and less than "
            "1.",
        )
        for protocol in self.protocols:
            require(
                protocol.isalnum() and protocol not in COMPOUND_PROTOCOLS,
                f"data.protocols={self.protocols}: {protocol!r} is not a protocol of plain files, "
                f"such as {', '.join(PROTOCOLS)}.",
            )
        self._check_sizes()
        self._check_sources()

    def _check_sizes(self):
        require(
            self.max_upscale > 0,
            f"data.max_upscale={self.max_upscale} must be more than 0; 1 never upscales an image.",
        )
        require(
            self.max_aspect_ratio > 1,
            f"data.max_aspect_ratio={self.max_aspect_ratio} would skip every image: it must be "
            "more than 1.",
        )
        require(
            self.bucket_step >= 0,
            f"data.bucket_step={self.bucket_step} must be at least 0 (squares only).",
        )
        for resolution in self.resolutions:
            require(
                resolution >= 1,
                f"data.extra_resolutions={self.extra_resolutions}: resolutions must be at least 1.",
            )
            require(
                not self.bucket_step or resolution % self.bucket_step == 0,
                f"Resolution {resolution} is not a multiple of data.bucket_step="
                f"{self.bucket_step}: change one of them.",
            )
        require(
            len(set(self.resolutions)) == len(self.resolutions),
            f"data.extra_resolutions={self.extra_resolutions} contains a resolution twice: "
            "data.resolution counts too.",
        )

    def _check_sources(self):
        require(
            (self.source == "mixture") == bool(self.mixture),
            "data.source=mixture and data.mixture=[…] belong together: set both.",
        )
        require(
            self.source != "mixture" or not self.path,
            f"data.path={self.path} is not used by a mixture: its sources have their own.",
        )
        # For formats other than mixtures, `sources` builds the only source, which checks it.
        has_shapes = any(source.source == "shapes" for source in self.sources)
        require(
            self.flip_probability == 0 or not has_shapes,
            f"data.flip_probability={self.flip_probability} would move objects whose columns the "
            "captions of data.source=shapes name: set it to 0.",
        )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All resolutions in pixels."""
        return (self.resolution, *self.extra_resolutions)

    @property
    def sources(self) -> tuple[MixtureSource, ...]:
        """The data sets that the images come from."""
        if self.source == "mixture":
            return self.mixture
        return (
            MixtureSource(
                self.source, self.path, self.root, self.image_key, self.caption_key, self.shapes
            ),
        )
