"""Text in, (embeddings [b, l, d], lengths [b]) out: the interface of all encoders, one that needs no download, and T5.

`lengths` counts real tokens, the end of the sequence included. The row behind them is a padding token's, which the published
models see (`masking: one_pad`); T5 computes it with the real tokens in view, so it is not the same in every text. The rows behind
that one, which only `masking: off` sees, repeat it; the random T5 gives them too.
"""

import hashlib
import re
import threading
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32

from radiance import config
from radiance.text import t5
from radiance.text.tokenizers import PAD, open_tokenizer
from radiance.weights.files import DTYPES

# Thai, kana, Han and Hangul letters
UNSPACED = r"\u0e00-\u0e7f\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\U00020000-\U0003ffff"
BUCKET = 16  # texts are cut to multiples of this, so that few shapes are compiled
TOKENS = 4096  # of a batch of T5; the attention of 64 heads then takes at most half a gigabyte


class TextError(ValueError):
    """A prompt that cannot be encoded; the message says which and what to do."""


class Encoded(NamedTuple):
    """One text."""

    rows: Float[np.ndarray, "n d"]  # of the real tokens and of padding, at least one, as far as the limit goes; not to be written to
    length: int  # real tokens


class Encoder:
    """What all encoders have. A subclass gives `count` and `encode`."""

    kind: str  # as text.encoder names it
    dim: int  # of the embeddings
    limit: int  # tokens
    dtype: np.dtype  # of the embeddings
    identity: str  # a hash of what the embeddings depend on besides the text and the limit

    def count(self, text: str) -> int:
        """Tokens of `text`, end-of-sequence included, without a limit."""
        raise NotImplementedError

    def encode(self, texts: Sequence[str], cut: bool = False) -> list[Encoded]:
        """The embeddings without padding but the first. Raises TextError for a text over the limit, unless `cut`."""
        raise NotImplementedError

    def __call__(self, texts: Sequence[str], cut: bool = False) -> tuple[Float[np.ndarray, "b l d"], Int32[np.ndarray, " b"]]:
        """Embeddings padded to the limit, and lengths. Raises TextError for a text over the limit, unless `cut`."""
        return self.pad(self.encode(texts, cut), self.limit)

    def pad(self, encoded: Sequence[Encoded], width: int) -> tuple[Float[np.ndarray, "b {width} d"], Int32[np.ndarray, " b"]]:
        """Embeddings in one array, and lengths; what is longer than `width` is cut.

        At 512 tokens of 4096 numbers a text takes 4 MB in bfloat16: who needs no more than the visible ones pads to fewer.
        """
        embeddings = np.empty((len(encoded), width, self.dim), self.dtype)
        for out, (rows, _) in zip(embeddings, encoded):
            out[: len(rows)], out[len(rows) :] = rows[:width], rows[-1]
        return embeddings, np.array([min(length, width) for _, length in encoded], np.int32)

    def check(self, text: str, count: int, cut: bool):
        """Raises TextError for a text of `count` tokens that is over the limit and must not be cut."""
        if count > self.limit and not cut:
            raise TextError(
                f"The prompt {shown(text)} has {count} tokens, and the limit is {self.limit}: shorten it, or raise text.length."
            )


def make_encoder(text: config.Text, dim: int, shardings: Callable[[t5.Params], t5.Params] | None = None) -> Encoder:
    """The encoder of a config; with `text.cache`, one that looks texts up there and encodes those it does not find.

    dim: the model's `text_dim`; ConfigError when the encoder has another. shardings: gives the places of T5's parameters.
    """
    from radiance.text.cache import CachedEncoder  # which is an Encoder itself
    from radiance.text.random_t5 import RandomT5Encoder

    if text.encoder == "t5" and not text.file and not text.cache:
        raise config.ConfigError(
            "text.encoder=t5 needs T5's weights (text.file=FILE.safetensors or .gguf) or embeddings that `radiance encode` made (text.cache=FOLDER)."
        )
    encoder: Encoder | None = None
    if text.encoder == "hash":
        encoder = HashEncoder(dim, text.length)
    elif text.encoder == "random_t5":
        encoder = RandomT5Encoder(dim, text.length, text.dtype)
    elif text.file:
        encoder = T5Encoder(text.file, text.tokenizer, text.length, text.dtype, shardings)
    if text.cache:
        encoder = CachedEncoder(text.cache, text.encoder, text.length, encoder)
    if encoder.dim != dim:
        origin = text.file or text.cache
        raise config.ConfigError(
            f"{origin} gives embeddings of {encoder.dim} numbers, but model.text_dim is {dim}: set model.text_dim={encoder.dim}, or give another."
        )
    return encoder


