"""The dataset index: written once, completely or not at all, and found by every process."""

import errno
import json
import os
import pickle
import threading

import pytest

from radiance import config
from radiance.base.errors import DataError
from radiance.data.index import STALE_AFTER, DatasetIndex
from radiance.data.indexed import IndexedSource
from radiance.data.listing import TRAIN_HASH, IndexRecord, UnusableRecord, map_in_threads
from radiance.data.source import Mixture


class ListListing:
    """A listing of given items, which counts its scans."""

    def __init__(self, items, identity="one"):
        self.items, self.identity, self.num_scans = items, identity, 0

    def scan(self, num_threads):
        self.num_scans += 1
        yield from self.items

    def address(self, location):
        return f"/images/{location}" if isinstance(location, int) else None

    def read_file(self, location):
        return f"file at {location}".encode()


def make_record(index, **changes):
    record = IndexRecord(f"{index}.png", index, (f"image {index}",), 64 + index, 64)
    return record._replace(**changes)


ITEMS = [
    make_record(0),
    UnusableRecord("bad.png", "not an image"),
    make_record(1, captions=("猫", "кот\n🐈")),
    make_record(2, has_tags=True, loss_weight=0.25, attributes={"digit": 7}),
    make_record(3, location=["split", {"a": 1}]),
    make_record(4, location=b"\x00the complete file\xff"),
    make_record(5, location=b"another"),
    make_record(6, name="\udcff.png"),
]
RECORDS = [item for item in ITEMS if isinstance(item, IndexRecord)]


def test_records_are_read_as_they_were_written(tmp_path):
    listing = ListListing(ITEMS)
    built = DatasetIndex(listing, "these", tmp_path, 2)
    opened_again = DatasetIndex(listing, "these", tmp_path, 2)
    unpickled = pickle.loads(pickle.dumps(built))
    for dataset_index in (built, opened_again, unpickled):
        assert len(dataset_index) == 7
        assert [unusable for unusable, _ in dataset_index.iter_unusable()] == [ITEMS[1]]
        for index, expected in enumerate(RECORDS):
            record = dataset_index.read_record(index)
            assert record._replace(location=None) == expected._replace(location=None)
            location = expected.location
            is_stored = isinstance(location, bytes)
            content = location if is_stored else f"file at {location}".encode()
            assert dataset_index.read_file(index) == content
    assert listing.num_scans == 1


def test_only_images_with_a_file_of_their_own_have_an_address(tmp_path):
    dataset_index = DatasetIndex(ListListing(ITEMS), "these", tmp_path, 2)
    addresses = [dataset_index.address(index) for index in range(7)]
    assert addresses == ["/images/0", "/images/1", "/images/2", None, None, None, "/images/6"]


def test_a_listing_of_another_identity_is_scanned_again(tmp_path):
    DatasetIndex(ListListing(ITEMS), "these", tmp_path, 2)
    assert len(DatasetIndex(ListListing(ITEMS[:1], "two"), "these", tmp_path, 2)) == 1


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", fail)
    message = (
        r"dataset index of these cannot be written .*No space left on device.*: "
        r"free some space there, or set data\.cache_dir"
    )
    with pytest.raises(DataError, match=message):
        DatasetIndex(ListListing(ITEMS), "these", tmp_path, 2)
    assert os.listdir(tmp_path / "indexes") == []
    monkeypatch.undo()
    assert len(DatasetIndex(ListListing(ITEMS), "these", tmp_path, 2)) == 7


def test_files_of_killed_processes_are_removed_but_not_those_of_running_ones(tmp_path):
    indexes = tmp_path / "indexes"
    DatasetIndex(ListListing(ITEMS), "these", tmp_path, 2).path.rename(tmp_path / "moved")
    name = DatasetIndex(ListListing(ITEMS), "these", tmp_path / "other", 2).path.name
    # A folder that is renamed while others look at it.
    (indexes / f".{name}.gone").symlink_to(tmp_path / "nowhere")
    for folder_name, age in ((f".{name}.old", 2 * STALE_AFTER), (f".{name}.new", 0)):
        folder = indexes / folder_name
        folder.mkdir()
        (folder / "records.jsonl").write_text("half a l")
        for path in (folder / "records.jsonl", folder):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert len(DatasetIndex(ListListing(ITEMS), "these", tmp_path, 2)) == 7
    assert sorted(os.listdir(indexes)) == sorted([name, f".{name}.gone", f".{name}.new"])


def test_several_processes_may_build_an_index_at_once(tmp_path):
    barrier = threading.Barrier(4)

    class WaitingListing(ListListing):
        def scan(self, num_threads):
            barrier.wait(10)
            yield from self.items

    lengths = []

    def build():
        lengths.append(len(DatasetIndex(WaitingListing(ITEMS), "these", tmp_path, 2)))

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert lengths == [7] * 4
    assert len(os.listdir(tmp_path / "indexes")) == 1


@pytest.mark.parametrize("kind", ["not an image", "unsupported format"])
def test_a_decoder_with_other_codecs_scans_again(kind, tmp_path, monkeypatch):
    items = [make_record(0), UnusableRecord("bad.avif", kind)]
    mute = ListListing([make_record(0), UnusableRecord("mute.png", "no caption")], "mute")
    listing = ListListing(items)
    for _ in range(2):
        DatasetIndex(listing, "these", tmp_path, 2)
        DatasetIndex(mute, "others", tmp_path, 2)
    assert listing.num_scans == 1
    monkeypatch.setattr("radiance.data.index.decoder_version", lambda: "with AVIF")
    listing.items = [make_record(0), make_record(1)]
    for _ in range(2):
        assert len(DatasetIndex(listing, "these", tmp_path, 2)) == 2
        assert len(DatasetIndex(mute, "others", tmp_path, 2)) == 1
    assert listing.num_scans == 2
    assert mute.num_scans == 1


