"""Settings of the text encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from radiance.base.settings import Section, require


@dataclass(frozen=True)
class Text(Section):
    """The text encoder."""

    encoder: Literal["hash", "t5", "random_t5"] = (
        "hash"  # random_t5: small, of random weights; for data.source=shapes
    )
    max_length: int = 64  # longest caption in tokens, end-of-sequence included; T5 models use 512
    file: str = ""  # T5's weights: safetensors (a file, an index or a folder) or GGUF
    tokenizer: str = ""  # spiece.model or tokenizer.json; empty: found beside the weights
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # of T5's weights and activations
    cache: str = (
        ""  # folder of an embedding cache (`radiance encode`), which is read instead of encoding
    )

    def check(self):
        require(
            self.max_length >= 2,
            f"text.max_length={self.max_length}: captions need room for a word and the end of the sequence, so at least 2.",
        )
        require(
            self.encoder != "random_t5" or not self.cache,
            f"text.cache={self.cache} keeps one row of padding, and text.encoder=random_t5 gives many: leave text.cache empty.",
        )
        require(
            self.encoder == "t5" or not self.file,
            f"text.file={self.file} is for text.encoder=t5: set that too.",
        )
