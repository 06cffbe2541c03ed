"""Embeddings of a dataset's captions on disk: encoded once, then looked up.

A folder holds `manifest.json`, which describes the encoder, and shards: safetensors files of about
256 MB with the hashes and token counts of captions and their concatenated rows. Only the rows of
the real tokens and of one padding token are stored, because the transformer sees no others; the
rest would be most of the volume. They are stored bit for bit as the encoder computes them, bfloat16
for T5.

Every host writes its own shards, and a shard appears only when it is complete: a killed job loses
at most the shard that it was filling, and no host waits for another.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from radiance.base.errors import CheckpointError, ConfigError, TextError
from radiance.base.files import replace_atomically
from radiance.base.locks import LOCK_NAME, hold_lock
from radiance.base.text_files import quote_text
from radiance.text.encoder import TextEmbedding, TextEncoder
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors
from radiance.weights.tensors import DTYPES, is_finite

FORMAT = "radiance text embeddings 1"
MANIFEST = "manifest.json"
METADATA_KEY = "radiance.embeddings"
MANIFEST_TYPES = {
    "format": str,
    "encoder": str,
    "identity": str,
    "max_length": int,
    "dim": int,
    "dtype": str,
}
SHARD_BYTES = 256_000_000  # bytes
ENCODING_BATCH_SIZE = 256  # captions in a call of the encoder
REMEDY = "remove it and run `radiance encode` again"
CACHE_REMEDY = "set another text.cache, or encode again"

CaptionHash = UInt64[np.ndarray, "2"]

# --- writing --------------------------------------------------------------------------------------


class EncodingCounts(NamedTuple):
    """Numbers of captions of one host, the empty prompt included.

    Attributes:
        num_encoded: Captions that were encoded.
        num_cached: Captions that were in the cache, or occurred before.
        num_truncated: Encoded captions that were longer than the maximum.
    """

    num_encoded: int
    num_cached: int
    num_truncated: int


def encode_captions(
    captions: Iterable[str],
    encoder: TextEncoder,
    cache_dir: str | Path,
    host_index: int = 0,
    num_hosts: int = 1,
    report_progress: Callable[[int], Any] = lambda num_captions: None,
) -> EncodingCounts:
    """Encode the captions that the cache does not hold yet; long captions are cut, as in training.

    The empty prompt is always encoded, because caption dropout and guidance need it. Every host
    receives all captions, and encodes those whose hash selects it.

    Args:
        captions: All captions of the dataset.
        encoder: The text encoder.
        cache_dir: Folder of the cache.
        host_index: Index of this host.
        num_hosts: Number of hosts.
        report_progress: Called with the number of captions that were just done.

    Returns:
        Numbers of captions of this host.

    Raises:
        ConfigError: If another encoder or maximum length made the folder.
        CheckpointError: If a shard is damaged.
        TextError: If the encoder computes values that are not finite.
        OutputError: If another process encodes as the same host.
    """
    lock_path = Path(cache_dir).expanduser() / f".{host_index:05d}{LOCK_NAME}"
    remedy = "Wait until it ends; processes that share the captions need different --host."
    with hold_lock(lock_path, str(cache_dir), remedy):
        writer = _CacheWriter(encoder, cache_dir, host_index, num_hosts, report_progress)
        for caption in chain([""], captions):
            writer.add_caption(caption)
        return writer.finish()


class _CacheWriter:
    """Encodes this host's new captions in batches, and writes them to shards."""

    def __init__(
        self,
        encoder: TextEncoder,
        cache_dir: str | Path,
        host_index: int,
        num_hosts: int,
        report_progress: Callable[[int], Any],
    ):
        self.encoder, self.host_index, self.num_hosts = encoder, host_index, num_hosts
        self.report_progress = report_progress
        cache_dir = Path(cache_dir).expanduser()
        manifest = _prepare_cache(cache_dir, encoder, host_index)
        self.seen_hashes = {
            caption_hash.tobytes()
            for shard in _read_shards(cache_dir, manifest)
            for caption_hash in shard.hashes
            if self._is_own(caption_hash)
        }
        self.shard_writer = _ShardWriter(cache_dir, host_index, manifest)
        self.pending: dict[bytes, str] = {}  # captions of the next batch by hash
        self.num_encoded = self.num_cached = self.num_truncated = 0

    def _is_own(self, caption_hash: CaptionHash) -> bool:
        return int(caption_hash[0]) % self.num_hosts == self.host_index

    def add_caption(self, caption: str):
        """Encode a caption, at once or in a later batch, if it is this host's and new."""
        caption_hash = _hash_caption(caption)
        if not self._is_own(caption_hash):
            return
        hash_bytes = caption_hash.tobytes()
        if hash_bytes in self.seen_hashes:
            self.num_cached += 1
            self.report_progress(1)
            return
        self.seen_hashes.add(hash_bytes)
        self.pending[hash_bytes] = caption
        if len(self.pending) == ENCODING_BATCH_SIZE:
            self._encode_pending()

    def finish(self) -> EncodingCounts:
        """Encode and write the remaining captions."""
        self._encode_pending()
        self.shard_writer.flush()
        return EncodingCounts(self.num_encoded, self.num_cached, self.num_truncated)

    def _encode_pending(self):
        embeddings = self.encoder.encode(list(self.pending.values()), truncate=True)
        for (hash_bytes, caption), embedding in zip(self.pending.items(), embeddings):
            if not is_finite(embedding.rows):
                raise TextError(
                    "The encoder computes values that are not finite for the caption "
                    f"{quote_text(caption)}, so its weights are damaged: download them again."
                )
            num_tokens = self.encoder.count_tokens(caption)
            self.shard_writer.add_embedding(hash_bytes, num_tokens, embedding.rows)
            self.num_truncated += num_tokens > self.encoder.max_length
        self.num_encoded += len(self.pending)
        self.report_progress(len(self.pending))
        self.pending.clear()


