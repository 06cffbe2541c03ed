"""Text encoders that run a T5 network."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from radiance.base.errors import ConfigError
from radiance.base.hashing import hash_parts
from radiance.text import t5
from radiance.text.encoder import LENGTH_STEP, TextEmbedding, TextEncoder, round_up_length
from radiance.text.t5_weights import SENTENCEPIECE_NAME, T5Weights
from radiance.text.tokenizers import PAD_ID, Tokenizer, open_tokenizer, parse_tokenizer
from radiance.weights.tensors import DTYPES

MIN_USED_FRACTION = 0.5  # of the network's vectors; T5's tokenizer uses 32100 of 32128
MAX_BATCH_TOKENS = 4096  # tokens of a batch; the attention of 64 heads then takes 0.5 GB at most


class BaseT5Encoder(TextEncoder):
    """Base of the encoders that run T5.

    Texts of similar length are encoded together, in arrays of few shapes; the first text loads the
    weights. Threads may share an encoder; they take turns. A subclass sets `sizes` and `tokenizer`,
    has `_load_params`, and calls `__init__` of this class.

    Attributes:
        sizes: Sizes of the network.
        tokenizer: Function from a text to token ids, end-of-sequence last.
        num_padding_rows: Rows of padding that are kept: "one_pad" sees one, and for masking "off"
            later rows repeat the last one.
        length_step: Texts are padded to multiples of it.
    """

    sizes: t5.T5
    tokenizer: Callable[[str], list[int]]
    num_padding_rows = 1
    length_step = LENGTH_STEP

    def __init__(self):
        self._params: t5.Params | None = None
        self._lock = threading.Lock()

    def _load_params(self) -> t5.Params:
        raise NotImplementedError

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text; see `TextEncoder.count_tokens`."""
        return len(self.tokenizer(text))

    def encode(self, texts: Sequence[str], truncate: bool = False) -> list[TextEmbedding]:
        """Encode texts; see `TextEncoder.encode`."""
        # Group the texts by padded length
        ids_by_length: dict[int, dict[str, list[int]]] = {}
        for text in texts:
            ids = self.tokenizer(text)
            self.check_length(text, len(ids), truncate)
            ids = [*ids[:-1][: self.max_length - 1], ids[-1]]
            num_rows = len(ids) + self.num_padding_rows
            padded_length = int(round_up_length(num_rows, self.max_length, self.length_step))
            ids_by_length.setdefault(padded_length, {})[text] = ids

        # Encode the groups in batches
        embeddings: dict[str, TextEmbedding] = {}
        with self._lock:
            for padded_length, ids_by_text in sorted(ids_by_length.items()):
                batch_size = max(MAX_BATCH_TOKENS // padded_length, 1)
                group_texts, group_ids = list(ids_by_text), list(ids_by_text.values())
                for start in range(0, len(group_texts), batch_size):
                    rows = slice(start, start + batch_size)
                    batch_embeddings = self._encode_ids(group_ids[rows], padded_length)
                    embeddings |= zip(group_texts[rows], batch_embeddings)
        return [embeddings[text] for text in texts]

    def _encode_ids(self, token_ids: list[list[int]], padded_length: int) -> list[TextEmbedding]:
        """Encode texts of at most `padded_length` tokens; the batch is padded to a power of two."""
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
    """The encoder of T5 v1.1, with masked padding as in Chroma (in FLUX's pipelines T5 sees it).

    The file's header and the tokenizer are read at once.

    Args:
        file: T5's weights, a file or a folder.
        tokenizer: A tokenizer's file or folder; by default the one in the weights' file, or beside
            it.
        max_length: Maximum number of tokens.
        dtype: Type of weights and products.
        shardings: Function from the parameters' shapes to their shardings.

    Raises:
        CheckpointError: If the weights or the tokenizer cannot be read.
        ConfigError: If the tokenizer has more tokens than the network, or far fewer.
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
        self.weights = T5Weights(Path(file).expanduser())
        self.sizes = self.weights.sizes
        opened_tokenizer = _open_tokenizer_for(self.weights, tokenizer)
        num_tokens, num_vectors = opened_tokenizer.vocab_size, self.sizes.vocabulary
        if not MIN_USED_FRACTION * num_vectors <= num_tokens <= num_vectors:
            raise ConfigError(
                f"{opened_tokenizer.origin} has {num_tokens} tokens, and "
                f"{self.weights.file.path} vectors for {num_vectors}: set text.tokenizer to the "
                "tokenizer of that model."
            )
        self.tokenizer = opened_tokenizer
        self.dim, self.max_length, self.dtype = self.sizes.hidden, max_length, DTYPES[dtype]
        self.identity = hash_parts(
            "t5", self.weights.fingerprint(), opened_tokenizer.identity, dtype
        )
        self._shardings = shardings

    def _load_params(self) -> t5.Params:
        return self.weights.load_params(self.dtype.name, self._shardings)


def _open_tokenizer_for(weights: T5Weights, tokenizer: str | Path) -> Tokenizer:
    """Open the given tokenizer, that in the weights' file, or the one beside it."""
    path = weights.file.path
    content = None if tokenizer else weights.read_sentencepiece()
    if content is not None:
        return parse_tokenizer(content, f"{SENTENCEPIECE_NAME} in {path}")
    return open_tokenizer(tokenizer or path.parent)
