"""Images, captions, and what encodes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from radiance.base.settings import Section, require
from radiance.shapes.attributes import MAX_OBJECTS, Background, CaptionLengths


@dataclass(frozen=True)
class Shapes(Section):
    """Images drawn on the way, whose captions say exactly what they show."""

    caption_lengths: CaptionLengths = (
        "mixed"  # of tokens: up to 20, up to the limit and mostly few, or as many as the limit
    )
    max_tokens: int = 64  # longest caption in tokens, end-of-sequence included
    # Largest number of objects. A small model learns the captions of one object in minutes.
    max_objects: int = MAX_OBJECTS
    # Those that images may have. On black alone a small model learns soon where objects stand (experiments/one_shape.py).
    backgrounds: tuple[Background, ...] = get_args(Background)
    num_images: int = (
        2**20
    )  # images of an epoch, and of the validation split: training for longer than one sees them again
    seed: int = 0  # of the scenes, and of their captions

    def check(self):
        require(
            1 <= self.max_objects <= MAX_OBJECTS,
            f"data.shapes.max_objects={self.max_objects} must be a whole number from 1 to {MAX_OBJECTS}.",
        )
        require(
            0 < len(self.backgrounds) == len(set(self.backgrounds)),
            f"data.shapes.backgrounds={self.backgrounds}: name at least one of {', '.join(get_args(Background))}, each once.",
        )
        require(
            self.num_images >= 1, f"data.shapes.num_images={self.num_images} must be at least 1."
        )
        require(
            0 <= self.seed < 2**32,
            f"data.shapes.seed={self.seed} must be a whole number from 0 to 2**32 - 1.",
        )


@dataclass(frozen=True)
class MixtureSource(Section):
    """One data set of a mixture, with the meaning that these settings have in `data`."""

    source: Literal["digits", "shapes", "folder", "jsonl", "tfds", "tar", "parquet"] = "folder"
    path: str = ""
    root: str = ""
    image_key: str = "image"
    caption_key: str = "text"
    shapes: Shapes = field(default_factory=Shapes)
    weight: float = 1.0  # of the images that are seen, beside the other parts' shares

    def check(self):
        require(
            self.source not in ("digits", "shapes") or not self.path,
            f"data.path={self.path} is not for data.source={self.source}: choose another source.",
        )
        require(
            self.source == "jsonl" or not self.root,
            f"data.root={self.root} is for data.source=jsonl: set that too.",
        )
        require(
            self.weight > 0,
            f"The share {self.weight} of {self.path or self.source} in the mixture must be more than 0.",
        )


@dataclass(frozen=True)
class Data(Section):
    """Images and captions, and the batches made of them."""

    source: Literal["digits", "shapes", "folder", "jsonl", "tfds", "tar", "parquet", "mixture"] = (
        "digits"
    )
    path: str = ""  # of folder: where it lies; jsonl: the file; tar and parquet: a shard, a folder of them, or a pattern; tfds: NAME
    root: str = ""  # of jsonl: the folder in which its images are; empty: the file's own
    image_key: str = "image"  # of tfds and parquet: the feature or column that holds the image
    caption_key: str = "text"  # of tfds and parquet: what holds its caption, captions or label; features within features as "captions/text"
    shapes: Shapes = field(default_factory=Shapes)  # of shapes
    mixture: tuple[MixtureSource, ...] = ()  # of mixture: its parts
    validation_fraction: float = 0.05  # share of images held out, chosen by their names; digits, shapes and most of tfds have their own
    cache_dir: str = "~/.cache/radiance"  # where prepared data sets and dataset indexes are kept
    resolution: int = 512  # images have as many pixels as a square of this side
    extra_resolutions: tuple[
        int, ...
    ] = ()  # further ones: every epoch each image draws its own among all that it is large enough for
    bucket_step: int = 0  # pixels; sides are multiples of it and images keep about their proportions. 0: all are squares
    max_aspect_ratio: float = 2.0  # an image this many times as long as wide, or more, is left out; not where all are squares
    max_upscale: float = 1.0  # times, at most, that an image is scaled up; one that is too small for every side is left out
    incomplete_batches: Literal["carry", "pad", "drop"] = (
        "carry"  # images of an epoch that fill no batch of their shape: they wait for
    )
    # the next epoch's, stand in a batch with empty rows, or are left out of this epoch
    batch_size: int = 256  # images a step, over all devices and hosts
    crop: Literal["center", "random"] = "center"  # what is kept of an image of other proportions
    flip_probability: float = (
        0.0  # share of the images that are mirrored; never one whose caption says left or right
    )
    background: tuple[int, int, int] = (255, 255, 255)  # behind transparent pixels
    max_broken_fraction: float = (
        0.1  # share of the images that may turn out broken before the run stops
    )
    caption_dropout: float = 0.1  # share of captions that are left out, for guidance
    dropped_caption: Literal["empty", "masked"] = (
        "empty"  # what stands in their place: the empty prompt, or no text token at all
    )
    shuffle_tags: bool = False  # of captions that are lists of tags: in a new order each time
    tag_dropout: float = 0.0  # the largest share of a caption's tags that is left out
    lowercase_probability: float = 0.0  # share of captions put in lower case
    caption_prefix: str = ""  # before every caption that is not dropped, in training and validation, such as "a painting of "
    caption_suffix: str = ""
    num_workers: int = (
        0  # processes of each host that decode images; 0: the trainer's own threads do
    )
    num_threads: int = 4  # of each of these processes

    def check(self):
        require(
            self.resolution >= 1 and self.batch_size >= 1 and self.num_threads >= 1,
            "data.resolution, data.batch_size and data.num_threads must be at least 1.",
        )
        require(
            self.num_workers >= 0,
            f"data.num_workers={self.num_workers}: give a number of processes, or 0 for none.",
        )
        for name in ("flip_probability", "max_broken_fraction", "caption_dropout", "tag_dropout", "lowercase_probability"):
            require(
                0 <= getattr(self, name) <= 1,
                f"data.{name}={getattr(self, name)} must lie between 0 and 1.",
            )
        require(
            all(0 <= c <= 255 for c in self.background),
            f"data.background={self.background}: three numbers from 0 to 255 are needed.",
        )
        require(
            0 < self.validation_fraction < 1,
            f"data.validation_fraction={self.validation_fraction} must lie between 0 and 1: it is a share of the images.",
        )
        require(
            self.max_upscale > 0,
            f"data.max_upscale={self.max_upscale} must be more than 0: 1 never scales an image up.",
        )
        require(
            self.max_aspect_ratio > 1,
            f"data.max_aspect_ratio={self.max_aspect_ratio} would leave out every image: it must be more than 1.",
        )
        require(
            self.bucket_step >= 0,
            f"data.bucket_step={self.bucket_step} must be 0 (squares alone) or more.",
        )
        for resolution in self.resolutions:
            require(
                resolution >= 1,
                f"data.extra_resolutions={self.extra_resolutions}: sides are at least 1.",
            )
            require(
                not self.bucket_step or resolution % self.bucket_step == 0,
                f"Sides of {resolution} are no multiples of data.bucket_step={self.bucket_step}: change one of them.",
            )
        require(
            len(set(self.resolutions)) == len(self.resolutions),
            f"data.extra_resolutions={self.extra_resolutions} names a side twice: data.resolution is one already.",
        )
        require(
            (self.source == "mixture") == bool(self.mixture),
            "data.source=mixture and data.mixture=[…] belong together: set both.",
        )
        require(
            self.source != "mixture" or not self.path,
            f"data.path={self.path} is of no use to a mixture: its parts have their own.",
        )
        has_shapes = any(source.source == "shapes" for source in self.sources)  # which checks them
        require(
            self.flip_probability == 0 or not has_shapes,
            f"data.flip_probability={self.flip_probability} would move what captions of data.source=shapes place in columns: set it to 0.",
        )

    @property
    def resolutions(self) -> tuple[int, ...]:
        """All base resolutions."""
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
