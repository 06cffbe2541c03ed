"""Files that lie elsewhere: in fsspec's memory, and on a file system that can be told to fail."""

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
from radiance.data import storage
from radiance.data.datasets import DataError, open_source
from radiance.data.sources import records
from radiance.data.sources.folder import FolderListing
from tests.helpers.toy_shards import fill_parquet, fill_tar

FOLDERS = ("memory://images", "flaky://images")


class Failure(Exception):
    """As HTTP's: with a status."""

    def __init__(self, status=None):
        super().__init__(f"status {status}\nin two lines")
        self.status = status


class Flaky(MemoryFileSystem):
    """Notes what is asked of it, and answers with the failures that stand first in `failures`; none: it succeeds."""

    protocol = "flaky"
    store, pseudo_dirs = {}, [""]
    asked, failures, listings = [], [], {}
    ranges = sizes = listed = True  # listed: sizes stand in listings too

    def _note(self, *question):
        self.asked.append(question)
        if self.failures and (failure := self.failures.pop(0)):
            raise failure

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._note("read", path, start, end)
        return super().cat_file(path, start if self.ranges else None, end if self.ranges else None)

    def info(self, path, **kwargs):
        self._note("info", path)
        return super().info(path) | ({} if self.sizes else {"size": None})

    def ls(self, path, detail=True, **kwargs):
        self._note("list", path)
        found = self.listings.setdefault(
            path, super().ls(path, detail)
        )  # kept, as those of object stores are
        return found if self.sizes and self.listed else [info | {"size": None} for info in found]

    def invalidate_cache(self, path=None):
        self.listings.clear()


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch):
    """Empty file systems, and no time lost; what was waited is returned."""
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    for system in (MemoryFileSystem, Flaky):
        system.store.clear()
        system.pseudo_dirs[:] = [""]
    for name, value in {
        "asked": [],
        "failures": [],
        "listings": {},
        "ranges": True,
        "sizes": True,
        "listed": True,
    }.items():
        monkeypatch.setattr(Flaky, name, value)
    waited = []
    monkeypatch.setattr(storage.time, "sleep", waited.append)
    return waited


def put(address, content):
    with fsspec.open(address, "wb") as file:
        file.write(content)
    Flaky.asked.clear()
    return address


def encoded(size=(12, 10), suffix="PNG", seed=0):
    file = io.BytesIO()
    Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    ).save(file, suffix)
    return file.getvalue()


IMAGES = {
    "a.png": encoded(seed=1), "a.txt": b"an image", "sub/b.jpg": encoded((300, 200), "JPEG"), "sub/b.txt": "für b\nb".encode(),
    "sub/c.webp": encoded((300, 300), "WEBP"), "d.bmp": encoded((200, 400), "BMP"), "e.tif": encoded((200, 150), "TIFF"),
    "metadata.jsonl": b'{"file_name": "d.bmp", "text": "of d", "loss_weight": 2}\n{"file_name": "sub/c.webp", "text": ["c", "of c"]}\n{',
    "sub/metadata.jsonl": b'{"file_name": "../e.tif", "caption": "a, b", "is_tag_based": true}', ".hidden/x.png": encoded(), ".y.png": b"",
    "cafe\u0301.png": encoded(seed=2), "caf\u00e9.txt": b"two spellings", "empty.png": b"", "empty.txt": b"nothing",
}  # fmt: skip


def fill(folder):
    for name, content in IMAGES.items():
        if storage.is_remote(folder):
            put(f"{folder}/{name}", content)
        else:
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
    return folder


def opened(folder, directory, **more):
    data = config.Data(
        source="folder",
        path=str(folder),
        validation_fraction=1e-9,
        resolution=8,
        cache_dir=str(directory),
        num_threads=2,
        **more,
    )
    return open_source(data, "train")


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_is_the_same_wherever_it_lies(folder, sizes, tmp_path, monkeypatch):
    monkeypatch.setattr(Flaky, "sizes", sizes)
    here = opened(fill(str(tmp_path / "here")), tmp_path / "prepared")
    there = pickle.loads(pickle.dumps(opened(fill(folder) + "/" * sizes, tmp_path / "prepared")))
    assert len(there) == 6
    assert (
        there.skipped
        == here.skip_counts
        == {
            "bad line of metadata.jsonl": 1,
            "not an image": 1,
        }
    )
    assert [there.name(i) for i in range(6)] == [here.name(i) for i in range(6)]
    assert [there.captions(i) for i in range(6)] == [here.captions(i) for i in range(6)]
    assert np.array_equal(there.sizes, here.sizes)
    assert sorted(here.loss_weights) == [1] * 5 + [2]
    assert np.array_equal(there.weights, here.loss_weights)
    assert [there.tags(i) for i in range(6)] == [here.name(i) == "e.tif" for i in range(6)]
    assert all(np.array_equal(there.load_image(i), here.load_image(i)) for i in range(6))
    assert there.fingerprint() == here.fingerprint()


@pytest.mark.parametrize("folder", FOLDERS)
def test_what_changes_in_a_remote_folder_is_noticed(folder):
    before = FolderListing(fill(folder)).identity
    assert FolderListing(folder).identity == before
    put(f"{folder}/a.png", IMAGES["a.png"])
    assert FolderListing(folder).identity != before


