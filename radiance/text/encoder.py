"""The interface of text encoders: texts to embeddings [b, l, d] and lengths [b].

Lengths count real tokens, end-of-sequence included. The row behind them belongs to a padding token,
which published models see (`model.masking` "one_pad"); T5 computes it with the real tokens in view,
so it differs from text to text. Later rows, which only masking "off" sees, repeat it; the random T5
computes them too.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, Shaped

from radiance.base.errors import TextError
from radiance.base.text_files import quote_text

LENGTH_STEP = 16  # texts are padded to multiples of it, so that few shapes are compiled

Embeddings = Shaped[np.ndarray, "b l d"]  # float32 or bfloat16
Integer = int | np.integer


class TextEmbedding(NamedTuple):
    """The embedding of one text.

    Attributes:
        rows: Rows of the real tokens and of padding, at least one, up to the maximum length;
            read-only.
        length: Number of real tokens.
    """

    rows: Shaped[np.ndarray, "n d"]
    length: int


class TextEncoder:
    """Interface of text encoders; a subclass has `count_tokens` and `encode`.

    Attributes:
        kind: The setting `text.encoder` of this encoder.
        dim: Size of an embedding.
        max_length: Maximum number of tokens.
        dtype: Type of the embeddings.
        identity: A hash of everything that embeddings depend on besides text and maximum length.
    """

    kind: str
    dim: int
    max_length: int
    dtype: np.dtype
    identity: str

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text, end-of-sequence included, without a maximum."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str], truncate: bool = False) -> list[TextEmbedding]:
        """Encode texts without padding to a common length.

        Args:
            texts: Texts.
            truncate: Whether to cut texts at the maximum length.

        Returns:
            Their embeddings.

        Raises:
            TextError: If a text is too long and `truncate` is false.
        """
        raise NotImplementedError

    def __call__(
        self, texts: Sequence[str], truncate: bool = False
    ) -> tuple[Embeddings, Int32[np.ndarray, " b"]]:
        """Encode texts, and pad them to the maximum length.

        Args:
            texts: Texts.
            truncate: Whether to cut texts at the maximum length.

        Returns:
            Embeddings and lengths.

        Raises:
            TextError: If a text is too long and `truncate` is false.
        """
        return self.pad_embeddings(self.encode(texts, truncate), self.max_length)

    def pad_embeddings(
        self, text_embeddings: Sequence[TextEmbedding], padded_length: Integer
    ) -> tuple[Embeddings, Int32[np.ndarray, " b"]]:
        """Pad or cut embeddings to a common length.

        512 tokens of 4096 numbers take 4 MB in bfloat16, so pad to the visible tokens if no others
        are needed.

        Args:
            text_embeddings: Embeddings of texts.
            padded_length: Rows of each text in the result.

        Returns:
            Embeddings and lengths.
        """
        shape = (len(text_embeddings), padded_length, self.dim)
        embeddings = np.empty(shape, self.dtype)
        for out, (rows, _) in zip(embeddings, text_embeddings):
            out[: len(rows)], out[len(rows) :] = rows[:padded_length], rows[-1]
        lengths = [min(length, padded_length) for _, length in text_embeddings]
        return embeddings, np.array(lengths, np.int32)

    def check_length(self, text: str, num_tokens: int, truncate: bool):
        """Raise TextError for a text of `num_tokens` tokens that is too long, unless it is cut."""
        if num_tokens > self.max_length and not truncate:
            raise TextError(
                f"The prompt {quote_text(text)} has {num_tokens} tokens, and the limit is "
                f"{self.max_length}: shorten it, or raise text.max_length."
            )


def round_up_length(num_tokens: Integer, max_length: int, step: int = LENGTH_STEP) -> Integer:
    """Round a number of tokens up to a multiple of `step`, at most `max_length`."""
    return min(-(-num_tokens // step) * step, max_length)
