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
from radiance.text.encoders import Encoded, Encoder, TextError, shown
from radiance.weights.files import DTYPES, CheckpointError, finite, open_tensors, replacing, write_safetensors

FORMAT = "radiance text embeddings 1"
MANIFEST = "manifest.json"
METADATA_KEY = "radiance.embeddings"
SHARD = 256_000_000  # bytes
CHUNK = 256  # captions that are given to the encoder at a time
AGAIN = "remove it and run `radiance encode` again"


class Counts(NamedTuple):
    """Of one host's share of the captions, the empty prompt included."""

    encoded: int
    already: int  # in the cache before, or given more than once
    cut: int  # of those encoded, over the limit


def encode_captions(
    captions: Iterable[str],
    encoder: Encoder,
    folder: str | Path,
    host: int = 0,
    hosts: int = 1,
    progress: Callable[[int], Any] = lambda captions: None,
) -> Counts:
    """Encodes what the cache in `folder` does not hold yet; captions over the limit are cut, as in training.

    The empty prompt is always among them: caption dropout and guidance need it. Every host is given all captions, and encodes
    those whose hash falls to it. progress: is called with the number of captions just done.

    Raises ConfigError when the folder was made by another encoder or with another limit, CheckpointError when a shard is damaged,
    and TextError when the encoder gives values that are not finite.
    """
    folder = Path(folder).expanduser()
    manifest = _prepare(folder, encoder, host)
    done = {key.tobytes() for shard in _shards(folder, manifest) for key in shard.keys if _falls_to(key, hosts) == host}
    writer = _Writer(folder, host, manifest)
    waiting: dict[bytes, str] = {}
    encoded = already = cut = 0

    def encode_waiting():
        nonlocal encoded, cut
        for (key, caption), found in zip(waiting.items(), encoder.encode(list(waiting.values()), cut=True)):
            if not finite(found.rows):
                raise TextError(f"The encoder gives values that are not finite for the caption {shown(caption)}: its weights are damaged.")
            count = encoder.count(caption)
            writer.add(key, count, found.rows)
            cut += count > encoder.limit
        encoded += len(waiting)
        progress(len(waiting))
        waiting.clear()

    for caption in chain([""], captions):
        key = _key(caption)
        if _falls_to(key, hosts) != host:
            continue
        if key.tobytes() in done:
            already += 1
            progress(1)
            continue
        done.add(key.tobytes())
        waiting[key.tobytes()] = caption
        if len(waiting) == CHUNK:
            encode_waiting()
    encode_waiting()
    writer.flush()
    return Counts(encoded, already, cut)


def _prepare(folder: Path, encoder: Encoder, host: int) -> dict[str, Any]:
    """The manifest of a folder that `host` may write to; the first host also writes it down."""
    manifest = {"format": FORMAT, **_described(encoder)}
    if (folder / MANIFEST).is_file():
        check_manifest(folder, _read_manifest(folder), encoder)
    elif host == 0:
        with replacing(folder / MANIFEST) as part:
            part.write_text(json.dumps(manifest, indent=2) + "\n")
    for part in folder.glob(f".{host:05d}-*.part"):  # of a job that was killed
        part.unlink()
    return manifest


def _described(encoder: Encoder) -> dict[str, Any]:
    return {"encoder": encoder.kind, "identity": encoder.identity, "limit": encoder.limit, "dim": encoder.dim, "dtype": encoder.dtype.name}


def _key(caption: str) -> UInt64[np.ndarray, "2"]:
    return np.frombuffer(hashlib.blake2b(caption.encode(errors="surrogatepass"), digest_size=16).digest(), "<u8")


def _falls_to(key: UInt64[np.ndarray, "2"], hosts: int) -> int:
    return int(key[0]) % hosts


class _Writer:
    """Gathers captions and writes them out, a shard at a time. A shard is named after its captions."""

    def __init__(self, folder: Path, host: int, manifest: dict[str, Any]):
        self.folder, self.host, self.manifest = folder, host, manifest
        self.keys, self.counts, self.rows, self.size = [], [], [], 0

    def add(self, key: bytes, count: int, rows: np.ndarray):
        self.keys.append(np.frombuffer(key, "<i8"))
        self.counts.append(count)
        self.rows.append(rows.copy())  # they are a view of a batch, which is larger
        self.size += rows.nbytes
        if self.size >= SHARD:
            self.flush()

    def flush(self):
        if not self.keys:
            return
        tensors = {"keys": np.stack(self.keys), "counts": np.array(self.counts, np.int64), "rows": np.concatenate(self.rows)}
        name = hashlib.blake2b(tensors["keys"].tobytes(), digest_size=8).hexdigest()
        write_safetensors(
            self.folder / f"{self.host:05d}-{name}.safetensors",
            {key: x.shape for key, x in tensors.items()},
            {key: x.dtype for key, x in tensors.items()},
            tensors.__getitem__,
            {METADATA_KEY: json.dumps(self.manifest)},
        )
        self.keys, self.counts, self.rows, self.size = [], [], [], 0