@pytest.mark.parametrize(
    "name", ["metadata.bin", "records.jsonl", "unusable.jsonl", "listing.json"]
)
@pytest.mark.parametrize("content", [b"", b"\0" * 1000, None])
def test_a_damaged_index_is_built_again(name, content, tmp_path):
    """A power failure may truncate files, fill them with NUL, or lose them."""
    listing = ListListing(ITEMS)
    path = DatasetIndex(listing, "these", tmp_path, 2).path / name
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    assert len(DatasetIndex(listing, "these", tmp_path, 2)) == 7
    assert listing.num_scans == 2


def test_processes_that_use_the_previous_index_keep_it(tmp_path, monkeypatch):
    listing, indexes = ListListing([make_record(0), UnusableRecord("bad", "not an image")]), []
    for version in "abcd":
        monkeypatch.setattr("radiance.data.index.decoder_version", lambda version=version: version)
        indexes.append(DatasetIndex(listing, "these", tmp_path, 2))
        assert [len(dataset_index) for dataset_index in indexes[-2:]] == [1] * len(indexes[-2:])
        indexes = [pickle.loads(pickle.dumps(dataset_index)) for dataset_index in indexes]
    assert len(os.listdir(tmp_path / "indexes")) == 2


def test_an_empty_listing_raises_an_error(tmp_path):
    dataset_index = DatasetIndex(ListListing([]), "these", tmp_path, 2)
    message = r"train split of these is empty \(left out: none; in the other split: 0\)"
    with pytest.raises(DataError, match=message):
        IndexedSource(dataset_index, config.Data(resolution=8), "train")


def test_map_in_threads_keeps_the_order():
    assert list(map_in_threads(lambda x: x * 2, range(5000), 3)) == list(range(0, 10_000, 2))

    def fail_at_700(x):
        if x == 700:
            raise DataError("no")
        return x

    with pytest.raises(DataError):
        list(map_in_threads(fail_at_700, range(5000), 3))


# --- splits and mixtures --------------------------------------------------------------------------


def open_split(tmp_path, split="train", records=None, **changes):
    records = [make_record(i) for i in range(100)] if records is None else records
    listing = ListListing(records, json.dumps([str(item) for item in records]))
    return IndexedSource(
        DatasetIndex(listing, "these", tmp_path, 2),
        config.Data(**{"resolution": 8, "validation_fraction": 0.3} | changes),
        split,
    )


def test_splits_share_a_dataset_index(tmp_path):
    train, validation = open_split(tmp_path), open_split(tmp_path, "validation")
    assert sorted([*train.record_indices, *validation.record_indices]) == list(range(100))
    assert 15 < len(validation) < 45
    assert train.fingerprint() != validation.fingerprint()
    assert len(train.fingerprint()) == 64
    one_less = open_split(tmp_path, records=[make_record(i) for i in range(99)])
    assert one_less.fingerprint() != train.fingerprint()


def test_a_dataset_may_have_splits_of_its_own(tmp_path):
    records = [make_record(i, split_hash=TRAIN_HASH if i % 4 else 0) for i in range(40)]
    validation = open_split(tmp_path, "validation", records, validation_fraction=1e-6)
    assert list(validation.record_indices) == list(range(0, 40, 4))
    assert len(open_split(tmp_path, "train", records, validation_fraction=0.999999)) == 30


def test_images_without_a_bucket_are_left_out(tmp_path, capsys):
    sizes = [(300, 100), (99, 100), (100, 100), (150, 110)]
    records = [make_record(i, width=size[0], height=size[1]) for i, size in enumerate(sizes)]
    buckets = {"validation_fraction": 0.0, "bucket_step": 32}
    small = buckets | {"resolution": 64, "extra_resolutions": (96,)}
    source = open_split(tmp_path, records=records, **small)
    assert source.skip_counts == {"aspect ratio too large": 1}
    assert "1 × aspect ratio too large ('0.png')" in capsys.readouterr().err
    large = buckets | {"resolution": 128}
    message = r"1 × aspect ratio too large .*, 3 × too small \('1.png', '2.png', '3.png'\)"
    with pytest.raises(DataError, match=message):
        open_split(tmp_path, records=records, **large)
    upscaled = open_split(tmp_path, records=records, max_upscale=1.25, **large)
    assert upscaled.record_indices.tolist() == [3]


def test_images_of_a_mixture_follow_those_of_the_previous_source(tmp_path):
    first = open_split(
        tmp_path, records=[make_record(i) for i in range(5)], validation_fraction=0.0
    )
    second = open_split(
        tmp_path,
        records=[make_record(9, loss_weight=2.0), make_record(8, has_tags=True)],
        validation_fraction=0.0,
    )
    mixture = Mixture([first, second], [1, 3])
    assert len(mixture) == 7
    assert [span.fraction for span in mixture.spans] == [0.25, 0.75]
    assert mixture.spans[1].start == 5
    assert [mixture.name(i) for i in range(7)] == [f"{i}.png" for i in (0, 1, 2, 3, 4, 9, 8)]
    assert mixture.captions(5) == ("image 9",)
    assert mixture.address(6) == "/images/8"
    assert mixture.has_tags(6)
    assert not mixture.has_tags(4)
    assert mixture.loss_weights.tolist() == [1, 1, 1, 1, 1, 2, 1]
    assert mixture.sizes[5].tolist() == [73, 64]
    assert mixture.fingerprint() != Mixture([second, first], [1, 3]).fingerprint()
