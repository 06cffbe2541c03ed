"""Pictures, captions, and what encodes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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


@dataclass(frozen=True)
class Data(Section):
    """Pictures and captions, and the batches made of them."""

    source: Literal["digits", "folder"] = "digits"
    path: str = ""  # of source=folder: a folder of pictures with captions, its subfolders included
    validation: float = 0.05  # of source=folder: share of the pictures that are held out, chosen by their names
    directory: str = "~/.cache/radiance"  # where prepared data sets are kept
    side: int = 512  # pictures are squares of this many pixels
    batch: int = 256  # pictures a step, over all devices and hosts
    crop: Literal["centre", "random"] = "centre"  # what is kept of a picture that is no square
    mirror: float = 0.0  # share of the pictures that are mirrored; never one whose caption says left or right
    background: tuple[int, int, int] = (255, 255, 255)  # behind transparent pixels
    broken_limit: float = 0.1  # share of the pictures that may turn out broken before the run stops
    caption_dropout: float = 0.1  # share of captions that are left out, for guidance
    dropout_to: Literal["empty", "masked"] = "empty"  # what stands in their place: the empty prompt, or no text token at all
    tag_shuffle: bool = False  # of captions that are lists of tags: in a new order each time
    tag_drop: float = 0.0  # the largest share of a caption's tags that is left out
    lower: float = 0.0  # share of captions put in lower case
    prefix: str = ""  # before every caption that is not dropped, such as "a painting of "
    suffix: str = ""
    threads: int = 4  # readers ahead of the trainer

    def check(self):
        require(self.side >= 1 and self.batch >= 1 and self.threads >= 1, "data.side, data.batch and data.threads must be at least 1.")
        for name in ("mirror", "broken_limit", "caption_dropout", "tag_drop", "lower"):
            require(0 <= getattr(self, name) <= 1, f"data.{name}={getattr(self, name)} must lie between 0 and 1.")
        require(all(0 <= c <= 255 for c in self.background), f"data.background={self.background}: three numbers from 0 to 255 are needed.")
        require(0 < self.validation < 1, f"data.validation={self.validation} must lie between 0 and 1: it is a share of the pictures.")
        require(self.source == "folder" or not self.path, f"data.path={self.path} is for data.source=folder: set that too.")