# --- reading ----------------------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    path: Path
    keys: UInt64[np.ndarray, "n 2"]
    counts: Int64[np.ndarray, " n"]  # tokens of the captions, without a limit
    starts: Int64[np.ndarray, " n"]  # of their rows in the file, in bytes


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise config.ConfigError(f"{folder} holds no embeddings (it has no {MANIFEST}): make them with `radiance encode`.")
    try:
        manifest = json.loads(path.read_text())
        kinds = {"format": str, "encoder": str, "identity": str, "limit": int, "dim": int, "dtype": str}
        if {key: type(value) for key, value in manifest.items()} != kinds or manifest["dtype"] not in DTYPES:
            raise ValueError
    except (ValueError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: {AGAIN}.") from None
    if manifest["format"] != FORMAT:
        raise config.ConfigError(f"{folder} holds {manifest['format']!r}, and this version reads {FORMAT!r}: {AGAIN}.")
    return manifest


def check_manifest(folder: Path, manifest: dict[str, Any], encoder: Encoder):
    """Raises ConfigError when the embeddings in `folder` are not those that `encoder` gives."""
    if manifest["limit"] != encoder.limit:
        raise config.ConfigError(
            f"{folder} was made with text.length={manifest['limit']}, and it is {encoder.limit} now: give another text.cache, or encode again."
        )
    if manifest["encoder"] != encoder.kind:
        raise config.ConfigError(
            f"{folder} was made with text.encoder={manifest['encoder']}, and it is {encoder.kind} now: give another text.cache, or encode again."
        )
    if any(manifest[key] != value for key, value in _described(encoder).items()):
        raise config.ConfigError(
            f"{folder} was made by another text encoder (other weights, tokenizer or dtype): give another text.cache, or encode again."
        )


def _shards(folder: Path, manifest: dict[str, Any]) -> Iterator[Shard]:
    """All shards of the folder, checked against their own index and the manifest."""
    limit, row = manifest["limit"], manifest["dim"] * DTYPES[manifest["dtype"]].itemsize
    for path in sorted(folder.glob("*.safetensors")):
        damaged = CheckpointError(f"{path} is not a whole shard of embeddings: {AGAIN}.")
        try:
            file = open_tensors(path)
            theirs = json.loads(file.metadata[METADATA_KEY])
            keys, counts, rows = file["keys"].view("<u8"), file["counts"], file.places["rows"]
        except (CheckpointError, KeyError, ValueError, RecursionError):
            raise damaged from None
        if theirs != manifest:
            raise config.ConfigError(f"{path} was made by another text encoder or with another limit than the rest of {folder}: {AGAIN}.")
        kept = np.minimum(np.minimum(counts, limit) + 1, limit)
        if keys.shape != (len(counts), 2) or counts.min(initial=1) < 1 or kept.sum() * row != rows.size:
            raise damaged
        yield Shard(path, keys, counts, rows.offset + row * (np.cumsum(kept) - kept))


class CachedEncoder(Encoder):
    """Looks embeddings up in a folder that `encode_captions` filled, and gives other texts to `fallback`.

    Memory holds 36 bytes a caption; rows are read from disk when asked for. Raises ConfigError when the folder is of another
    kind of encoder or limit, or was not made by `fallback`, CheckpointError when it is damaged, and TextError for a text that is not in it when there is
    no `fallback`.
    """

    def __init__(self, folder: str | Path, kind: str, limit: int, fallback: Encoder | None = None):
        self.folder, self.kind, self.limit, self.fallback = Path(folder).expanduser(), kind, limit, fallback
        manifest = _read_manifest(self.folder)
        self.identity, self.dim, self.dtype = manifest["identity"], manifest["dim"], DTYPES[manifest["dtype"]]
        check_manifest(self.folder, manifest, fallback or self)
        shards = list(_shards(self.folder, manifest))
        self._paths = [shard.path for shard in shards]
        empty = Shard(self.folder, np.empty((0, 2), np.uint64), np.empty(0, np.int64), np.empty(0, np.int64))
        keys, counts, starts = (np.concatenate(parts) for parts in zip(*(shard[1:] for shard in [empty, *shards])))
        order = np.lexsort((keys[:, 1], keys[:, 0]))
        self._first, self._second = keys[order, 0], keys[order, 1]
        self._counts, self._starts = counts[order], starts[order]
        self._shards = np.repeat(np.arange(len(shards), dtype=np.int32), [len(shard.counts) for shard in shards])[order]

    def _find(self, text: str) -> int | None:
        """The place of a text in the index."""
        first, second = _key(text)
        low, high = (np.searchsorted(self._first, first, side) for side in ("left", "right"))
        return next((i for i in range(low, high) if self._second[i] == second), None)

    def count(self, text: str) -> int:
        place = self._find(text)
        return self._other(text).count(text) if place is None else int(self._counts[place])

    def encode(self, texts: Sequence[str], cut: bool = False) -> list[Encoded]:
        places = {text: self._find(text) for text in texts}
        missing = [text for text, place in places.items() if place is None]
        found = dict(zip(missing, self._other(missing[0]).encode(missing, cut))) if missing else {}
        for text, place in places.items():
            if place is not None:
                self.check(text, int(self._counts[place]), cut)
                found[text] = self._read(place)
        return [found[text] for text in texts]

    def _other(self, text: str) -> Encoder:
        if self.fallback is None:
            raise TextError(
                f"{shown(text)} is not among the embeddings in {self.folder}: run `radiance encode` for it, or give text.file, T5's weights."
            )
        return self.fallback

    def _read(self, place: int) -> Encoded:
        path, length = self._paths[self._shards[place]], min(int(self._counts[place]), self.limit)
        size = min(length + 1, self.limit) * self.dim * self.dtype.itemsize
        # Opened for each read: thousands of shards would be thousands of open files.
        data = np.fromfile(path, np.uint8, size, offset=self._starts[place])
        if len(data) < size:
            raise CheckpointError(f"{path} became shorter while it was read: {AGAIN}.")
        return Encoded(data.view(self.dtype).reshape(-1, self.dim), length)