def test_what_is_no_folder(tmp_path):
    put("memory://images/a.png", b"")
    for path in ("memory://images/a.png", "memory://elsewhere", str(tmp_path / "none")):
        with pytest.raises(config.ConfigError, match=f"data.path={path} is not a folder: give a folder"):
            FolderListing(path)


def test_a_remote_folder_that_cannot_be_listed(monkeypatch):
    fill("flaky://images")
    listed = Flaky.ls

    def closed(self, path, detail=True, **kwargs):
        if path.endswith("sub"):
            raise PermissionError("no")
        return listed(self, path, detail)

    monkeypatch.setattr(Flaky, "ls", closed)
    files, names = storage.list_files("flaky://images")
    assert names == ["sub"]
    assert "a.png" in {file.name for file in files}
    assert not any("sub/" in file.name for file in files)


def test_a_remote_file_that_goes(tmp_path):
    source = opened(fill("memory://images"), tmp_path)
    fsspec.filesystem("memory").rm("/images/a.png")
    with pytest.raises(
        DataError,
        match="memory://images/a.png existed at the start and cannot be read now .No such file",
    ):
        source.load_image(0)


def test_addresses(tmp_path):
    table = [
        ("/a", "b/c.png", "/a/b/c.png"), ("/a", "/d.png", "/d.png"), ("/a", "s3://b/c", "s3://b/c"), ("s3://b", "c/d", "s3://b/c/d"),
        ("s3://b/", "./c", "s3://b/c"), ("memory://", "c", "memory://c"), ("s3://b", "/c.png", "/c.png"), ("s3://b", "https://c/d", "https://c/d"),
    ]  # fmt: skip
    assert [storage.join_address(folder, place) for folder, place, _ in table] == [
        expected for *_, expected in table
    ]
    assert (
        storage.join_address(storage.parent_address("memory://list.jsonl"), "a.png")
        == "memory://a.png"
    )
    assert storage.join_address(storage.parent_address("/b/list.jsonl"), "a.png") == "/b/a.png"
    (tmp_path / "link").symlink_to(tmp_path)
    assert storage.resolve_address(str(tmp_path / "link")) == str(tmp_path)
    assert storage.resolve_address("s3://b//c") == "s3://b//c"


# --- parts of files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranges", [True, False])
@pytest.mark.parametrize("remote", [True, False])
def test_ranges(remote, ranges, tmp_path, monkeypatch):
    monkeypatch.setattr(Flaky, "ranges", ranges)  # a server that sends the whole whatever is asked
    (tmp_path / "x").write_bytes(b"0123456789")
    address = put("flaky://x", b"0123456789") if remote else str(tmp_path / "x")
    for begin, end in ((0, 3), (3, 7), (7, 10), (0, 30), (4, 4), (5, 2), (0, None)):
        assert storage.read_bytes(address, begin, end) == b"0123456789"[begin:end]
    assert storage.get_file_info(address).size == 10
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(f"{address}/y")
    with pytest.raises(FileNotFoundError):
        storage.get_file_info(storage.parent_address(address) + ("none" if remote else ""))


@pytest.mark.parametrize(("suffix", "limit"), [("BMP", 2), ("JPEG", 2), ("PNG", 2), ("WEBP", 20)])
def test_of_a_remote_file_its_head_alone_is_read(suffix, limit):
    content = encoded((800, 500), suffix)
    assert len(content) > 2 * storage.HEADER_BLOCK_SIZE
    assert records.read_header_at(put("flaky://x", content))[:2] == (800, 500)
    fetched = [
        end - start
        for kind, *question in Flaky.asked
        if kind == "read"
        for _, start, end in [question]
    ]
    assert sum(fetched) < limit * storage.HEADER_BLOCK_SIZE
    assert len(Flaky.asked) <= 4
    assert records.read_header_at(put("flaky://x", encoded((80, 50), suffix)))[:2] == (80, 50)
    assert len(Flaky.asked) == 1


def test_a_stream_of_lines(monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "STREAM_BLOCK_SIZE", 32)
    told = [f"line {i} {'x' * (i % 50)}\n".encode() for i in range(100)] + [b"no end"]
    for sizes in (True, False):
        monkeypatch.setattr(Flaky, "sizes", sizes)
        address = put("flaky://list", b"".join(told))
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
            assert list(file) == told
            assert not Flaky.failures
    (tmp_path / "list").write_bytes(b"".join(told))
    with storage.open_stream(str(tmp_path / "list")) as file:
        assert list(file) == told
    for missing in (str(tmp_path / "none"), "memory://none"):
        with (
            pytest.raises(DataError, match="none cannot be read .No such file"),
            storage.open_stream(missing),
        ):
            pass


# --- what fails ---------------------------------------------------------------------------------------------------------


