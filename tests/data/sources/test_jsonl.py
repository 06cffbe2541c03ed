"""Lists of images: what their lines may say, what is believed, and what happens to files that are not there."""

import json
import pickle

import fsspec
import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.data.batches import Batches
from radiance.data.datasets import DataError, open_source
from radiance.data.decode import UnusableError
from radiance.data.sources.folder import FolderListing
from radiance.data.sources.jsonl import JsonlListing
from radiance.text.hash_encoder import HashEncoder


def save(path, grey=200, size=(12, 10)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (grey, grey, grey)).save(path)
    return path


def written(path, *lines):
    """A list of objects; of what is text already as it stands."""
    path.write_text(
        "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    )
    return path


def settings(path, root="", **more):
    more = {
        "enlarge": 2.0,
        "threads": 2,
        "caption_dropout": 0.0,
        "broken_limit": 1.0,
        "validation": 1e-9,
        "side": 8,
    } | more
    return config.Data(
        source="jsonl",
        path=str(path),
        root=str(root),
        cache_dir=str(path.parent / ".prepared"),
        **more,
    )


def opened(path, *values, **more):
    return open_source(settings(path, *values, **more), "train")


def test_the_fields_of_a_line(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png", "cafe\u0301.png"):
        save(tmp_path / name)
    trainer = {
        "filename": "a.png",
        "caption_or_tags": "x, y",
        "width": 30,
        "height": 20.0,
        "is_tag_based": True,
        "is_url_based": False,
    }
    path = written(
        tmp_path / "list.jsonl",
        trainer | {"loss_weight": 0.5},
        {
            "file_name": "./b.png",
            "text": [" one ", "", "two"],
            "width": float("nan"),
            "height": None,
        },
        "",
        {"filename": "sub/c.png", "caption": "c", "width": 0, "height": 30, "loss_weight": None},
        trainer | {"caption_or_tags": "again"},
        {"filename": "cafe\u0301.png", "text": "a café"},
    )
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n").rstrip())
    source = opened(path)
    assert [source.name(i) for i in range(5)] == [
        "a.png",
        "b.png",
        "sub/c.png",
        "a.png",
        "caf\u00e9.png",
    ]
    assert source.skip_counts == {}
    assert [source.captions(i) for i in range(4)] == [("x, y",), ("one", "two"), ("c",), ("again",)]
    assert source.sizes.tolist() == [
        [30, 20],
        [12, 10],
        [12, 10],
        [30, 20],
        [12, 10],
    ]
    assert source.load_image(4).size == (12, 10)
    assert source.loss_weights.tolist() == [0.5, 1, 1, 1, 1]
    assert [source.has_tags(i) for i in range(4)] == [True, False, False, True]


def test_where_the_images_are(tmp_path):
    save(tmp_path / "lists" / "a.png", 1)
    save(tmp_path / "root" / "a.png", 2)
    apart = save(tmp_path / "apart" / "a.png", 3)
    with fsspec.open("memory://jsonl/a.png", "wb") as file:
        file.write(save(tmp_path / "apart" / "b.png", 4).read_bytes())
    names = ["a.png", str(apart), "memory://jsonl/a.png"]
    path = written(
        tmp_path / "lists" / "list.jsonl", *({"filename": name, "text": "x"} for name in names)
    )

    def shades(source):
        return [source.picture(i).getpixel((0, 0))[0] for i in range(len(source))]

    assert shades(opened(path)) == [1, 3, 4]
    source = opened(path, tmp_path / "root")
    assert shades(pickle.loads(pickle.dumps(source))) == [2, 3, 4]
    assert [source.name(i) for i in range(3)] == names
    assert shades(opened(path, "memory://jsonl")) == [4, 3, 4]
    with fsspec.open("memory://jsonl/list.jsonl", "wb") as file:
        file.write(path.read_bytes())
    (row, *_) = rows = list(JsonlListing("memory://jsonl/list.jsonl").scan(1))
    assert len(rows) == 3
    assert (row.width, row.height) == (12, 10)


def test_the_same_as_a_folder(tmp_path):
    names = [f"{i}.png" for i in range(5)]
    for i, name in enumerate(names):
        save(tmp_path / name, i, (10 + i, 10))
    path = written(
        tmp_path / "metadata.jsonl",
        *({"file_name": name, "text": f"of {name}", "loss_weight": 2} for name in names),
    )
    assert list(JsonlListing(str(path)).scan(2)) == list(FolderListing(str(tmp_path)).scan(2))


UNFIT = {
    "no JSON": ("{", "bad line"),
    "no object": ("[1]", "bad line"),
    "deep": ("[" * 100_000, "bad line"),
    "no name": ({"text": "x"}, "bad line"),
    "empty name": ({"filename": "", "text": "x"}, "bad line"),
    "name with a zero": ({"filename": "a\0.png", "text": "x"}, "bad line"),
    "half a character": ({"filename": "\ud800.png", "text": "x"}, "bad line"),
    "caption in a table": ({"filename": "x.png", "text": {"en": "x"}}, "bad line"),
    "side in words": ({"filename": "x.png", "text": "x", "width": "9", "height": 9}, "bad line"),
    "negative side": ({"filename": "x.png", "text": "x", "width": -9, "height": 9}, "bad line"),
    "half a pixel": ({"filename": "x.png", "text": "x", "width": 9.5, "height": 9}, "bad line"),
    "endless": ('{"filename": "x.png", "text": "x", "width": Infinity, "height": 9}', "bad line"),
    "weight in words": ({"filename": "x.png", "text": "x", "loss_weight": "1"}, "bad line"),
    "true weight": ({"filename": "x.png", "text": "x", "loss_weight": True}, "bad line"),
    "no weight": ({"filename": "x.png", "text": "x", "loss_weight": 0}, "loss_weight not above 0"),
    "negative weight": ({"filename": "x.png", "text": "x", "loss_weight": -1.0}, "loss_weight not above 0"),
    "endless weight": ('{"filename": "x.png", "text": "x", "loss_weight": 1e39}', "loss_weight not above 0"),
    "vanishing weight": ('{"filename": "x.png", "text": "x", "loss_weight": 1e-50}', "loss_weight not above 0"),
    "weight that is none": ('{"filename": "x.png", "text": "x", "loss_weight": NaN}', "loss_weight not above 0"),
    "no caption": ({"filename": "x.png"}, "empty caption"),
    "empty captions": ({"filename": "x.png", "text": ["", " "]}, "empty caption"),
    "half a letter": ({"filename": "x.png", "text": "\udc00"}, "caption not in UTF-8"),
    "declared large": ({"filename": "x.png", "text": "x", "width": 10_000, "height": 9_000}, "too large"),
    "declared small": ({"filename": "x.png", "text": "x", "width": 3, "height": 500}, "too small"),
    "no file": ({"filename": "none.png", "text": "x"}, "missing file"),
    "no file elsewhere": ({"filename": "memory://none.png", "text": "x"}, "missing file"),
    "no folder": ({"filename": "x.png/none.png", "text": "x"}, "missing file"),
    "no image": ({"filename": "list.jsonl", "text": "x"}, "not an image"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNFIT)
def test_what_cannot_be_used_is_counted(case, tmp_path, capsys):
    line, kind = UNFIT[case]
    save(tmp_path / "x.png")
    source = opened(written(tmp_path / "list.jsonl", {"filename": "x.png", "text": "x"}, line))
    assert len(source) == 1
    assert source.skip_counts == {kind: 1}
    assert kind != "bad line" or "1 × bad line ('line 2')" in capsys.readouterr().err


def declared(folder, count, missing=()):
    """Greys that say their number, of declared size."""
    for i in set(range(count)) - set(missing):
        save(folder / f"{i}.png", i)
    lines = [
        {"filename": f"{i}.png", "text": [f"a {i}", f"b {i}"], "width": 12, "height": 10}
        for i in range(count)
    ]
    return written(folder / "list.jsonl", *lines)


def test_a_file_of_declared_size_that_is_missing_is_passed_over(tmp_path, capsys):
    data = settings(declared(tmp_path, 6, missing=(1, 4)), batch=6)
    source = open_source(data, "train")
    assert len(source) == 6
    assert source.skip_counts == {}
    with pytest.raises(UnusableError, match="^missing file$"):
        source.load_image(4)
    (batch,) = Batches(source, data, HashEncoder(8, 6), 0, 1, "one_pad").start(0)
    assert batch["skipped"] == 2
    assert sorted(batch["weight"]) == [0, 0, 1, 1, 1, 1]
    assert "'4.png' cannot be used (missing file) and is skipped" in capsys.readouterr().err
    (tmp_path / "4.png").mkdir()
    with pytest.raises(UnusableError, match="^missing file$"):
        source.load_image(4)


def test_what_cannot_be_opened(tmp_path):
    with pytest.raises(
        config.ConfigError,
        match=r"data.path=.*none.jsonl cannot be read \(No such file or directory\): give a file",
    ):
        opened(tmp_path / "none.jsonl")
    with pytest.raises(config.ConfigError, match="data.path=.* cannot be read"):
        opened(tmp_path)
    path = declared(tmp_path, 1)
    with pytest.raises(config.ConfigError, match="data.root=.*list.jsonl is not a folder: give"):
        opened(path, path)
    listing = JsonlListing(str(path))
    path.unlink()
    with pytest.raises(DataError, match="list.jsonl cannot be read"):
        list(listing.scan(1))


def test_a_list_that_changes_is_read_again(tmp_path):
    path = declared(tmp_path, 3)
    identity, first = JsonlListing(str(path)).identity, opened(path).fingerprint()
    assert (
        JsonlListing(str(path)).identity
        == identity
        != JsonlListing(str(path), str(tmp_path / "..")).identity
    )
    path.write_text(path.read_text().replace("a 1", "a one"))
    assert opened(path).captions(1) == ("a one", "b 1")
    assert (second := opened(path).fingerprint()) != first
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    written(
        path, *({"loss_weight": 2.0} | line for line in lines)
    )  # the images and captions are the same
    assert opened(path).fingerprint() not in (first, second)


@pytest.mark.slow
def test_processes_read_the_same_batches(tmp_path):
    path = declared(tmp_path, 20, missing=(3,))

    def batches(workers):
        data = settings(
            path, batch=6, workers=workers, mirror=0.5, crop="random", caption_dropout=0.3
        )
        return list(
            Batches(open_source(data, "train"), data, HashEncoder(8, 6), 0, 9, "one_pad").start(2)
        )

    threads, processes = batches(0), batches(2)
    assert len(threads) == len(processes) == 7
    assert sum(batch["skipped"] for batch in threads) > 0
    assert all(
        a.keys() == b.keys() and all(np.array_equal(a[key], b[key]) for key in a)
        for a, b in zip(threads, processes)
    )
