"""What is known of a data set: written once, whole or not at all, and found again by everyone."""

import errno
import json
import os
import pickle
import threading

import pytest

from radiance import config
from radiance.data import catalogue as module
from radiance.data.catalogue import TRAIN, Catalogue, DataError, Row, Unfit, in_threads
from radiance.data.datasets import Catalogued, Mixture


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
    values = dict(name=f"{number}.png", place=number, captions=(f"picture {number}",), width=64 + number, height=64) | more
    return Row(**values)


ROWS = [
    row(0), Unfit("bad.png", "not a picture"), row(1, captions=("猫", "кот\n🐈")), row(2, tags=True, weight=0.25, attributes={"digit": 7}),
    row(3, place=["split", {"a": 1}]), row(4, place=b"\x00whole file\xff"), row(5, place=b"another"), row(6, name="\udcff.png"),
]  # fmt: skip


def test_rows_come_back(tmp_path):
    listing = Listed(ROWS)
    made = Catalogue(listing, "these", tmp_path, 2)
    for found in (made, Catalogue(listing, "these", tmp_path, 2), pickle.loads(pickle.dumps(made))):
        assert len(found) == 7 and [unfit for unfit, _ in found.unfit()] == [ROWS[1]]
        kept = [item for item in ROWS if isinstance(item, Row)]
        for index, expected in enumerate(kept):
            same = found.row(index)
            assert same._replace(place=None) == expected._replace(place=None)
            content = expected.place if isinstance(expected.place, bytes) else f"file at {expected.place}".encode()
            assert found.read(index) == content
    assert listing.asked == 1


def test_another_listing_is_listed_again(tmp_path):
    Catalogue(Listed(ROWS), "these", tmp_path, 2)
    assert len(Catalogue(Listed(ROWS[:1], "two"), "these", tmp_path, 2)) == 1


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(
        DataError, match="catalogue of these cannot be written .*No space left on device.*: make room there, or set data.directory"
    ):
        Catalogue(Listed(ROWS), "these", tmp_path, 2)
    assert os.listdir(tmp_path / "catalogues") == []
    monkeypatch.undo()
    assert len(Catalogue(Listed(ROWS), "these", tmp_path, 2)) == 7


def test_what_a_killed_process_left_is_removed_but_not_what_another_writes(tmp_path):
    name = Catalogue(Listed(ROWS), "these", tmp_path, 2).path.rename(tmp_path / "moved").name
    name = Catalogue(Listed(ROWS), "these", tmp_path / "other", 2).path.name
    (tmp_path / "catalogues" / f".{name}.gone").symlink_to(tmp_path / "nowhere")  # as one that gets its name while others look
    for part, age in ((f".{name}.old", 2 * module.ABANDONED), (f".{name}.new", 0)):
        folder = tmp_path / "catalogues" / part
        folder.mkdir()
        (folder / "rows.jsonl").write_text("half a l")
        for path in (folder / "rows.jsonl", folder):
            os.utime(path, (path.stat().st_mtime - age,) * 2)
    assert len(Catalogue(Listed(ROWS), "these", tmp_path, 2)) == 7
    assert sorted(os.listdir(tmp_path / "catalogues")) == sorted([name, f".{name}.gone", f".{name}.new"])


def test_several_make_it_at_once(tmp_path):
    barrier = threading.Barrier(4)

    class Slow(Listed):
        def rows(self, threads):
            barrier.wait(10)
            yield from self.items

    found = []
    threads = [threading.Thread(target=lambda: found.append(len(Catalogue(Slow(ROWS), "these", tmp_path, 2)))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [7] * 4 and len(os.listdir(tmp_path / "catalogues")) == 1


def test_nothing_listed(tmp_path):
    with pytest.raises(DataError, match=r"train split of these is empty \(left out: none; in the other split: 0\)"):
        Catalogued(Catalogue(Listed([]), "these", tmp_path, 2), config.Data(side=8), "train")


def test_in_threads_keeps_the_order():
    assert list(in_threads(lambda x: x * 2, range(5000), 3)) == list(range(0, 10_000, 2))

    def fails(x):
        if x == 700:
            raise DataError("no")
        return x

    with pytest.raises(DataError):
        list(in_threads(fails, range(5000), 3))


# --- splits and mixtures ------------------------------------------------------------------------------------------------


def split(tmp_path, split="train", rows=None, **more):
    rows = [row(i) for i in range(100)] if rows is None else rows
    listing = Listed(rows, json.dumps([str(item) for item in rows]))
    return Catalogued(Catalogue(listing, "these", tmp_path, 2), config.Data(**({"side": 8, "validation": 0.3} | more)), split)


def test_splits_share_a_catalogue(tmp_path):
    train, validation = split(tmp_path), split(tmp_path, "validation")
    assert sorted([*train.rows, *validation.rows]) == list(range(100)) and 15 < len(validation) < 45
    assert train.fingerprint() != validation.fingerprint() and len(train.fingerprint()) == 64
    assert split(tmp_path, rows=[row(i) for i in range(99)]).fingerprint() != train.fingerprint()


def test_a_data_set_may_have_splits_of_its_own(tmp_path):
    rows = [row(i, lot=0 if i % 4 == 0 else TRAIN) for i in range(40)]
    assert list(split(tmp_path, "validation", rows, validation=1e-6).rows) == list(range(0, 40, 4))
    assert len(split(tmp_path, "train", rows, validation=0.999999)) == 30


def test_pictures_without_a_shape_are_left_out(tmp_path, capsys):
    rows = [row(0, width=300, height=100), row(1, width=99, height=100), row(2, width=100, height=100), row(3, width=150, height=110)]
    data = dict(validation=1e-9, side=64, other_sides=(96,), bucket_step=32)
    assert split(tmp_path, rows=rows, **data).skipped == {"too long for its width": 1}
    assert "1 × too long for its width ('0.png')" in capsys.readouterr().err
    larger = data | {"side": 128, "other_sides": ()}
    with pytest.raises(DataError, match=r"1 × too long .*, 3 × too small \('1.png', '2.png', '3.png'\)"):
        split(tmp_path, rows=rows, **larger)
    assert split(tmp_path, rows=rows, enlarge=1.25, **larger).rows.tolist() == [3]


def test_mixtures_number_their_parts(tmp_path):
    first, second = (
        split(tmp_path, rows=[row(i) for i in range(5)], validation=1e-9),
        split(tmp_path, rows=[row(9, weight=2.0), row(8, tags=True)], validation=1e-9),
    )
    both = Mixture([first, second], [1, 3])
    assert len(both) == 7 and [span.share for span in both.spans] == [0.25, 0.75] and both.spans[1].first == 5
    assert [both.name(i) for i in range(7)] == [f"{i}.png" for i in (0, 1, 2, 3, 4, 9, 8)]
    assert both.captions(5) == ("picture 9",) and both.tags(6) and not both.tags(4)
    assert both.weights.tolist() == [1, 1, 1, 1, 1, 2, 1] and both.sizes[5].tolist() == [73, 64]
    assert both.fingerprint() != Mixture([second, first], [1, 3]).fingerprint()