def test_what_fails_for_a_moment_is_asked_again(elsewhere):
    address = put("flaky://x", b"content")
    Flaky.failures[:] = [OSError("reset"), TimeoutError(), Failure(), Failure(503), Failure(429)]
    assert storage.read_bytes(address) == b"content"
    assert len(Flaky.asked) == 6
    assert elsewhere == sorted(set(elsewhere))
    assert len(elsewhere) == 5
    assert 50 <= sum(storage.RETRY_DELAYS) <= 70


@pytest.mark.parametrize(("failure", "raised"), [(FileNotFoundError("x"), FileNotFoundError), (IsADirectoryError("x"), FileNotFoundError), (PermissionError("x"), PermissionError),
    (Failure(404), FileNotFoundError), (Failure(410), FileNotFoundError), (Failure(403), PermissionError), (ValueError("no address"), FileNotFoundError)])  # fmt: skip
def test_what_is_final_is_not_asked_again(failure, raised, elsewhere):
    Flaky.failures[:] = [failure]
    with pytest.raises(raised):
        storage.read_bytes(put("flaky://x", b"content"))
    assert not elsewhere
    assert len(Flaky.asked) == 1


def test_what_goes_on_failing_is_told_in_a_sentence(elsewhere, tmp_path):
    fill("flaky://images")
    Flaky.failures[:] = [Failure(503)] * 100
    with pytest.raises(
        DataError,
        match=r"^flaky://images/a.png cannot be read, .*Failure status 503 in two lines.*start again\.$",
    ):
        storage.read_bytes("flaky://images/a.png")
    assert elsewhere == list(storage.RETRY_DELAYS)
    Flaky.failures[:] = []
    listing = FolderListing("flaky://images")
    Flaky.failures[:] = [Failure(503)] * 100
    with pytest.raises(DataError, match="metadata.jsonl cannot be read"):
        list(listing.scan(1))
    with pytest.raises(DataError, match="flaky://images cannot be read"):
        opened("flaky://images", tmp_path)


@pytest.mark.parametrize("suffix", ["WEBP", "TIFF", "PNG"])
def test_a_image_is_not_broken_because_the_connection_is(suffix):
    """The first part of the file comes, the rest does not."""
    address = put("flaky://x", encoded((800, 500), suffix))
    Flaky.failures[:] = [None] + [ConnectionError("reset")] * 100
    with pytest.raises(DataError, match="flaky://x cannot be read"):
        records.read_header_at(address)


def test_the_dataset_index_tells_whose_failure_it_is(tmp_path, monkeypatch):
    def failing(address, size=None):
        raise storage.UnreachableError("the wire is cut")

    fill("memory://images")
    monkeypatch.setattr("radiance.data.sources.folder.read_header_at", failing)
    with pytest.raises(DataError, match="^the wire is cut$"):
        opened("memory://images", tmp_path)


def test_packages_that_are_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(config.ConfigError, match="s3://bucket/x cannot be reached: Install s3fs"):
        storage.read_bytes("s3://bucket/x")
    with pytest.raises(
        config.ConfigError, match="nowhere://x cannot be reached: Protocol not known: nowhere"
    ):
        storage.list_files("nowhere://x")
    monkeypatch.setitem(sys.modules, "fsspec.core", None)
    with pytest.raises(
        config.ConfigError,
        match=r"memory://x is reached with the fsspec package: pip install 'radiance\[remote\]'",
    ):
        storage.read_bytes("memory://x")


@pytest.mark.parametrize(("kind", "listed"), [("tar", True), ("tar", False), ("parquet", True)])
def test_shards_lie_anywhere(kind, listed, tmp_path, monkeypatch):
    """Whole, in a folder and by pattern, the same as on this machine; also where listings tell no sizes, as those of web servers."""
    monkeypatch.setattr(Flaky, "listed", listed)
    fill_tar(tmp_path / "tar")
    fill_parquet(tmp_path / "parquet")
    (tmp_path / kind / "notes.md").write_text("about these shards")
    files = {
        str(path.relative_to(tmp_path / kind)): path.read_bytes()
        for path in (tmp_path / kind).rglob("*.*")
    }
    for name, content in files.items():
        put(f"flaky://shards/{kind}/{name}", content)
    stem = "{0000..0001}" if kind == "tar" else "train-*"
    one = sorted(name for name in files if name.endswith(kind))[0]
    for path in ("", f"{stem}.{kind}", one):
        here, there = (
            open_source(
                config.Data(
                    source=kind,
                    path=f"{folder}/{kind}/{path}",
                    resolution=8,
                    validation_fraction=1e-9,
                    cache_dir=str(tmp_path / "prepared"),
                ),
                "train",
            )
            for folder in (tmp_path, "flaky://shards")
        )
        assert len(here) == len(there) > 0
        assert here.fingerprint() == there.fingerprint()
        assert [here.name(i) for i in range(len(here))] == [
            there.name(i) for i in range(len(there))
        ]
        again = pickle.loads(pickle.dumps(there))
        assert np.array_equal(np.asarray(again.load_image(0)), np.asarray(here.load_image(0)))
    with pytest.raises(config.ConfigError, match="has none in it"):
        open_source(
            config.Data(
                source=kind,
                path=f"flaky://shards/{kind}/no*",
                resolution=8,
                cache_dir=str(tmp_path / "prepared"),
            ),
            "train",
        )
