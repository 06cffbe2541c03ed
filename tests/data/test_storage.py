"""Remote files: in fsspec's memory, and on a file system that fails on request."""

import io
import pickle
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.data import storage
from radiance.data.addresses import is_remote, parent_address
from radiance.data.datasets import open_source
from radiance.data.sources import records
from radiance.data.sources.folder import FolderListing
from tests.helpers.toy_shards import fill_parquet, fill_tar

FOLDERS = ("memory://images", "flaky://images")


class Failure(Exception):
    """An error with a status code, as HTTP file systems raise it."""

    def __init__(self, status=None):
        super().__init__(f"status {status}\nin two lines")
        self.status = status


class Flaky(MemoryFileSystem):
    """Records requests, and raises the first of `failures` for each; None means success."""

    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    requests, failures, listings = [], [], {}
    has_ranges = True  # False for a server that sends the complete file for any range
    has_sizes = True  # False for a server that reports no sizes
    lists_sizes = True  # False for a server that reports no sizes in listings

    def _record(self, *request):
        self.requests.append(request)
        if self.failures and (failure := self.failures.pop(0)):
            raise failure

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._record("read", path, start, end)
        if not self.has_ranges:
            start = end = None
        return super().cat_file(path, start, end)

    def info(self, path, **kwargs):
        self._record("info", path)
        return super().info(path) | ({} if self.has_sizes else {"size": None})

    def ls(self, path, detail=True, **kwargs):
        self._record("list", path)
        # Listings are cached, as those of object stores are.
        infos = self.listings.setdefault(path, super().ls(path, detail))
        if self.has_sizes and self.lists_sizes:
            return infos
        return [info | {"size": None} for info in infos]

    def invalidate_cache(self, path=None):
        self.listings.clear()


