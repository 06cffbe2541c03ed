"""What is known of a data set: written once, whole or not at all, and found again by everyone."""

import errno
import json
import os
import pickle
import threading

import pytest

from radiance import config
from radiance.base.errors import DataError
from radiance.data import index as module
from radiance.data.index import DatasetIndex
from radiance.data.indexed import IndexedSource
from radiance.data.listing import TRAIN_HASH, IndexRecord, Unusable, map_in_threads
from radiance.data.source import Mixture


class Listed:
    """A listing of rows, which counts how often it is asked for."""

    def __init__(self, rows, identity="one"):
        self.items, self.identity, self.asked = rows, identity, 0

    def rows(self, threads):
        self.asked += 1
        yield from self.items

    def read(self, place):
        return f"file at {place}".encode()


def row(number, **more):
    values = (
        dict(
            name=f"{number}.png",
            location=number,
            captions=(f"image {number}",),
            width=64 + number,
            height=64,
        )
        | more
    )
    return IndexRecord(**values)


ROWS = [
    row(0), Unusable("bad.png", "not an image"), row(1, captions=("猫", "кот\n🐈")), row(2, has_tags=True, loss_weight=0.25, attributes={"digit": 7}),
    row(3, location=["split", {"a": 1}]), row(4, location=b"\x00whole file\xff"), row(5, location=b"another"), row(6, name="\udcff.png"),
]  # fmt: skip


def test_rows_come_back(tmp_path):
    listing = Listed(ROWS)
    made = DatasetIndex(listing, "these", tmp_path, 2)
    for found in (
        made,
        DatasetIndex(listing, "these", tmp_path, 2),
        pickle.loads(pickle.dumps(made)),
    ):
        assert len(found) == 7
        assert [unfit for unfit, _ in found.iter_unusable()] == [ROWS[1]]
        kept = [item for item in ROWS if isinstance(item, IndexRecord)]
        for index, expected in enumerate(kept):
            same = found.read_record(index)
            assert same._replace(location=None) == expected._replace(location=None)
            content = (
                expected.location
                if isinstance(expected.location, bytes)
                else f"file at {expected.location}".encode()
            )
            assert found.read_file(index) == content
    assert listing.asked == 1


def test_another_listing_is_listed_again(tmp_path):
    DatasetIndex(Listed(ROWS), "these", tmp_path, 2)
    assert len(DatasetIndex(Listed(ROWS[:1], "two"), "these", tmp_path, 2)) == 1


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(
        DataError,
        match="dataset index of these cannot be written .*No space left on device.*: make room there, or set data.cache_dir",
    ):
        DatasetIndex(Listed(ROWS), "these", tmp_path, 2)
    assert os.listdir(tmp_path / "dataset indexes") == []
    monkeypatch.undo()
    assert len(DatasetIndex(Listed(ROWS), "these", tmp_path, 2)) == 7


def test_what_a_killed_process_left_is_removed_but_not_what_another_writes(tmp_path):
    name = DatasetIndex(Listed(ROWS), "these", tmp_path, 2).path.rename(tmp_path / "moved").name
    name = DatasetIndex(Listed(ROWS), "these", tmp_path / "other", 2).path.name
    (tmp_path / "dataset indexes" / f".{name}.gone").symlink_to(
        tmp_path / "nowhere"
    )  # as one that gets its name while others look
    for part, age in ((f".{name}.old", 2 * module.STALE_AFTER), (f".{name}.new", 0)):
        folder = tmp_path / "dataset indexes" / part
        folder.mkdir()
        (folder / "rows.jsonl").write_text("half a l")
        for path in (folder / "rows.jsonl", folder):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert len(DatasetIndex(Listed(ROWS), "these", tmp_path, 2)) == 7
    assert sorted(os.listdir(tmp_path / "dataset indexes")) == sorted(
        [name, f".{name}.gone", f".{name}.new"]
    )


