"""Embeddings of a data set's captions on disk: encoded once, then looked up.

A folder holds `manifest.json`, which says what made the embeddings, and shards: safetensors files of about 256 MB with the
hashes and token counts of their captions and, end to end, the rows of all. Kept are the rows of the real tokens and of one padding
token, for this is what the transformer sees of a text; the others would be most of the volume. They are kept as the encoder gave
them, bit by bit, bfloat16 for T5.

Every host writes shards of its own, each of which appears only when it is whole: a killed job loses at most the shard that it
was filling, and no host waits for another.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from radiance import config
from radiance.base.errors import CheckpointError, TextError
from radiance.base.files import replace_atomically
from radiance.text.encoder import TextEmbedding, TextEncoder, quote_text
from radiance.weights.opening import open_tensors
from radiance.weights.safetensors import write_safetensors
from radiance.weights.tensors import DTYPES, is_finite

FORMAT = "radiance text embeddings 1"
MANIFEST = "manifest.json"
METADATA_KEY = "radiance.embeddings"
SHARD_BYTES = 256_000_000  # bytes
ENCODING_BATCH_SIZE = 256  # captions that are given to the encoder at a time
REMEDY = "remove it and run `radiance encode` again"


class EncodingCounts(NamedTuple):
    """Of one host's share of the captions, the empty prompt included."""

    num_encoded: int
    num_cached: int  # in the cache before, or given more than once
    num_truncated: int  # of those encoded, over the limit


def encode_captions(
    captions: Iterable[str],
    encoder: TextEncoder,
    cache_dir: str | Path,
    host_index: int = 0,
    num_hosts: int = 1,
    report_progress: Callable[[int], Any] = lambda captions: None,
) -> EncodingCounts:
    """Encodes what the cache in `folder` does not hold yet; captions over the limit are cut, as in training.

    The empty prompt is always among them: caption dropout and guidance need it. Every host is given all captions, and encodes
    those whose hash falls to it. progress: is called with the number of captions just done.

    Raises ConfigError when the folder was made by another encoder or with another limit, CheckpointError when a shard is damaged,
    and TextError when the encoder gives values that are not finite.
    """
    cache_dir = Path(cache_dir).expanduser()
    manifest = _prepare_cache(cache_dir, encoder, host_index)
    seen_keys = {
        key.tobytes()
        for shard in _read_shards(cache_dir, manifest)
        for key in shard.keys
        if _host_of_key(key, num_hosts) == host_index
    }
    writer = _ShardWriter(cache_dir, host_index, manifest)
    pending: dict[bytes, str] = {}
    num_encoded = num_cached = num_truncated = 0

    def encode_pending():
        nonlocal num_encoded, num_truncated
        for (key, caption), embedding in zip(
            pending.items(), encoder.encode(list(pending.values()), truncate=True)
        ):
            if not is_finite(embedding.rows):
                raise TextError(
                    f"The encoder gives values that are not finite for the caption {quote_text(caption)}: its weights are damaged."
                )
            num_tokens = encoder.count_tokens(caption)
            writer.add_caption(key, num_tokens, embedding.rows)
            num_truncated += num_tokens > encoder.max_length
        num_encoded += len(pending)
        report_progress(len(pending))
        pending.clear()

    for caption in chain([""], captions):
        key = _hash_caption(caption)
        if _host_of_key(key, num_hosts) != host_index:
            continue
        if key.tobytes() in seen_keys:
            num_cached += 1
            report_progress(1)
            continue
        seen_keys.add(key.tobytes())
        pending[key.tobytes()] = caption
        if len(pending) == ENCODING_BATCH_SIZE:
            encode_pending()
    encode_pending()
    writer.flush()
    return EncodingCounts(num_encoded, num_cached, num_truncated)


def _prepare_cache(cache_dir: Path, encoder: TextEncoder, host_index: int) -> dict[str, Any]:
    """The manifest of a folder that `host` may write to; the first host also writes it down."""
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
        "limit": encoder.max_length,
        "dim": encoder.dim,
        "dtype": encoder.dtype.name,
    }


def _hash_caption(caption: str) -> UInt64[np.ndarray, "2"]:
    return np.frombuffer(
        hashlib.blake2b(caption.encode(errors="surrogatepass"), digest_size=16).digest(), "<u8"
    )


