"""The interface of text encoders."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32

from radiance.base.errors import TextError

LENGTH_STEP = 16  # texts are cut to multiples of this, so that few shapes are compiled


class TextEmbedding(NamedTuple):
    """One text."""

    rows: Float[
        np.ndarray, "n d"
    ]  # of the real tokens and of padding, at least one, as far as the limit goes; not to be written to
    length: int  # real tokens


class TextEncoder:
    """What all encoders have. A subclass gives `count` and `encode`."""

    kind: str  # as text.encoder names it
    dim: int  # of the embeddings
    max_length: int  # tokens
    dtype: np.dtype  # of the embeddings
    identity: str  # a hash of what the embeddings depend on besides the text and the limit

    def count_tokens(self, text: str) -> int:
        """Tokens of `text`, end-of-sequence included, without a limit."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str], truncate: bool = False) -> list[TextEmbedding]:
        """The embeddings without padding but the first. Raises TextError for a text over the limit, unless `cut`."""
        raise NotImplementedError

    def __call__(
        self, texts: Sequence[str], truncate: bool = False
    ) -> tuple[Float[np.ndarray, "b l d"], Int32[np.ndarray, " b"]]:
        """Embeddings padded to the limit, and lengths. Raises TextError for a text over the limit, unless `cut`."""
        return self.pad_embeddings(self.encode(texts, truncate), self.max_length)

    def pad_embeddings(
        self, text_embeddings: Sequence[TextEmbedding], width: int
    ) -> tuple[Float[np.ndarray, "b {width} d"], Int32[np.ndarray, " b"]]:
        """Embeddings in one array, and lengths; what is longer than `width` is cut.

        At 512 tokens of 4096 numbers a text takes 4 MB in bfloat16: who needs no more than the visible ones pads to fewer.
        """
        embeddings = np.empty((len(text_embeddings), width, self.dim), self.dtype)
        for out, (rows, _) in zip(embeddings, text_embeddings):
            out[: len(rows)], out[len(rows) :] = rows[:width], rows[-1]
        return embeddings, np.array([min(length, width) for _, length in text_embeddings], np.int32)

    def check_length(self, text: str, num_tokens: int, truncate: bool):
        """Raises TextError for a text of `count` tokens that is over the limit and must not be cut."""
        if num_tokens > self.max_length and not truncate:
            raise TextError(
                f"The prompt {quote_text(text)} has {num_tokens} tokens, and the limit is {self.max_length}: shorten it, or raise text.max_length."
            )


def round_up_length(num_tokens: int, max_length: int, step: int = LENGTH_STEP) -> int:
    """The least multiple of `step` that holds that many tokens, at most the limit."""
    return min(-(-num_tokens // step) * step, max_length)


def quote_text(text: str) -> str:
    """A text as an error names it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")