def test_several_make_it_at_once(tmp_path):
    barrier = threading.Barrier(4)

    class Slow(Listed):
        def rows(self, threads):
            barrier.wait(10)
            yield from self.items

    found = []
    threads = [
        threading.Thread(
            target=lambda: found.append(len(DatasetIndex(Slow(ROWS), "these", tmp_path, 2)))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [7] * 4
    assert len(os.listdir(tmp_path / "dataset indexes")) == 1


def test_nothing_listed(tmp_path):
    with pytest.raises(
        DataError, match=r"train split of these is empty \(left out: none; in the other split: 0\)"
    ):
        IndexedSource(
            DatasetIndex(Listed([]), "these", tmp_path, 2), config.Data(resolution=8), "train"
        )


def test_in_threads_keeps_the_order():
    assert list(map_in_threads(lambda x: x * 2, range(5000), 3)) == list(range(0, 10_000, 2))

    def fails(x):
        if x == 700:
            raise DataError("no")
        return x

    with pytest.raises(DataError):
        list(map_in_threads(fails, range(5000), 3))


# --- splits and mixtures ------------------------------------------------------------------------------------------------


def split(tmp_path, split="train", rows=None, **more):
    rows = [row(i) for i in range(100)] if rows is None else rows
    listing = Listed(rows, json.dumps([str(item) for item in rows]))
    return IndexedSource(
        DatasetIndex(listing, "these", tmp_path, 2),
        config.Data(**({"side": 8, "validation": 0.3} | more)),
        split,
    )


def test_splits_share_a_dataset_index(tmp_path):
    train, validation = split(tmp_path), split(tmp_path, "validation")
    assert sorted([*train.record_indices, *validation.record_indices]) == list(range(100))
    assert 15 < len(validation) < 45
    assert train.fingerprint() != validation.fingerprint()
    assert len(train.fingerprint()) == 64
    assert split(tmp_path, rows=[row(i) for i in range(99)]).fingerprint() != train.fingerprint()


def test_a_data_set_may_have_splits_of_its_own(tmp_path):
    rows = [row(i, lot=0 if i % 4 == 0 else TRAIN_HASH) for i in range(40)]
    assert list(split(tmp_path, "validation", rows, validation=1e-6).record_indices) == list(
        range(0, 40, 4)
    )
    assert len(split(tmp_path, "train", rows, validation=0.999999)) == 30


def test_images_without_a_shape_are_left_out(tmp_path, capsys):
    rows = [
        row(0, width=300, height=100),
        row(1, width=99, height=100),
        row(2, width=100, height=100),
        row(3, width=150, height=110),
    ]
    data = dict(validation=1e-9, side=64, other_sides=(96,), bucket_step=32)
    assert split(tmp_path, rows=rows, **data).skip_counts == {"too long for its width": 1}
    assert "1 × too long for its width ('0.png')" in capsys.readouterr().err
    larger = data | {"side": 128, "other_sides": ()}
    with pytest.raises(
        DataError, match=r"1 × too long .*, 3 × too small \('1.png', '2.png', '3.png'\)"
    ):
        split(tmp_path, rows=rows, **larger)
    assert split(tmp_path, rows=rows, enlarge=1.25, **larger).record_indices.tolist() == [3]


def test_mixtures_number_their_parts(tmp_path):
    first, second = (
        split(tmp_path, rows=[row(i) for i in range(5)], validation=1e-9),
        split(tmp_path, rows=[row(9, weight=2.0), row(8, tags=True)], validation=1e-9),
    )
    both = Mixture([first, second], [1, 3])
    assert len(both) == 7
    assert [span.fraction for span in both.spans] == [0.25, 0.75]
    assert both.spans[1].start == 5
    assert [both.name(i) for i in range(7)] == [f"{i}.png" for i in (0, 1, 2, 3, 4, 9, 8)]
    assert both.captions(5) == ("image 9",)
    assert both.has_tags(6)
    assert not both.has_tags(4)
    assert both.loss_weights.tolist() == [1, 1, 1, 1, 1, 2, 1]
    assert both.sizes[5].tolist() == [
        73,
        64,
    ]
    assert both.fingerprint() != Mixture([second, first], [1, 3]).fingerprint()
