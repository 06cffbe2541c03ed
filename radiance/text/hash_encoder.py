"""A text encoder without learned weights or downloads: hashed words."""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Float32

from radiance.base.hashing import hash_parts
from radiance.text.encoder import TextEmbedding, TextEncoder
from radiance.weights.tensors import DTYPES

# Thai, kana, Han and Hangul letters
UNSPACED_LETTERS = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"


class HashEncoder(TextEncoder):
    """Maps words and their neighbors to fixed Gaussian vectors, for any language.

    Row i is the sum of the vectors of word i, of the pair that ends with it and of the pair that
    begins with it, scaled to unit variance. The pairs bind "red" to "square"; a bag of words
    cannot. Letters of scripts that are written without spaces are words of their own. The vectors
    come from NumPy's frozen legacy generator, so they are the same on every machine and version.
    """

    kind = "hash"
    END_WORD, PAD_WORD = "</s>", "<pad>"

    def __init__(self, dim: int, max_length: int):
        self.dim, self.max_length, self.dtype = dim, max_length, DTYPES["float32"]
        self.identity = hash_parts("hash", dim)

    @staticmethod
    def split_words(text: str) -> list[str]:
        """Split a text, normalized and in lower case, into words and punctuation marks."""
        text = unicodedata.normalize("NFKC", text).casefold()
        return re.findall(rf"[{UNSPACED_LETTERS}]|[^\W{UNSPACED_LETTERS}]+|[^\w\s]", text)

    def count_tokens(self, text: str) -> int:
        """Count the words and punctuation marks of a text, and its end."""
        return len(self.split_words(text)) + 1

    def encode(self, texts: Sequence[str], truncate: bool = False) -> list[TextEmbedding]:
        """Encode texts; see `TextEncoder.encode`."""
        return [self._encode_text(text, truncate) for text in texts]

    @lru_cache(maxsize=4096)  # noqa: B019 (few encoders are made, and they live as long as a run)
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
        rows = [*rows, gaussian_vector(self.PAD_WORD, self.dim)][: self.max_length]
        return TextEmbedding(np.stack(rows), len(words))


@lru_cache(maxsize=65536)
def gaussian_vector(ngram: str, dim: int) -> Float32[np.ndarray, " {dim}"]:
    """Return a read-only Gaussian vector that depends on a text alone."""
    seed = np.frombuffer(
        hashlib.blake2b(ngram.encode(errors="surrogatepass"), digest_size=16).digest(), "<u4"
    )
    return np.random.RandomState(seed).standard_normal(dim).astype(np.float32)