def _prepare_cache(cache_dir: Path, encoder: TextEncoder, host_index: int) -> dict[str, Any]:
    """Check the manifest, which the first host writes, and remove this host's partial shards."""
    manifest = {"format": FORMAT, **_describe_encoder(encoder)}
    if (cache_dir / MANIFEST).is_file():
        check_manifest(cache_dir, _read_manifest(cache_dir), encoder)
    elif host_index == 0:
        with replace_atomically(cache_dir / MANIFEST) as temporary_path:
            temporary_path.write_text(json.dumps(manifest, indent=2) + "\n")
    for temporary_path in cache_dir.glob(f".{host_index:05d}-*.part"):  # of a job that was killed
        temporary_path.unlink()
    return manifest


def _describe_encoder(encoder: TextEncoder) -> dict[str, Any]:
    return {
        "encoder": encoder.kind,
        "identity": encoder.identity,
        "max_length": encoder.max_length,
        "dim": encoder.dim,
        "dtype": encoder.dtype.name,
    }


def _hash_caption(caption: str) -> CaptionHash:
    return np.frombuffer(
        hashlib.blake2b(caption.encode(errors="surrogatepass"), digest_size=16).digest(), "<u8"
    )


class _ShardWriter:
    """Collects embeddings, and writes a shard when they are large enough."""

    def __init__(self, cache_dir: Path, host_index: int, manifest: dict[str, Any]):
        self.cache_dir, self.host_index, self.manifest = cache_dir, host_index, manifest
        self._clear()

    def _clear(self):
        self.hashes, self.token_counts, self.rows, self.num_bytes = [], [], [], 0

    def add_embedding(self, hash_bytes: bytes, num_tokens: int, rows: np.ndarray):
        self.hashes.append(np.frombuffer(hash_bytes, "<i8"))
        self.token_counts.append(num_tokens)
        self.rows.append(rows.copy())  # rows are a view of a batch, which is larger
        self.num_bytes += rows.nbytes
        if self.num_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self):
        """Write the collected embeddings; the name of a shard is a hash of its captions."""
        if not self.hashes:
            return
        tensors = {
            "keys": np.stack(self.hashes),
            "counts": np.array(self.token_counts, np.int64),
            "rows": np.concatenate(self.rows),
        }
        name = hashlib.blake2b(tensors["keys"].tobytes(), digest_size=8).hexdigest()
        write_safetensors(
            self.cache_dir / f"{self.host_index:05d}-{name}.safetensors",
            {key: x.shape for key, x in tensors.items()},
            {key: x.dtype for key, x in tensors.items()},
            tensors.__getitem__,
            {METADATA_KEY: json.dumps(self.manifest)},
        )
        self._clear()


