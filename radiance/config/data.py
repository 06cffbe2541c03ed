"""Pictures, captions, and what encodes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from radiance.sections import Section, require


@dataclass(frozen=True)
class Text(Section):
    """The text encoder."""

    encoder: Literal["hash", "t5", "random_t5"] = "hash"  # random_t5: small, of random weights; for data.source=shapes
    length: int = 64  # longest caption in tokens, end-of-sequence included; T5 models use 512
    file: str = ""  # T5's weights: safetensors (a file, an index or a folder) or GGUF
    tokenizer: str = ""  # spiece.model or tokenizer.json; empty: found beside the weights
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of T5's weights and activations
    cache: str = ""  # folder of an embedding cache (`radiance encode`), which is read instead of encoding

    def check(self):
        require(self.length >= 2, f"text.length={self.length}: captions need room for a word and the end of the sequence, so at least 2.")
        require(
            self.encoder != "random_t5" or not self.cache,
            f"text.cache={self.cache} keeps one row of padding, and text.encoder=random_t5 gives many: leave text.cache empty.",
        )
        require(self.encoder == "t5" or not self.file, f"text.file={self.file} is for text.encoder=t5: set that too.")


Background = Literal["white", "grey", "black", "beige", "brown", "navy"]  # of data/shapes.py


@dataclass(frozen=True)
class Shapes(Section):
    """Pictures drawn on the way, whose captions say exactly what they show."""

    law: Literal["short", "mixed", "full"] = "mixed"  # of tokens: up to 20, up to the limit and mostly few, or as many as the limit
    limit: int = 64  # longest caption in tokens, end-of-sequence included
    objects: int = 5  # of a picture at most; of one alone a small model learns in minutes what captions say
    # Those that pictures may have. On black alone a small model learns soon where objects stand (experiments/one_shape.py).
    backgrounds: tuple[Background, ...] = get_args(Background)
    count: int = 2**20  # pictures of an epoch, and of the validation split: training for longer than one sees them again
    seed: int = 0  # of the scenes, and of their captions

    def check(self):
        require(1 <= self.objects <= 5, f"data.shapes.objects={self.objects} must be a whole number from 1 to 5.")
        require(
            0 < len(self.backgrounds) == len(set(self.backgrounds)),
            f"data.shapes.backgrounds={self.backgrounds}: name at least one of {', '.join(get_args(Background))}, each once.",
        )
        require(self.count >= 1, f"data.shapes.count={self.count} must be at least 1.")
        require(0 <= self.seed < 2**32, f"data.shapes.seed={self.seed} must be a whole number from 0 to 2**32 - 1.")


@dataclass(frozen=True)
class Part(Section):
    """One data set of a mixture, with the meaning that these settings have in `data`."""

    source: Literal["digits", "shapes", "folder", "jsonl", "tfds", "tar", "parquet"] = "folder"
    path: str = ""
    root: str = ""
    picture: str = "image"
    caption: str = "text"
    shapes: Shapes = field(default_factory=Shapes)
    share: float = 1.0  # of the pictures that are seen, beside the other parts' shares

    def check(self):
        require(
            self.source not in ("digits", "shapes") or not self.path,
            f"data.path={self.path} is not for data.source={self.source}: choose another source.",
        )
        require(self.source == "jsonl" or not self.root, f"data.root={self.root} is for data.source=jsonl: set that too.")
        require(self.share > 0, f"The share {self.share} of {self.path or self.source} in the mixture must be more than 0.")


@dataclass(frozen=True)
class Data(Section):
    """Pictures and captions, and the batches made of them."""

    source: Literal["digits", "shapes", "folder", "jsonl", "tfds", "tar", "parquet", "mixture"] = "digits"
    path: str = ""  # of folder: where it lies; jsonl: the file; tar and parquet: a shard, a folder of them, or a pattern; tfds: NAME
    root: str = ""  # of jsonl: the folder in which its pictures are; empty: the file's own
    picture: str = "image"  # of tfds and parquet: the feature or column that holds the picture
    caption: str = "text"  # of tfds and parquet: what holds its caption, captions or label; features within features as "captions/text"
    shapes: Shapes = field(default_factory=Shapes)  # of shapes
    mixture: tuple[Part, ...] = ()  # of mixture: its parts
    validation: float = 0.05  # share of pictures held out, chosen by their names; digits, shapes and most of tfds have their own
    directory: str = "~/.cache/radiance"  # where prepared data sets and catalogues are kept
    side: int = 512  # pictures have as many pixels as a square of this side
    other_sides: tuple[int, ...] = ()  # further ones: every epoch each picture draws its own among all that it is large enough for
    bucket_step: int = 0  # pixels; sides are multiples of it and pictures keep about their proportions. 0: all are squares
    bucket_ratio: float = 2.0  # a picture this many times as long as wide, or more, is left out; not where all are squares
    enlarge: float = 1.0  # times, at most, that a picture is scaled up; one that is too small for every side is left out
    remainder: Literal["carry", "fill", "drop"] = "carry"  # pictures of an epoch that fill no batch of their shape: they wait for
    # the next epoch's, stand in a batch with empty rows, or are left out of this epoch
    batch: int = 256  # pictures a step, over all devices and hosts
    crop: Literal["centre", "random"] = "centre"  # what is kept of a picture of other proportions
    mirror: float = 0.0  # share of the pictures that are mirrored; never one whose caption says left or right
    background: tuple[int, int, int] = (255, 255, 255)  # behind transparent pixels
    broken_limit: float = 0.1  # share of the pictures that may turn out broken before the run stops
    caption_dropout: float = 0.1  # share of captions that are left out, for guidance
    dropout_to: Literal["empty", "masked"] = "empty"  # what stands in their place: the empty prompt, or no text token at all
    tag_shuffle: bool = False  # of captions that are lists of tags: in a new order each time
    tag_drop: float = 0.0  # the largest share of a caption's tags that is left out
    lower: float = 0.0  # share of captions put in lower case
    prefix: str = ""  # before every caption that is not dropped, in training and validation, such as "a painting of "
    suffix: str = ""
    workers: int = 0  # processes of each host that decode pictures; 0: the trainer's own threads do
    threads: int = 4  # of each of these processes

    def check(self):
        require(self.side >= 1 and self.batch >= 1 and self.threads >= 1, "data.side, data.batch and data.threads must be at least 1.")
        require(self.workers >= 0, f"data.workers={self.workers}: give a number of processes, or 0 for none.")
        for name in ("mirror", "broken_limit", "caption_dropout", "tag_drop", "lower"):
            require(0 <= getattr(self, name) <= 1, f"data.{name}={getattr(self, name)} must lie between 0 and 1.")
        require(all(0 <= c <= 255 for c in self.background), f"data.background={self.background}: three numbers from 0 to 255 are needed.")
        require(0 < self.validation < 1, f"data.validation={self.validation} must lie between 0 and 1: it is a share of the pictures.")
        require(self.enlarge > 0, f"data.enlarge={self.enlarge} must be more than 0: 1 never scales a picture up.")
        require(self.bucket_ratio > 1, f"data.bucket_ratio={self.bucket_ratio} would leave out every picture: it must be more than 1.")
        require(self.bucket_step >= 0, f"data.bucket_step={self.bucket_step} must be 0 (squares alone) or more.")
        for side in self.sides:
            require(side >= 1, f"data.other_sides={self.other_sides}: sides are at least 1.")
            require(
                not self.bucket_step or side % self.bucket_step == 0,
                f"Sides of {side} are no multiples of data.bucket_step={self.bucket_step}: change one of them.",
            )
        require(
            len(set(self.sides)) == len(self.sides), f"data.other_sides={self.other_sides} names a side twice: data.side is one already."
        )
        require((self.source == "mixture") == bool(self.mixture), "data.source=mixture and data.mixture=[…] belong together: set both.")
        require(self.source != "mixture" or not self.path, f"data.path={self.path} is of no use to a mixture: its parts have their own.")
        drawn = any(part.source == "shapes" for part in self.parts)  # which checks them
        require(
            self.mirror == 0 or not drawn,
            f"data.mirror={self.mirror} would move what captions of data.source=shapes place in columns: set it to 0.",
        )

    @property
    def sides(self) -> tuple[int, ...]:
        """All base resolutions."""
        return (self.side, *self.other_sides)

    @property
    def parts(self) -> tuple[Part, ...]:
        """The data sets that the pictures come from."""
        if self.source == "mixture":
            return self.mixture
        return (Part(self.source, self.path, self.root, self.picture, self.caption, self.shapes),)
