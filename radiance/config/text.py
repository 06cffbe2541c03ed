"""Settings of the text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require, resumable

T5_MAX_LENGTH = 512  # tokens; the published models were trained with it


@dataclass(frozen=True)
class Text(Section):
    """The text encoder."""

    encoder: Literal["hash", "t5", "random_t5"] = "hash"
    """hash: hashes of words; t5: T5 v1.1; random_t5: a small T5 with random weights, for
    data.source=shapes."""
    max_length: int = 64
    """Longest caption in tokens, including the end of the sequence; published models use 512."""
    file: str = resumable("")
    """Weights of T5: safetensors (a file, an index or a folder) or GGUF."""
    tokenizer: str = resumable("")
    """spiece.model or tokenizer.json; empty: the one beside the weights."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the weights and activations of T5."""
    cache: str = resumable("")
    """Folder of an embedding cache (`radiance encode`), which is read in place of encoding."""

    def check(self):
        """Raise ConfigError if a setting cannot work."""
        require(
            self.max_length >= 2,
            f"text.max_length={self.max_length} must be at least 2: one token of text and the end "
            "of the sequence.",
        )
        require(
            self.encoder != "random_t5" or not self.cache,
            f"text.cache={self.cache} stores one row of padding, and text.encoder=random_t5 has "
            "many: leave text.cache empty.",
        )
        require(
            self.encoder == "t5" or not self.file,
            f"text.file={self.file} is for text.encoder=t5: set that too.",
        )
