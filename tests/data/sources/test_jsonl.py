"""The data source `jsonl`: fields of lines, trusted sizes, and missing files."""

import errno
import json
import pickle

import fsspec
import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.data import storage
from radiance.data.batches import Batches
from radiance.data.datasets import open_source
from radiance.data.sources.folder import FolderListing
from radiance.data.sources.jsonl import JsonlListing
from radiance.data.unusable import UnusableError
from radiance.text.hash_encoder import HashEncoder


def save(path, gray=200, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (gray, gray, gray)).save(path)
    return path


def write_lines(path, *lines):
    """Write objects as JSON, and texts as they are."""
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def settings(path, root="", **changes):
    defaults = {
        "max_upscale": 2.0,
        "num_threads": 2,
        "caption_dropout": 0.0,
        "max_broken_fraction": 1.0,
        "validation_fraction": 0.0,
        "resolution": 8,
        "protocols": (*config.data.PROTOCOLS, "memory"),
    }
    return config.Data(
        source="jsonl",
        path=str(path),
        root=str(root),
        cache_dir=str(path.parent / ".prepared"),
        **defaults | changes,
    )


def open_list(path, root="", **changes):
    return open_source(settings(path, root, **changes), "train")


def test_all_fields_of_a_line_are_read(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png", "cafe\u0301.png"):
        save(tmp_path / name)
    entry = {  # as the published models' trainer writes it
        "filename": "a.png",
        "caption_or_tags": "x, y",
        "width": 30,
        "height": 20.0,
        "is_tag_based": True,
        "is_url_based": False,
    }
    path = write_lines(
        tmp_path / "list.jsonl",
        entry | {"loss_weight": 0.5},
        {
            "file_name": "./b.png",
            "text": [" one ", "", "two"],
            "width": float("nan"),
            "height": None,
        },
        "",
        {"filename": "sub/c.png", "caption": "c", "width": 0, "height": 30, "loss_weight": None},
        entry | {"caption_or_tags": "again"},
        {"filename": "cafe\u0301.png", "text": "a café"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n").rstrip())
    source = open_list(path)
    assert [source.name(i) for i in range(5)] == [
        "a.png",
        "b.png",
        "sub/c.png",
        "a.png",
        "caf\u00e9.png",
    ]
    assert source.skip_counts == {}
    assert [source.captions(i) for i in range(4)] == [("x, y",), ("one", "two"), ("c",), ("again",)]
    assert source.sizes.tolist() == [[30, 20], [12, 10], [12, 10], [30, 20], [12, 10]]
    assert source.load_image(4).size == (12, 10)
    assert source.loss_weights.tolist() == [0.5, 1, 1, 1, 1]
    assert [source.has_tags(i) for i in range(4)] == [True, False, False, True]


def test_the_marker_of_tags_may_be_a_text_or_a_number(tmp_path):
    save(tmp_path / "x.png")
    markers = {False: (False, 0, 0.0, None, "false", "False", " FALSE", "0", "")}
    markers |= {True: (True, 1, 1.0, "true", "True", "1")}
    for expected, values in markers.items():
        lines = [{"filename": "x.png", "text": "x", "is_tag_based": value} for value in values]
        source = open_list(write_lines(tmp_path / f"{expected}.jsonl", *lines))
        assert [source.has_tags(i) for i in range(len(source))] == [expected] * len(values)


def test_images_are_below_the_root_or_anywhere(tmp_path):
    save(tmp_path / "lists" / "a.png", 1)
    save(tmp_path / "root" / "a.png", 2)
    absolute_path = save(tmp_path / "apart" / "a.png", 3)
    with fsspec.open("memory://jsonl/a.png", "wb") as file:
        file.write(save(tmp_path / "apart" / "b.png", 4).read_bytes())
    names = ["a.png", str(absolute_path), "memory://jsonl/a.png"]
    path = write_lines(
        tmp_path / "lists" / "list.jsonl", *({"filename": name, "text": "x"} for name in names)
    )

    def gray_values(source):
        return [source.load_image(i).getpixel((0, 0))[0] for i in range(len(source))]

    assert gray_values(open_list(path)) == [1, 3, 4]
    source = open_list(path, tmp_path / "root")
    assert gray_values(pickle.loads(pickle.dumps(source))) == [2, 3, 4]
    assert [source.name(i) for i in range(3)] == names
    assert gray_values(open_list(path, "memory://jsonl")) == [4, 3, 4]
    with fsspec.open("memory://jsonl/list.jsonl", "wb") as file:
        file.write(path.read_bytes())
    (record, *_) = records = list(JsonlListing("memory://jsonl/list.jsonl").scan(1))
    assert len(records) == 3
    assert (record.width, record.height) == (12, 10)


def test_records_equal_those_of_a_folder(tmp_path):
    names = [f"{i}.png" for i in range(5)]
    for i, name in enumerate(names):
        save(tmp_path / name, i, (10 + i, 10))
    path = write_lines(
        tmp_path / "metadata.jsonl",
        *({"file_name": name, "text": f"of {name}", "loss_weight": 2} for name in names),
    )
    records = [record._replace(file_state="") for record in JsonlListing(str(path)).scan(2)]
    assert records == list(FolderListing(str(tmp_path)).scan(2))


UNUSABLE = {
    "no JSON": ("{", "bad line"),
    "no object": ("[1]", "bad line"),
    "deep": ("[" * 100_000, "bad line"),
    "no name": ({"text": "x"}, "bad line"),
    "empty name": ({"filename": "", "text": "x"}, "bad line"),
    "name with a zero": ({"filename": "a\0.png", "text": "x"}, "bad line"),
    "surrogate in a name": ({"filename": "\ud800.png", "text": "x"}, "bad line"),
    "caption in a table": ({"filename": "x.png", "text": {"en": "x"}}, "bad line"),
    "width in words": ({"filename": "x.png", "text": "x", "width": "9", "height": 9}, "bad line"),
    "negative width": ({"filename": "x.png", "text": "x", "width": -9, "height": 9}, "bad line"),
    "half a pixel": ({"filename": "x.png", "text": "x", "width": 9.5, "height": 9}, "bad line"),
    "infinite width": (
        '{"filename": "x.png", "text": "x", "width": Infinity, "height": 9}',
        "bad line",
    ),
    "weight in words": ({"filename": "x.png", "text": "x", "loss_weight": "1"}, "bad line"),
    "boolean weight": ({"filename": "x.png", "text": "x", "loss_weight": True}, "bad line"),
    "zero weight": (
        {"filename": "x.png", "text": "x", "loss_weight": 0},
        "loss_weight not above 0",
    ),
    "negative weight": (
        {"filename": "x.png", "text": "x", "loss_weight": -1.0},
        "loss_weight not above 0",
    ),
    "infinite weight": (
        '{"filename": "x.png", "text": "x", "loss_weight": 1e39}',
        "loss_weight not above 0",
    ),
    "subnormal weight": (
        '{"filename": "x.png", "text": "x", "loss_weight": 1e-50}',
        "loss_weight not above 0",
    ),
    "weight that is not a number": (
        '{"filename": "x.png", "text": "x", "loss_weight": NaN}',
        "loss_weight not above 0",
    ),
    "a field twice": ('{"filename": "x.png", "text": "x", "text": "y"}', "bad line"),
    **{
        f"tags {marker!r}": ({"filename": "x.png", "text": "x", "is_tag_based": marker}, "bad line")
        for marker in ("no", "none", 2, -1, 0.5, [], [True], {"a": 1})
    },
    "no caption": ({"filename": "x.png"}, "empty caption"),
    "empty captions": ({"filename": "x.png", "text": ["", " "]}, "empty caption"),
    "surrogate in a caption": ({"filename": "x.png", "text": "\udc00"}, "caption not in UTF-8"),
    "declared large": (
        {"filename": "x.png", "text": "x", "width": 10_000, "height": 9_000},
        "too large",
    ),
    "declared small": ({"filename": "x.png", "text": "x", "width": 3, "height": 500}, "too small"),
    "no file": ({"filename": "none.png", "text": "x"}, "missing file"),
    "no remote file": ({"filename": "memory://none.png", "text": "x"}, "missing file"),
    "no folder": ({"filename": "x.png/none.png", "text": "x"}, "missing file"),
    "no image": ({"filename": "list.jsonl", "text": "x"}, "not an image"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_lines_are_counted(case, tmp_path, capsys):
    line, kind = UNUSABLE[case]
    save(tmp_path / "x.png")
    source = open_list(
        write_lines(tmp_path / "list.jsonl", {"filename": "x.png", "text": "x"}, line)
    )
    assert len(source) == 1
    assert source.skip_counts == {kind: 1}
    assert kind != "bad line" or "1 × bad line ('line 2')" in capsys.readouterr().err


def write_sized_list(folder, count, missing=()):
    """Write images whose gray values are their indices, and a list that gives their sizes."""
    for i in set(range(count)) - set(missing):
        save(folder / f"{i}.png", i)
    lines = [
        {"filename": f"{i}.png", "text": [f"a {i}", f"b {i}"], "width": 12, "height": 10}
        for i in range(count)
    ]
    return write_lines(folder / "list.jsonl", *lines)


def test_a_missing_file_of_declared_size_is_skipped(tmp_path, capsys):
    data = settings(write_sized_list(tmp_path, 6, missing=(1, 4)), batch_size=6)
    source = open_source(data, "train")
    assert len(source) == 6
    assert source.skip_counts == {}
    with pytest.raises(UnusableError, match=r"^missing file$"):
        source.load_image(4)
    (batch,) = Batches(source, data, HashEncoder(8, 6), 0, 1, "one_pad").start(0)
    assert batch["skipped"] == 2
    assert sorted(batch["weight"]) == [0, 0, 1, 1, 1, 1]
    assert "'4.png' cannot be used (missing file) and is skipped" in capsys.readouterr().err
    (tmp_path / "4.png").mkdir()
    with pytest.raises(UnusableError, match=r"^missing file$"):
        source.load_image(4)


def test_missing_lists_and_folders_are_errors(tmp_path):
    with pytest.raises(
        config.ConfigError,
        match=r"data.path=.*none.jsonl cannot be read \(No such file or directory\): give a file",
    ):
        open_list(tmp_path / "none.jsonl")
    with pytest.raises(config.ConfigError, match=r"data.path=.* cannot be read"):
        open_list(tmp_path)
    path = write_sized_list(tmp_path, 1)
    with pytest.raises(config.ConfigError, match=r"data.root=.*list.jsonl is not a folder: give"):
        open_list(path, path)
    listing = JsonlListing(str(path))
    path.unlink()
    with pytest.raises(DataError, match=r"list.jsonl cannot be read"):
        list(listing.scan(1))


def test_a_changed_list_is_read_again(tmp_path):
    path = write_sized_list(tmp_path, 3)
    identity, first = JsonlListing(str(path)).identity, open_list(path).fingerprint()
    assert (
        JsonlListing(str(path)).identity
        == identity
        != JsonlListing(str(path), str(tmp_path / "..")).identity
    )
    path.write_text(path.read_text().replace("a 1", "a one"))
    assert open_list(path).captions(1) == ("a one", "b 1")
    assert (second := open_list(path).fingerprint()) != first
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    write_lines(
        path, *({"loss_weight": 2.0} | line for line in lines)
    )  # the images and captions are the same
    assert open_list(path).fingerprint() not in (first, second)


# --- files that change while the list does not ----------------------------------------------------


def test_files_that_appear_or_change_are_scanned_again(tmp_path, capsys):
    save(tmp_path / "a.png")
    (tmp_path / "page.png").write_text("<html>404</html>")
    names = ["a.png", "page.png", "late.png", "mount/b.png"]
    path = write_lines(tmp_path / "list.jsonl", *({"filename": n, "text": "x"} for n in names))
    assert open_list(path).skip_counts == {"not an image": 1, "missing file": 2}
    number = 0

    def reopen():
        nonlocal number
        source, is_again = open_list(path), "scanned again" in capsys.readouterr().err
        number += is_again
        assert source.dataset_index.path.suffix == (f".{number}" if number else "")
        return source, is_again

    assert reopen()[1] is False
    for change, sizes in [
        (lambda: save(tmp_path / "late.png", size=(13, 10)), [[12, 10], [13, 10]]),
        (lambda: save(tmp_path / "mount" / "b.png"), [[12, 10], [13, 10], [12, 10]]),
        (lambda: save(tmp_path / "a.png", size=(30, 20)), [[30, 20], [13, 10], [12, 10]]),
        (lambda: save(tmp_path / "page.png"), [[30, 20], [12, 10], [13, 10], [12, 10]]),
    ]:
        change()
        source, is_again = reopen()
        assert is_again
        assert source.sizes.tolist() == sizes
        assert source.load_image(0).size == tuple(sizes[0])
        assert reopen()[1] is False
    assert source.skip_counts == {}


def test_a_damaged_record_is_scanned_again(tmp_path):
    save(tmp_path / "a.png")
    path = write_lines(tmp_path / "list.jsonl", {"filename": "a.png", "text": "x"})
    records_path = open_list(path).dataset_index.path / "records.jsonl"
    records_path.write_bytes(bytes(records_path.stat().st_size))
    assert open_list(path).captions(0) == ("x",)


def test_a_file_that_is_lost_again_changes_nothing(tmp_path, capsys):
    """It is reported and skipped when it is needed, and the run can resume."""
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    path = write_lines(
        tmp_path / "list.jsonl", *({"filename": f"{n}.png", "text": "x"} for n in "ab")
    )
    fingerprint = open_list(path).fingerprint()
    content = (tmp_path / "b.png").read_bytes()
    (tmp_path / "b.png").unlink()
    assert open_list(path).fingerprint() == fingerprint
    (tmp_path / "b.png").write_bytes(content)
    assert open_list(path).fingerprint() == fingerprint


@pytest.mark.parametrize("kind", ["unreadable", "broken disk"])
def test_files_that_become_readable_are_scanned_again(kind, tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "b.png")
    path = write_lines(
        tmp_path / "list.jsonl", *({"filename": f"{n}.png", "text": "x"} for n in "ab")
    )
    open_local, code = storage._open_local, errno.EACCES if kind == "unreadable" else errno.EIO

    def fail(path):
        if path.endswith("b.png"):
            raise OSError(code, "no")
        return open_local(path)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_open_local", fail)
        assert open_list(path).skip_counts == {"unreadable file": 1}
        assert open_list(path).skip_counts == {"unreadable file": 1}
    assert open_list(path).skip_counts == {}


def test_remote_failures_are_looked_at_in_samples(tmp_path, monkeypatch):
    names = [f"memory://late/{i}.png" for i in range(300)]
    save(tmp_path / "a.png")
    path = write_lines(
        tmp_path / "list.jsonl",
        {"filename": "a.png", "text": "x"},
        *({"filename": n, "text": "x"} for n in names),
    )
    assert open_list(path).skip_counts == {"missing file": 300}
    checked = []
    get_file_state = storage.get_file_state
    monkeypatch.setattr(
        storage, "get_file_state", lambda a: (checked.append(a), get_file_state(a))[1]
    )
    assert open_list(path).skip_counts == {"missing file": 300}
    assert 32 <= sum(address.startswith("memory") for address in checked) <= 64
    for name in names:
        with fsspec.open(name, "wb") as file:
            file.write((tmp_path / "a.png").read_bytes())
    assert len(open_list(path)) == 301


@pytest.mark.slow
def test_worker_processes_load_the_same_batches(tmp_path):
    path = write_sized_list(tmp_path, 20, missing=(3,))

    def load_batches(num_workers):
        data = settings(
            path,
            batch_size=6,
            num_workers=num_workers,
            flip_probability=0.5,
            crop="random",
            caption_dropout=0.3,
        )
        return list(
            Batches(open_source(data, "train"), data, HashEncoder(8, 6), 0, 9, "one_pad").start(2)
        )

    threads, processes = load_batches(0), load_batches(2)
    assert len(threads) == len(processes) == 7
    assert sum(batch["skipped"] for batch in threads) > 0
    assert all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(threads, processes)
    )