@pytest.fixture(autouse=True)
def delays(monkeypatch):
    """Empty the file systems and replace sleeping; return the list of delays."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    for file_system in (MemoryFileSystem, Flaky):
        file_system.store.clear()
        file_system.pseudo_dirs[:] = [""]
    defaults = {
        "requests": [],
        "failures": [],
        "listings": {},
        "has_ranges": True,
        "has_sizes": True,
        "lists_sizes": True,
    }
    for name, value in defaults.items():
        monkeypatch.setattr(Flaky, name, value)
    delays = []
    monkeypatch.setattr(storage.time, "sleep", delays.append)
    return delays


def put(address, content):
    with fsspec.open(address, "wb") as file:
        file.write(content)
    Flaky.requests.clear()
    return address


def encode_image(size=(12, 10), image_format="PNG", seed=0):
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(file, image_format)
    return file.getvalue()


FILES = {
    "a.png": encode_image(seed=1),
    "a.txt": b"an image",
    "sub/b.jpg": encode_image((300, 200), "JPEG"),
    "sub/b.txt": "für b\nb".encode(),
    "sub/c.webp": encode_image((300, 300), "WEBP"),
    "d.bmp": encode_image((200, 400), "BMP"),
    "e.tif": encode_image((200, 150), "TIFF"),
    "metadata.jsonl": b'{"file_name": "d.bmp", "text": "of d", "loss_weight": 2}\n'
    b'{"file_name": "sub/c.webp", "text": ["c", "of c"]}\n{',
    "sub/metadata.jsonl": b'{"file_name": "../e.tif", "caption": "a, b", "is_tag_based": true}',
    ".hidden/x.png": encode_image(),
    ".y.png": b"",
    "cafe\u0301.png": encode_image(seed=2),
    "caf\u00e9.txt": b"two spellings",
    "empty.png": b"",
    "empty.txt": b"nothing",
}


def fill(folder):
    for name, content in FILES.items():
        if is_remote(folder):
            put(f"{folder}/{name}", content)
        else:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def open_images(source, path, cache_dir):
    """Open the training split of a folder or of shards."""
    data = config.Data(
        source=source,
        path=str(path),
        validation_fraction=0.0,
        resolution=8,
        cache_dir=str(cache_dir),
        num_threads=2,
    )
    return open_source(data, "train")


# --- folders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_sizes", [True, False])
@pytest.mark.parametrize("folder", FOLDERS)
def test_remote_folders_have_the_images_of_local_ones(folder, has_sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(Flaky, "has_sizes", has_sizes)
    cache_dir = tmp_path / "prepared"
    local = open_images("folder", fill(str(tmp_path / "local")), cache_dir)
    remote_path = fill(folder) + "/" * has_sizes
    remote = pickle.loads(pickle.dumps(open_images("folder", remote_path, cache_dir)))
    indices = range(6)
    assert len(remote) == 6
    assert remote.skip_counts == local.skip_counts
    assert set(local.skip_counts.values()) == {1}
    assert set(local.skip_counts) == {"bad line of metadata.jsonl", "not an image"}
    assert [remote.name(i) for i in indices] == [local.name(i) for i in indices]
    assert [remote.captions(i) for i in indices] == [local.captions(i) for i in indices]
    assert np.array_equal(remote.sizes, local.sizes)
    assert sorted(local.loss_weights) == [1] * 5 + [2]
    assert np.array_equal(remote.loss_weights, local.loss_weights)
    assert [remote.has_tags(i) for i in indices] == [local.name(i) == "e.tif" for i in indices]
    assert all(np.array_equal(remote.load_image(i), local.load_image(i)) for i in indices)
    assert remote.fingerprint() == local.fingerprint()


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_changed_file_changes_the_identity_of_a_remote_folder(folder):
    identity = FolderListing(fill(folder)).identity
    assert FolderListing(folder).identity == identity
    put(f"{folder}/a.png", FILES["a.png"])
    assert FolderListing(folder).identity != identity


def test_a_path_that_is_no_folder_raises_an_error(tmp_path):
    put("memory://images/a.png", b"")
    for path in ("memory://images/a.png", "memory://elsewhere", str(tmp_path / "none")):
        with pytest.raises(config.ConfigError, match=f"data.path={path} is not a folder: give"):
            FolderListing(path)


def test_remote_folders_that_cannot_be_listed_are_returned_by_name(monkeypatch):
    fill("flaky://images")
    list_folder = Flaky.ls

    def list_all_but_sub(self, path, detail=True, **kwargs):
        if path.endswith("sub"):
            raise PermissionError("no")
        return list_folder(self, path, detail)

    monkeypatch.setattr(Flaky, "ls", list_all_but_sub)
    files, unreadable_folders = storage.list_files("flaky://images")
    assert unreadable_folders == ["sub"]
    assert "a.png" in {file.name for file in files}
    assert not any("sub/" in file.name for file in files)


def test_a_remote_file_that_disappears_raises_an_error(tmp_path):
    source = open_images("folder", fill("memory://images"), tmp_path)
    fsspec.filesystem("memory").rm("/images/a.png")
    message = "memory://images/a.png existed at the start and cannot be read now .No such file"
    with pytest.raises(DataError, match=message):
        source.load_image(0)


# --- ranges and streams ---------------------------------------------------------------------------


@pytest.mark.parametrize("has_ranges", [True, False])
@pytest.mark.parametrize("remote", [True, False])
def test_ranges_are_read(remote, has_ranges, tmp_path, monkeypatch):
    monkeypatch.setattr(Flaky, "has_ranges", has_ranges)
    (tmp_path / "x").write_bytes(b"0123456789")
    address = put("flaky://x", b"0123456789") if remote else str(tmp_path / "x")
    for begin, end in ((0, 3), (3, 7), (7, 10), (0, 30), (4, 4), (5, 2), (0, None)):
        assert storage.read_bytes(address, begin, end) == b"0123456789"[begin:end]
    assert storage.get_file_info(address).size == 10
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{address}/y")
    with pytest.raises(FileNotFoundError):
        storage.get_file_info(parent_address(address) + ("none" if remote else ""))


@pytest.mark.parametrize(
    ("image_format", "max_blocks"), [("BMP", 2), ("JPEG", 2), ("PNG", 2), ("WEBP", 20)]
)
def test_only_the_header_of_a_remote_image_is_requested(image_format, max_blocks):
    content = encode_image((800, 500), image_format)
    assert len(content) > 2 * storage.HEADER_BLOCK_SIZE
    assert records.read_header_at(put("flaky://x", content))[:2] == (800, 500)
    reads = [request for request in Flaky.requests if request[0] == "read"]
    num_bytes = sum(end - start for _, _, start, end in reads)
    assert num_bytes < max_blocks * storage.HEADER_BLOCK_SIZE
    assert len(Flaky.requests) <= 4
    small = put("flaky://x", encode_image((80, 50), image_format))
    assert records.read_header_at(small)[:2] == (80, 50)
    assert len(Flaky.requests) == 1


@pytest.mark.parametrize("has_sizes", [True, False])
def test_remote_files_are_seekable_like_local_ones(has_sizes, monkeypatch):
    monkeypatch.setattr(Flaky, "has_sizes", has_sizes)
    monkeypatch.setattr(storage, "HEADER_BLOCK_SIZE", 64)
    content = np.random.default_rng(0).bytes(1000)
    local = io.BytesIO(content)
    with storage.open_seekable(put("flaky://x", content)) as remote:
        rng = np.random.default_rng(1)
        for _ in range(200):
            position, count = int(rng.integers(0, 1100)), int(rng.integers(0, 300))
            for file in (local, remote):
                file.seek(position)
            assert remote.read(count) == local.read(count)
        assert remote.seek(-5, io.SEEK_END) == 995
        assert remote.read() == content[995:]
        assert remote.seek(0) == 0
        assert remote.read() == content
        with pytest.raises((OSError, ValueError)):
            remote.seek(-1)


def test_streams_of_lines_survive_failures(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "STREAM_BLOCK_SIZE", 32)
    lines = [f"line {i} {'x' * (i % 50)}\n".encode() for i in range(100)] + [b"no end"]
    for has_sizes in (True, False):
        monkeypatch.setattr(Flaky, "has_sizes", has_sizes)
        address = put("flaky://list", b"".join(lines))
        Flaky.failures[:] = [
            None,
            OSError("reset"),
            None,
            None,
            Failure(503),
            TimeoutError(),
            None,
            None,
            Failure(429),
        ]
        with storage.open_stream(address) as file:
            assert list(file) == lines
            assert not Flaky.failures
    (tmp_path / "list").write_bytes(b"".join(lines))
    with storage.open_stream(str(tmp_path / "list")) as file:
        assert list(file) == lines
    for missing in (str(tmp_path / "none"), "memory://none"):
        with (
            pytest.raises(DataError, match=r"none cannot be read .No such file"),
            storage.open_stream(missing),
        ):
            pass


# --- failures -------------------------------------------------------------------------------------


def test_transient_failures_are_retried(delays):
    address = put("flaky://x", b"content")
    Flaky.failures[:] = [OSError("reset"), TimeoutError(), Failure(), Failure(503), Failure(429)]
    assert storage.read_bytes(address) == b"content"
    assert len(Flaky.requests) == 6
    assert delays == sorted(set(delays))
    assert len(delays) == 5
    assert 50 <= sum(storage.RETRY_DELAYS) <= 70


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (FileNotFoundError("x"), FileNotFoundError),
        (IsADirectoryError("x"), FileNotFoundError),
        (PermissionError("x"), PermissionError),
        (Failure(404), FileNotFoundError),
        (Failure(410), FileNotFoundError),
        (Failure(403), PermissionError),
        (ValueError("no address"), FileNotFoundError),
    ],
)
def test_permanent_failures_are_not_retried(failure, expected, delays):
    Flaky.failures[:] = [failure]
    with pytest.raises(expected):
        storage.read_bytes(put("flaky://x", b"content"))
    assert not delays
    assert len(Flaky.requests) == 1


def test_lasting_failures_are_reported_in_one_line(delays, tmp_path):
    fill("flaky://images")
    Flaky.failures[:] = [Failure(503)] * 100
    message = (
        r"^flaky://images/a\.png cannot be read, .*Failure status 503 in two lines.*start again\.$"
    )
    with pytest.raises(DataError, match=message):
        storage.read_bytes("flaky://images/a.png")
    assert delays == list(storage.RETRY_DELAYS)
    Flaky.failures[:] = []
    listing = FolderListing("flaky://images")
    Flaky.failures[:] = [Failure(503)] * 100
    with pytest.raises(DataError, match=r"metadata\.jsonl cannot be read"):
        list(listing.scan(1))
    with pytest.raises(DataError, match="flaky://images cannot be read"):
        open_images("folder", "flaky://images", tmp_path)


@pytest.mark.parametrize("image_format", ["WEBP", "TIFF", "PNG"])
def test_a_broken_connection_does_not_make_an_image_unusable(image_format):
    """The first block of the file arrives, the rest does not."""
    address = put("flaky://x", encode_image((800, 500), image_format))
    Flaky.failures[:] = [None] + [ConnectionError("reset")] * 100
    with pytest.raises(DataError, match="flaky://x cannot be read"):
        records.read_header_at(address)


def test_the_dataset_index_keeps_the_message_of_an_unreachable_file(tmp_path, monkeypatch):
    def fail(address, size=None):
        raise storage.UnreachableError("the wire is cut")

    fill("memory://images")
    monkeypatch.setattr("radiance.data.sources.folder.read_header_at", fail)
    with pytest.raises(DataError, match=r"^the wire is cut$"):
        open_images("folder", "memory://images", tmp_path)


def test_missing_packages_and_unknown_protocols_raise_errors(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(config.ConfigError, match="s3://bucket/x cannot be reached: Install s3fs"):
        storage.read_bytes("s3://bucket/x")
    message = "nowhere://x cannot be reached: Protocol not known: nowhere"
    with pytest.raises(config.ConfigError, match=message):
        storage.list_files("nowhere://x")


# --- shards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "lists_sizes"), [("tar", True), ("tar", False), ("parquet", True)]
)
def test_remote_shards_have_the_images_of_local_ones(source, lists_sizes, tmp_path, monkeypatch):
    """A folder, a pattern and a single shard; also where listings have no sizes."""
    monkeypatch.setattr(Flaky, "lists_sizes", lists_sizes)
    fill_tar(tmp_path / "tar")
    fill_parquet(tmp_path / "parquet")
    (tmp_path / source / "notes.md").write_text("about these shards")
    files = {
        str(path.relative_to(tmp_path / source)): path.read_bytes()
        for path in (tmp_path / source).rglob("*.*")
    }
    for name, content in files.items():
        put(f"flaky://shards/{source}/{name}", content)
    pattern = "{0000..0001}.tar" if source == "tar" else "train-*.parquet"
    single_shard = min(name for name in files if name.endswith(source))
    for path in ("", pattern, single_shard):
        local, remote = (
            open_images(source, f"{folder}/{source}/{path}", tmp_path / "prepared")
            for folder in (tmp_path, "flaky://shards")
        )
        assert len(local) == len(remote) > 0
        assert local.fingerprint() == remote.fingerprint()
        names = [[images.name(i) for i in range(len(images))] for images in (local, remote)]
        assert names[0] == names[1]
        unpickled = pickle.loads(pickle.dumps(remote))
        assert np.array_equal(np.asarray(unpickled.load_image(0)), np.asarray(local.load_image(0)))
    with pytest.raises(config.ConfigError, match="contains none"):
        open_images(source, f"flaky://shards/{source}/no*", tmp_path / "prepared")
