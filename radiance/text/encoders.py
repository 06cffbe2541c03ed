"""Text in, (embeddings [b, l, d], lengths [b]) out: the interface of all encoders, and one that needs no download.

`lengths` counts real tokens, the end of the sequence included. Rows beyond it hold whatever the encoder gives for padding.
"""

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
from jaxtyping import Float32, Int32

from radiance import config

# Thai, kana, Han and Hangul letters
UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
BUCKET = 16  # texts are cut to multiples of this, so that few shapes are compiled


class TextError(ValueError):
    """A prompt that cannot be encoded; the message says which and what to do."""


class Encoder(Protocol):
    dim: int
    limit: int  # tokens

    def count(self, text: str) -> int:
        """Tokens of `text`, end-of-sequence included, without a limit."""

    def __call__(self, texts: Sequence[str], cut: bool = False) -> tuple[Float32[np.ndarray, "b l d"], Int32[np.ndarray, " b"]]:
        """Embeddings padded to the limit, and lengths. Raises TextError for a text over the limit, unless `cut`."""


def make_encoder(text: config.Text, dim: int) -> Encoder:
    return {"hash": HashEncoder}[text.encoder](dim, text.length)


def bucket(tokens: int, limit: int) -> int:
    """The least multiple of BUCKET that holds that many tokens, at most the limit."""
    return min(-(-tokens // BUCKET) * BUCKET, limit)


class HashEncoder:
    """Each word, with its neighbours as n-grams, to fixed Gaussian vectors: any language, no vocabulary, nothing learned.

    Row i is the sum of the vectors of word i, of the pair before it and of the pair after it, scaled to unit variance. The pairs
    bind "red" to "square"; a bag of words cannot. Letters of scripts written without spaces are words of their own.
    The vectors come from NumPy's frozen legacy generator, so they are the same everywhere and always.
    """

    END, PAD = "</s>", "<pad>"

    def __init__(self, dim: int, limit: int):
        self.dim, self.limit = dim, limit

    def words(self, text: str) -> list[str]:
        text = unicodedata.normalize("NFKC", text).casefold()
        return re.findall(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]", text)

    def count(self, text: str) -> int:
        return len(self.words(text)) + 1

    def __call__(self, texts: Sequence[str], cut: bool = False) -> tuple[Float32[np.ndarray, "b l d"], Int32[np.ndarray, " b"]]:
        rows = [self._encode(text, cut) for text in texts]
        embeddings = np.empty((len(rows), self.limit, self.dim), np.float32)
        for out, row in zip(embeddings, rows):
            out[: len(row)], out[len(row) :] = row, _gaussian(self.PAD, self.dim)
        return embeddings, np.array([len(row) for row in rows], np.int32)

    @lru_cache(maxsize=4096)  # noqa: B019 — one encoder lives as long as its run
    def _encode(self, text: str, cut: bool) -> Float32[np.ndarray, "n d"]:
        words = self.words(text)
        if len(words) >= self.limit and not cut:
            shown = text if len(text) <= 60 else text[:57] + "..."
            raise TextError(
                f"The prompt {shown!r} has {len(words) + 1} tokens, and the limit is {self.limit}: shorten it, or raise text.length."
            )
        words = [*words[: self.limit - 1], self.END]
        grams = [[w, f"{a} {w}", f"{w} {b}"] for a, w, b in zip(["", *words], words, [*words[1:], ""])]
        return np.stack([sum(_gaussian(g, self.dim) for g in row) / np.sqrt(3, dtype=np.float32) for row in grams])


@lru_cache(maxsize=65536)
def _gaussian(gram: str, dim: int) -> Float32[np.ndarray, " d"]:
    seed = np.frombuffer(hashlib.blake2b(gram.encode(errors="surrogatepass"), digest_size=16).digest(), "<u4")
    return np.random.RandomState(seed).standard_normal(dim).astype(np.float32)
