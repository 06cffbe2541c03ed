"""A text encoder without learned weights or downloads: hashed word pieces."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float

from radiance.base.hashing import hash_parts
from radiance.text.encoder import TextEmbedding, TextEncoder
from radiance.weights.tensors import DTYPES

# Thai, kana, Han and Hangul letters
UNSPACED_LETTERS = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"


class HashEncoder(TextEncoder):
    """Each word, with its neighbors as n-grams, to fixed Gaussian vectors: any language, no vocabulary, nothing learned.

    Row i is the sum of the vectors of word i, of the pair before it and of the pair after it, scaled to unit variance. The pairs
    bind "red" to "square"; a bag of words cannot. Letters of scripts written without spaces are words of their own.
    The vectors come from NumPy's frozen legacy generator, so they are the same everywhere and always.
    """

    kind = "hash"
    END_WORD, PAD_WORD = "</s>", "<pad>"

    def __init__(self, dim: int, max_length: int):
        self.dim, self.max_length, self.dtype = dim, max_length, DTYPES["float32"]
        self.identity = hash_parts("hash", dim)

    @staticmethod
    def split_words(text: str) -> list[str]:
        text = unicodedata.normalize("NFKC", text).casefold()
        return re.findall(rf"[{UNSPACED_LETTERS}]|[^\W{UNSPACED_LETTERS}]+|[^\w\s]", text)

    def count_tokens(self, text: str) -> int:
        return len(self.split_words(text)) + 1

    def encode(self, texts: Sequence[str], truncate: bool = False) -> list[TextEmbedding]:
        return [self._encode_text(text, truncate) for text in texts]

    @lru_cache(maxsize=4096)
    def _encode_text(self, text: str, truncate: bool) -> TextEmbedding:
        words = self.split_words(text)
        self.check_length(text, len(words) + 1, truncate)
        words = [*words[: self.max_length - 1], self.END_WORD]
        ngrams = [
            [w, f"{a} {w}", f"{w} {b}"] for a, w, b in zip(["", *words], words, [*words[1:], ""])
        ]
        rows = [
            sum(gaussian_vector(ngram, self.dim) for ngram in row) / np.sqrt(3, dtype=np.float32)
            for row in ngrams
        ]
        return TextEmbedding(
            np.stack([*rows, gaussian_vector(self.PAD_WORD, self.dim)][: self.max_length]),
            len(words),
        )


@lru_cache(maxsize=65536)
def gaussian_vector(ngram: str, dim: int) -> Float[np.ndarray, " d"]:
    """Numbers that the text alone decides, the same everywhere and always. Not to be written to."""
    seed = np.frombuffer(
        hashlib.blake2b(ngram.encode(errors="surrogatepass"), digest_size=16).digest(), "<u4"
    )
    return np.random.RandomState(seed).standard_normal(dim).astype(np.float32)
