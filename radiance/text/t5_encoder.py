"""Text encoders that run a T5 network."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from radiance import config
from radiance.base.hashing import hash_parts
from radiance.text import t5
from radiance.text.encoder import LENGTH_STEP, TextEmbedding, TextEncoder, round_up_length
from radiance.text.tokenizers import PAD_ID, open_tokenizer
from radiance.weights.tensors import DTYPES

MAX_BATCH_TOKENS = (
    4096  # of a batch of T5; the attention of 64 heads then takes at most half a gigabyte
)


class BaseT5Encoder(TextEncoder):
    """What runs T5's network. Texts of like length are encoded together, in arrays of few shapes; the weights are loaded by the
    first text. Safe to call from several threads, which take turns.

    A subclass gives `sizes`, `tokenizer` and `_load`, and calls this one's `__init__`.
    """

    sizes: t5.T5
    tokenizer: Callable[[str], list[int]]  # the end of the sequence last
    num_padding_rows = 1  # rows of padding that are kept: `one_pad` sees one, and for `off` those behind repeat the last
    length_step = LENGTH_STEP

    def __init__(self):
        self._params: t5.Params | None = None
        self._lock = threading.Lock()

    def _load_params(self) -> t5.Params:
        raise NotImplementedError

    def count_tokens(self, text: str) -> int:
        return len(self.tokenizer(text))

    def encode(self, texts: Sequence[str], truncate: bool = False) -> list[TextEmbedding]:
        ids_by_length: dict[int, dict[str, list[int]]] = {}
        for text in texts:
            ids = self.tokenizer(text)
            self.check_length(text, len(ids), truncate)
            ids = [*ids[:-1][: self.max_length - 1], ids[-1]]
            ids_by_length.setdefault(
                round_up_length(
                    len(ids) + self.num_padding_rows, self.max_length, self.length_step
                ),
                {},
            )[text] = ids
        embeddings: dict[str, TextEmbedding] = {}
        with self._lock:
            for padded_length, ids in sorted(ids_by_length.items()):
                batch_size, group_texts = max(MAX_BATCH_TOKENS // padded_length, 1), list(ids)
                for start in range(0, len(group_texts), batch_size):
                    batch_texts = group_texts[start : start + batch_size]
                    embeddings |= zip(
                        batch_texts,
                        self._encode_ids([ids[text] for text in batch_texts], padded_length),
                    )
        return [embeddings[text] for text in texts]

    def _encode_ids(self, token_ids: list[list[int]], padded_length: int) -> list[TextEmbedding]:
        """Of texts that fit into `width`; their number is filled up to a power of two."""
        if self._params is None:
            self._params = self._load_params()
        ids = np.full((1 << (len(token_ids) - 1).bit_length(), padded_length), PAD_ID, np.int32)
        lengths = np.ones(len(ids), np.int32)
        for row, text_ids in enumerate(token_ids):
            ids[row, : len(text_ids)], lengths[row] = text_ids, len(text_ids)
        rows = np.asarray(t5.encode_ids(self.sizes, self.dtype.name, self._params, ids, lengths))
        return [
            TextEmbedding(row[: length + self.num_padding_rows], int(length))
            for row, length in zip(rows, lengths[: len(token_ids)])
        ]


class T5Encoder(BaseT5Encoder):
    """T5 v1.1's last layer, its padding masked as Chroma's is (FLUX's own pipelines let T5 read the padding).

    The file's header and the tokenizer are read at once, and their faults told.
    """

    kind = "t5"

    def __init__(
        self,
        file: str | Path,
        tokenizer: str | Path = "",
        max_length: int = 512,
        dtype: str = "bfloat16",
        shardings: Callable[[t5.Params], t5.Params] | None = None,
    ):
        super().__init__()
        self.weights = t5.T5Weights(Path(file).expanduser())
        self.sizes = self.weights.sizes
        self.tokenizer = open_tokenizer(tokenizer or self.weights.file.path.parent)
        if self.tokenizer.vocab_size > self.sizes.vocabulary:
            raise config.ConfigError(
                f"{self.tokenizer.path} has {self.tokenizer.vocab_size} tokens, and {self.weights.file.path} vectors for {self.sizes.vocabulary}: "
                "give the tokenizer of that model as text.tokenizer."
            )
        self.dim, self.max_length, self.dtype = self.sizes.hidden, max_length, DTYPES[dtype]
        self.identity = hash_parts("t5", self.weights.fingerprint(), self.tokenizer.identity, dtype)
        self._shardings = shardings

    def _load_params(self) -> t5.Params:
        return self.weights.load_params(self.dtype.name, self._shardings)