def _host_of_key(key: UInt64[np.ndarray, "2"], num_hosts: int) -> int:
    return int(key[0]) % num_hosts


class _ShardWriter:
    """Gathers captions and writes them out, a shard at a time. A shard is named after its captions."""

    def __init__(self, cache_dir: Path, host_index: int, manifest: dict[str, Any]):
        self.cache_dir, self.host_index, self.manifest = cache_dir, host_index, manifest
        self.keys, self.token_counts, self.rows, self.num_bytes = [], [], [], 0

    def add_caption(self, key: bytes, num_tokens: int, rows: np.ndarray):
        self.keys.append(np.frombuffer(key, "<i8"))
        self.token_counts.append(num_tokens)
        self.rows.append(rows.copy())  # they are a view of a batch, which is larger
        self.num_bytes += rows.nbytes
        if self.num_bytes >= SHARD_BYTES:
            self.flush()

    def flush(self):
        if not self.keys:
            return
        tensors = {
            "keys": np.stack(self.keys),
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
        self.keys, self.token_counts, self.rows, self.num_bytes = [], [], [], 0


# --- reading ----------------------------------------------------------------------------------------------------------


class EmbeddingShard(NamedTuple):
    path: Path
    keys: UInt64[np.ndarray, "n 2"]
    token_counts: Int64[np.ndarray, " n"]  # tokens of the captions, without a limit
    row_offsets: Int64[np.ndarray, " n"]  # of their rows in the file, in bytes


def _read_manifest(cache_dir: Path) -> dict[str, Any]:
    path = cache_dir / MANIFEST
    if not path.is_file():
        raise config.ConfigError(
            f"{cache_dir} holds no embeddings (it has no {MANIFEST}): make them with `radiance encode`."
        )
    try:
        manifest = json.loads(path.read_text())
        field_types = {
            "format": str,
            "encoder": str,
            "identity": str,
            "limit": int,
            "dim": int,
            "dtype": str,
        }
        if {key: type(value) for key, value in manifest.items()} != field_types or manifest[
            "dtype"
        ] not in DTYPES:
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: {REMEDY}.") from None
    if manifest["format"] != FORMAT:
        raise config.ConfigError(
            f"{cache_dir} holds {manifest['format']!r}, and this version reads {FORMAT!r}: {REMEDY}."
        )
    return manifest


def check_manifest(cache_dir: Path, manifest: dict[str, Any], encoder: TextEncoder):
    """Raises ConfigError when the embeddings in `folder` are not those that `encoder` gives."""
    if manifest["limit"] != encoder.max_length:
        raise config.ConfigError(
            f"{cache_dir} was made with text.max_length={manifest['limit']}, and it is {encoder.max_length} now: give another text.cache, or encode again."
        )
    if manifest["encoder"] != encoder.kind:
        raise config.ConfigError(
            f"{cache_dir} was made with text.encoder={manifest['encoder']}, and it is {encoder.kind} now: give another text.cache, or encode again."
        )
    if any(manifest[key] != value for key, value in _describe_encoder(encoder).items()):
        raise config.ConfigError(
            f"{cache_dir} was made by another text encoder (other weights, tokenizer or dtype): give another text.cache, or encode again."
        )


def _read_shards(cache_dir: Path, manifest: dict[str, Any]) -> Iterator[EmbeddingShard]:
    """All shards of the folder, checked against their own index and the manifest."""
    max_length, row_bytes = manifest["limit"], manifest["dim"] * DTYPES[manifest["dtype"]].itemsize
    for path in sorted(cache_dir.glob("*.safetensors")):
        damage_error = CheckpointError(f"{path} is not a whole shard of embeddings: {REMEDY}.")
        try:
            file = open_tensors(path)
            shard_manifest = json.loads(file.metadata[METADATA_KEY])
            keys, token_counts, rows_location = (
                file["keys"].view("<u8"),
                file["counts"],
                file.locations["rows"],
            )
        except (CheckpointError, KeyError, ValueError, RecursionError):
            raise damage_error from None
        if shard_manifest != manifest:
            raise config.ConfigError(
                f"{path} was made by another text encoder or with another limit than the rest of {cache_dir}: {REMEDY}."
            )
        num_rows = np.minimum(np.minimum(token_counts, max_length) + 1, max_length)
        if (
            keys.shape != (len(token_counts), 2)
            or token_counts.min(initial=1) < 1
            or num_rows.sum() * row_bytes != rows_location.nbytes
        ):
            raise damage_error
        yield EmbeddingShard(
            path,
            keys,
            token_counts,
            rows_location.offset + row_bytes * (np.cumsum(num_rows) - num_rows),
        )


class CachedEncoder(TextEncoder):
    """Looks embeddings up in a folder that `encode_captions` filled, and gives other texts to `fallback`.

    Memory holds 36 bytes a caption; rows are read from disk when asked for. Raises ConfigError when the folder is of another
    kind of encoder or limit, or was not made by `fallback`, CheckpointError when it is damaged, and TextError for a text that is not in it when there is
    no `fallback`.
    """

    def __init__(
        self, cache_dir: str | Path, kind: str, max_length: int, fallback: TextEncoder | None = None
    ):
        self.cache_dir, self.kind, self.max_length, self.fallback = (
            Path(cache_dir).expanduser(),
            kind,
            max_length,
            fallback,
        )
        manifest = _read_manifest(self.cache_dir)
        self.identity, self.dim, self.dtype = (
            manifest["identity"],
            manifest["dim"],
            DTYPES[manifest["dtype"]],
        )
        check_manifest(self.cache_dir, manifest, fallback or self)
        shards = list(_read_shards(self.cache_dir, manifest))
        self._shard_paths = [shard.path for shard in shards]
        empty_shard = EmbeddingShard(
            self.cache_dir,
            np.empty((0, 2), np.uint64),
            np.empty(0, np.int64),
            np.empty(0, np.int64),
        )
        keys, token_counts, row_offsets = (
            np.concatenate(shard_columns)
            for shard_columns in zip(*(shard[1:] for shard in [empty_shard, *shards]))
        )
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        self._first_halves, self._second_halves = keys[order, 0], keys[order, 1]
        self._token_counts, self._row_offsets = token_counts[order], row_offsets[order]
        self._shard_indices = np.repeat(
            np.arange(len(shards), dtype=np.int32), [len(shard.token_counts) for shard in shards]
        )[order]

    def _find_index(self, text: str) -> int | None:
        """The place of a text in the index."""
        first_half, second_half = _hash_caption(text)
        low, high = (
            np.searchsorted(self._first_halves, first_half, side) for side in ("left", "right")
        )
        return next((i for i in range(low, high) if self._second_halves[i] == second_half), None)

    def count_tokens(self, text: str) -> int:
        index = self._find_index(text)
        return (
            self._require_fallback(text).count_tokens(text)
            if index is None
            else int(self._token_counts[index])
        )

    def encode(self, texts: Sequence[str], truncate: bool = False) -> list[TextEmbedding]:
        indices = {text: self._find_index(text) for text in texts}
        missing_texts = [text for text, index in indices.items() if index is None]
        embeddings = (
            dict(
                zip(
                    missing_texts,
                    self._require_fallback(missing_texts[0]).encode(missing_texts, truncate),
                )
            )
            if missing_texts
            else {}
        )
        for text, index in indices.items():
            if index is not None:
                self.check_length(text, int(self._token_counts[index]), truncate)
                embeddings[text] = self._read_embedding(index)
        return [embeddings[text] for text in texts]

    def _require_fallback(self, text: str) -> TextEncoder:
        if self.fallback is None:
            raise TextError(
                f"{quote_text(text)} is not among the embeddings in {self.cache_dir}: run `radiance encode` for it, or give text.file, T5's weights."
            )
        return self.fallback

    def _read_embedding(self, index: int) -> TextEmbedding:
        path, length = (
            self._shard_paths[self._shard_indices[index]],
            min(int(self._token_counts[index]), self.max_length),
        )
        num_bytes = min(length + 1, self.max_length) * self.dim * self.dtype.itemsize
        # Opened for each read: thousands of shards would be thousands of open files.
        data = np.fromfile(path, np.uint8, num_bytes, offset=self._row_offsets[index])
        if len(data) < num_bytes:
            raise CheckpointError(f"{path} became shorter while it was read: {REMEDY}.")
        return TextEmbedding(data.view(self.dtype).reshape(-1, self.dim), length)