# --- reading --------------------------------------------------------------------------------------


class EmbeddingShard(NamedTuple):
    """The index of one shard.

    Attributes:
        path: The safetensors file.
        hashes: Hashes of the captions.
        token_counts: Tokens of the captions, without a maximum.
        row_offsets: Offsets of their rows in the file, in bytes.
    """

    path: Path
    hashes: UInt64[np.ndarray, "n 2"]
    token_counts: Int64[np.ndarray, " n"]
    row_offsets: Int64[np.ndarray, " n"]


def _read_manifest(cache_dir: Path) -> dict[str, Any]:
    """Read and check the manifest of a cache."""
    path = cache_dir / MANIFEST
    if not path.is_file():
        raise ConfigError(
            f"{cache_dir} holds no embeddings (it has no {MANIFEST}): make them with "
            "`radiance encode`."
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
        types = {key: type(value) for key, value in manifest.items()}
        if types != MANIFEST_TYPES or manifest["dtype"] not in DTYPES:
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: {REMEDY}.") from None
    if manifest["format"] != FORMAT:
        raise ConfigError(
            f"{cache_dir} holds {manifest['format']!r}, and this version reads {FORMAT!r}: "
            f"{REMEDY}."
        )
    return manifest


def check_manifest(cache_dir: Path, manifest: dict[str, Any], encoder: TextEncoder):
    """Check that an encoder computes the embeddings of a cache.

    Args:
        cache_dir: Folder of the cache, for messages.
        manifest: Its manifest.
        encoder: The text encoder.

    Raises:
        ConfigError: If it is another encoder, or has another maximum length.
    """
    for key, setting in (("max_length", "text.max_length"), ("encoder", "text.encoder")):
        value = _describe_encoder(encoder)[key]
        if manifest[key] != value:
            raise ConfigError(
                f"{cache_dir} was made with {setting}={manifest[key]}, and it is {value} now: "
                f"{CACHE_REMEDY}."
            )
    if any(manifest[key] != value for key, value in _describe_encoder(encoder).items()):
        raise ConfigError(
            f"{cache_dir} was made by another text encoder (other weights, tokenizer or dtype): "
            f"{CACHE_REMEDY}."
        )


def _read_shards(cache_dir: Path, manifest: dict[str, Any]) -> Iterator[EmbeddingShard]:
    """Read the indexes of all shards, and check them against the manifest and the files' sizes."""
    max_length, row_bytes = manifest["max_length"], _row_bytes(manifest)
    for path in sorted(cache_dir.glob("*.safetensors")):
        damage_error = CheckpointError(f"{path} is not a complete shard of embeddings: {REMEDY}.")
        try:
            file = open_tensors(path)
            shard_manifest = json.loads(file.metadata[METADATA_KEY])
            hashes, token_counts = file["keys"].view("<u8"), file["counts"]
            rows_location = file.locations["rows"]
        except (CheckpointError, KeyError, ValueError, RecursionError):
            raise damage_error from None
        if shard_manifest != manifest:
            raise ConfigError(
                f"{path} was made by another text encoder, or with another maximum length, than "
                f"the rest of {cache_dir}: {REMEDY}."
            )
        num_rows = np.minimum(np.minimum(token_counts, max_length) + 1, max_length)
        if (
            hashes.shape != (len(token_counts), 2)
            or token_counts.min(initial=1) < 1
            or num_rows.sum() * row_bytes != rows_location.nbytes
        ):
            raise damage_error
        row_offsets = rows_location.offset + row_bytes * (np.cumsum(num_rows) - num_rows)
        yield EmbeddingShard(path, hashes, token_counts, row_offsets)


def _row_bytes(manifest: dict[str, Any]) -> int:
    return manifest["dim"] * DTYPES[manifest["dtype"]].itemsize


class CachedEncoder(TextEncoder):
    """Looks embeddings up in a folder of `encode_captions`, and gives other texts to a fallback.

    The index takes 36 bytes per caption in memory; rows are read from disk at each call.

    Args:
        cache_dir: Folder of the cache.
        kind: The setting `text.encoder`.
        max_length: Maximum number of tokens.
        fallback: Encoder of texts that are not in the cache.

    Raises:
        ConfigError: If another kind of encoder, another maximum length, or another encoder than
            `fallback` made the folder.
        CheckpointError: If the folder is damaged.
        TextError: When a text is encoded that is not in the cache, and there is no fallback.
    """

    def __init__(
        self, cache_dir: str | Path, kind: str, max_length: int, fallback: TextEncoder | None = None
    ):
        self.cache_dir, self.kind = Path(cache_dir).expanduser(), kind
        self.max_length, self.fallback = max_length, fallback
        manifest = _read_manifest(self.cache_dir)
        self.identity, self.dim = manifest["identity"], manifest["dim"]
        self.dtype = DTYPES[manifest["dtype"]]
        check_manifest(self.cache_dir, manifest, fallback or self)

        # One index of all shards, sorted by the halves of the hashes
        shards = list(_read_shards(self.cache_dir, manifest))
        self._shard_paths = [shard.path for shard in shards]
        no_hashes, no_counts = np.empty((0, 2), np.uint64), np.empty(0, np.int64)
        hashes = np.concatenate([no_hashes, *(shard.hashes for shard in shards)])
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        self._first_halves, self._second_halves = hashes[order, 0], hashes[order, 1]
        token_counts = np.concatenate([no_counts, *(shard.token_counts for shard in shards)])
        row_offsets = np.concatenate([no_counts, *(shard.row_offsets for shard in shards)])
        self._token_counts, self._row_offsets = token_counts[order], row_offsets[order]
        self._shard_indices = np.repeat(
            np.arange(len(shards), dtype=np.int32), [len(shard.token_counts) for shard in shards]
        )[order]

    def count_tokens(self, text: str) -> int:
        """Count the tokens of a text; see `TextEncoder.count_tokens`."""
        index = self._find_index(text)
        if index is None:
            return self._require_fallback(text).count_tokens(text)
        return int(self._token_counts[index])

    def encode(self, texts: Sequence[str], truncate: bool = False) -> list[TextEmbedding]:
        """Encode texts; see `TextEncoder.encode`."""
        indices = {text: self._find_index(text) for text in texts}
        embeddings: dict[str, TextEmbedding] = {}
        missing_texts = [text for text, index in indices.items() if index is None]
        if missing_texts:
            fallback = self._require_fallback(missing_texts[0])
            embeddings |= zip(missing_texts, fallback.encode(missing_texts, truncate))
        for text, index in indices.items():
            if index is not None:
                self.check_length(text, int(self._token_counts[index]), truncate)
                embeddings[text] = self._read_embedding(index)
        return [embeddings[text] for text in texts]

    def _find_index(self, text: str) -> int | None:
        """Find the position of a text in the index."""
        first_half, second_half = _hash_caption(text)
        low, high = (
            np.searchsorted(self._first_halves, first_half, side) for side in ("left", "right")
        )
        return next((i for i in range(low, high) if self._second_halves[i] == second_half), None)

    def _require_fallback(self, text: str) -> TextEncoder:
        if self.fallback is None:
            raise TextError(
                f"{quote_text(text)} is not among the embeddings in {self.cache_dir}: run "
                "`radiance encode` for it, or set text.file to T5's weights."
            )
        return self.fallback

    def _read_embedding(self, index: int) -> TextEmbedding:
        """Read the rows of a caption; the file is opened for each, as shards may be thousands."""
        path = self._shard_paths[self._shard_indices[index]]
        length = min(int(self._token_counts[index]), self.max_length)
        num_bytes = min(length + 1, self.max_length) * self.dim * self.dtype.itemsize
        data = np.fromfile(path, np.uint8, num_bytes, offset=self._row_offsets[index])
        if len(data) < num_bytes:
            raise CheckpointError(f"{path} became shorter while it was read: {REMEDY}.")
        return TextEmbedding(data.view(self.dtype).reshape(-1, self.dim), length)