def token_counter(text: config.Text) -> Callable[[str], int]:
    """`Encoder.count` of a config's encoder, for which T5's tokenizer alone will do. Raises ConfigError when there is not even that."""
    from radiance.text.cache import CachedEncoder  # which is an Encoder itself
    from radiance.text.random_t5 import RandomT5Encoder

    if text.encoder == "hash":
        return HashEncoder(1, text.length).count
    if text.encoder == "random_t5":
        return RandomT5Encoder(1, text.length).count
    if text.tokenizer:
        tokenizer = open_tokenizer(text.tokenizer)
        return lambda caption: len(tokenizer(caption))
    if text.file:
        return T5Encoder(text.file, limit=text.length).count
    if text.cache:
        return CachedEncoder(text.cache, text.encoder, text.length).count
    raise config.ConfigError(
        "text.encoder=t5 counts tokens with T5's tokenizer: give it as text.tokenizer (spiece.model or tokenizer.json), or change text.encoder."
    )


def bucket(tokens: int, limit: int, step: int = BUCKET) -> int:
    """The least multiple of `step` that holds that many tokens, at most the limit."""
    return min(-(-tokens // step) * step, limit)


def shown(text: str) -> str:
    """A text as an error names it."""
    return repr(text if len(text) <= 60 else text[:57] + "...")


def digest(*parts: object) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()


class HashEncoder(Encoder):
    """Each word, with its neighbours as n-grams, to fixed Gaussian vectors: any language, no vocabulary, nothing learned.

    Row i is the sum of the vectors of word i, of the pair before it and of the pair after it, scaled to unit variance. The pairs
    bind "red" to "square"; a bag of words cannot. Letters of scripts written without spaces are words of their own.
    The vectors come from NumPy's frozen legacy generator, so they are the same everywhere and always.
    """

    kind = "hash"
    END, PAD = "</s>", "<pad>"

    def __init__(self, dim: int, limit: int):
        self.dim, self.limit, self.dtype = dim, limit, DTYPES["float32"]
        self.identity = digest("hash", dim)

    @staticmethod
    def words(text: str) -> list[str]:
        text = unicodedata.normalize("NFKC", text).casefold()
        return re.findall(rf"[{UNSPACED}]|[^\W{UNSPACED}]+|[^\w\s]", text)

    def count(self, text: str) -> int:
        return len(self.words(text)) + 1

    def encode(self, texts: Sequence[str], cut: bool = False) -> list[Encoded]:
        return [self._encode(text, cut) for text in texts]

    @lru_cache(maxsize=4096)  # noqa: B019 — one encoder lives as long as its run
    def _encode(self, text: str, cut: bool) -> Encoded:
        words = self.words(text)
        self.check(text, len(words) + 1, cut)
        words = [*words[: self.limit - 1], self.END]
        grams = [[w, f"{a} {w}", f"{w} {b}"] for a, w, b in zip(["", *words], words, [*words[1:], ""])]
        rows = [sum(gaussian(g, self.dim) for g in row) / np.sqrt(3, dtype=np.float32) for row in grams]
        return Encoded(np.stack([*rows, gaussian(self.PAD, self.dim)][: self.limit]), len(words))


@lru_cache(maxsize=65536)
def gaussian(gram: str, dim: int) -> Float[np.ndarray, " d"]:
    """Numbers that the text alone decides, the same everywhere and always. Not to be written to."""
    seed = np.frombuffer(hashlib.blake2b(gram.encode(errors="surrogatepass"), digest_size=16).digest(), "<u4")
    return np.random.RandomState(seed).standard_normal(dim).astype(np.float32)


class NetworkEncoder(Encoder):
    """What runs T5's network. Texts of like length are encoded together, in arrays of few shapes; the weights are loaded by the
    first text. Safe to call from several threads, which take turns.

    A subclass gives `sizes`, `tokenizer` and `_load`, and calls this one's `__init__`.
    """

    sizes: t5.T5
    tokenizer: Callable[[str], list[int]]  # the end of the sequence last
    padding = 1  # rows of padding that are kept: `one_pad` sees one, and for `off` those behind repeat the last
    step = BUCKET

    def __init__(self):
        self._params: t5.Params | None = None
        self._turn = threading.Lock()

    def _load(self) -> t5.Params:
        raise NotImplementedError

    def count(self, text: str) -> int:
        return len(self.tokenizer(text))

    def encode(self, texts: Sequence[str], cut: bool = False) -> list[Encoded]:
        groups: dict[int, dict[str, list[int]]] = {}
        for text in texts:
            ids = self.tokenizer(text)
            self.check(text, len(ids), cut)
            ids = [*ids[:-1][: self.limit - 1], ids[-1]]
            groups.setdefault(bucket(len(ids) + self.padding, self.limit, self.step), {})[text] = ids
        found: dict[str, Encoded] = {}
        with self._turn:
            for width, ids in sorted(groups.items()):
                size, members = max(TOKENS // width, 1), list(ids)
                for start in range(0, len(members), size):
                    part = members[start : start + size]
                    found |= zip(part, self._run([ids[text] for text in part], width))
        return [found[text] for text in texts]

    def _run(self, texts: list[list[int]], width: int) -> list[Encoded]:
        """Of texts that fit into `width`; their number is filled up to a power of two."""
        if self._params is None:
            self._params = self._load()
        ids = np.full((1 << (len(texts) - 1).bit_length(), width), PAD, np.int32)
        lengths = np.ones(len(ids), np.int32)
        for row, text in enumerate(texts):
            ids[row, : len(text)], lengths[row] = text, len(text)
        rows = np.asarray(t5.encode(self.sizes, self.dtype.name, self._params, ids, lengths))
        return [Encoded(row[: length + self.padding], int(length)) for row, length in zip(rows, lengths[: len(texts)])]


class T5Encoder(NetworkEncoder):
    """T5 v1.1's last layer, its padding masked as Chroma's is (FLUX's own pipelines let T5 read the padding).

    The file's header and the tokenizer are read at once, and their faults told.
    """

    kind = "t5"

    def __init__(
        self,
        file: str | Path,
        tokenizer: str | Path = "",
        limit: int = 512,
        dtype: str = "bfloat16",
        shardings: Callable[[t5.Params], t5.Params] | None = None,
    ):
        super().__init__()
        self.weights = t5.Weights(Path(file).expanduser())
        self.sizes = self.weights.t5
        self.tokenizer = open_tokenizer(tokenizer or self.weights.file.path.parent)
        if self.tokenizer.size > self.sizes.vocabulary:
            raise config.ConfigError(
                f"{self.tokenizer.path} has {self.tokenizer.size} tokens, and {self.weights.file.path} vectors for {self.sizes.vocabulary}: "
                "give the tokenizer of that model as text.tokenizer."
            )
        self.dim, self.limit, self.dtype = self.sizes.hidden, limit, DTYPES[dtype]
        self.identity = digest("t5", self.weights.fingerprint(), self.tokenizer.identity, dtype)
        self._shardings = shardings

    def _load(self) -> t5.Params:
        return self.weights.load(self.dtype.name, self._shardings)
