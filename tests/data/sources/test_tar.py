"""Shards of WebDataset: what is a sample, where its image lies, and what broken shards lose."""

import gzip
import pickle
import tarfile

import pytest

from radiance import config
from radiance.data.datasets import DataError, open_source
from radiance.data.listing import IndexRecord, Unusable
from radiance.data.sources import tar
from tests.helpers.toy_shards import fill_tar, toy_image, sample, write_tar


def settings(path, directory, **more):
    more = {
        "side": 8,
        "enlarge": 2.0,
        "threads": 2,
        "validation": 1e-9,
        "caption_dropout": 0.0,
    } | more
    return config.Data(source="tar", path=str(path), cache_dir=str(directory), **more)


def opened(path, directory, **more):
    return open_source(settings(path, directory, **more), "train")


def names(source):
    return [source.name(i) for i in range(len(source))]


# --- samples ------------------------------------------------------------------------------------------------------------


def test_files_of_one_key_are_a_sample(tmp_path):
    files = {
        "a.jpg": toy_image(7, (30, 20), "JPEG"), "a.txt": "one\n two \n", "a.json": '{"caption": "listed", "is_tag_based": true, "loss_weight": 0.5}',
        "./b/c.d.e.png": b"no suffix of an image", "./b/c.PNG": toy_image(8), "./b/c.json": '{"caption_or_tags": "", "text": ["x", " y "]}',
        "e/a.webp": toy_image(9, kind="WEBP"), "e/a.cls": b"3", "e/a.json": '{"caption": "by caption", "loss_weight": null}',
    }  # fmt: skip
    source = opened(write_tar(tmp_path / "x.tar", files), tmp_path)
    assert names(source) == ["x/a", "x/b/c", "x/e/a"]
    assert source.skip_counts == {}
    assert [source.captions(i) for i in range(3)] == [("one", "two"), ("x", "y"), ("by caption",)]
    assert [source.has_tags(i) for i in range(3)] == [
        True,
        False,
        False,
    ]
    assert source.loss_weights.tolist() == [0.5, 1, 1]
    assert source.sizes.tolist() == [[30, 20], [12, 10], [12, 10]]
    assert [source.catalogue.read(i) for i in range(3)] == [
        files["a.jpg"],
        files["./b/c.PNG"],
        files["e/a.webp"],
    ]
    assert [source.load_image(i).getpixel((0, 0))[0] for i in range(3)] == [7, 8, 9]


def test_files_of_one_key_need_not_stand_together(tmp_path):
    files = {
        "a.png": toy_image(1),
        "b.png": toy_image(2),
        "a.txt": "of a",
        "b.txt": "of b",
        "a.json": "{}",
    }
    source = opened(write_tar(tmp_path / "x.tar", files), tmp_path)
    assert [source.captions(i) for i in range(2)] == [("of a",), ("of b",)]


@pytest.mark.parametrize("how", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names(how, tmp_path):
    key = "ordner/" + "ö" * 300
    source = opened(write_tar(tmp_path / "x.tar", sample(key, 5), how), tmp_path)
    assert names(source) == [f"x/{key}"]
    assert source.load_image(0).getpixel((0, 0))[0] == 5


def test_what_is_left_out(tmp_path):
    good = sample("good")
    files = good | {
        "alone.txt": "no image",
        "mute.png": toy_image(), "empty.png": toy_image(), "empty.txt": "\n",
        "two.png": toy_image(), "two.jpg": toy_image(kind="JPEG"), "two.txt": "which?",
        "text.png": b"no image", "text.txt": "a caption",
        "new.jxl": b"\xff\x0a", "new.txt": "a caption",
        "list.png": toy_image(), "list.json": "[1]", "broken.png": toy_image(), "broken.json": "{",
        "number.png": toy_image(), "number.json": '{"text": 3}', "latin.png": toy_image(), "latin.txt": "é".encode("latin-1"),
        "weight.png": toy_image(), "weight.json": '{"text": "a", "loss_weight": -1}',
        "._good.png": b"what a Mac leaves", "sub/.hidden": b"",
    }  # fmt: skip
    source = opened(write_tar(tmp_path / "x.tar", files), tmp_path)
    assert names(source) == ["x/good"]
    assert source.skip_counts == {
        "no image": 1, "no caption": 1, "empty caption": 1, "several images of one key": 1, "not an image": 1,
        "format that is not read": 1, "bad record": 3, "caption not in UTF-8": 1, "loss_weight not above 0": 1,
    }  # fmt: skip


# --- shards -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "shards"),
    [
        ("", "a/0008 a/0009 a/0010 b/0008"),
        ("a", "0008 0009 0010"),
        ("a/0009.tar", "0009"),
        ("a/*.tar", "0008 0009 0010"),
        ("*/0008.tar", "a/0008 b/0008"),
        ("a/{0009..0010}.tar", "0009 0010"),
        ("a/00{8..10}.tar", None),
        ("a/{0009,000{8..9}}.tar", "0008 0009"),
        ("{a/0010,b/0008}.tar", "a/0010 b/0008"),
        ("{a,b}", "a/0008 a/0009 a/0010 b/0008"),
        ("a/{0009..0011}.tar", None),
        ("c", None),
        ("a/*.zip", None),
    ],
)
def test_shards_by_folder_and_pattern(path, shards, tmp_path):
    for number, name in enumerate(("a/0010", "a/0008", "b/0008", "a/0009")):
        write_tar(tmp_path / "in" / f"{name}.tar", sample("key", number))
    (tmp_path / "in" / "a" / "stats.json").write_text("{}")
    path = str(tmp_path / "in") + ("/" + path if path else "")
    if shards is None:
        with pytest.raises(
            config.ConfigError, match=r"data\.path=.* is no \.tar file and has none in it"
        ):
            tar.TarListing(path)
    else:
        assert names(opened(path, tmp_path)) == [f"{shard}/key" for shard in shards.split()]


def test_a_name_that_looks_like_a_pattern(tmp_path):
    path = write_tar(tmp_path / "all [of] {them}" / "x.tar", sample("a"))
    assert names(opened(path, tmp_path)) == names(opened(path.parent, tmp_path)) == ["x/a"]


def test_other_shards_are_another_listing(tmp_path):
    before = tar.TarListing(str(fill_tar(tmp_path))).identity
    assert tar.TarListing(str(tmp_path)).identity == before
    write_tar(tmp_path / "0001.tar", sample("other"))
    assert (
        tar.TarListing(str(tmp_path)).identity
        != before
        != tar.TarListing(str(tmp_path / "*[01].tar")).identity
    )


@pytest.mark.parametrize(
    ("packed", "tool"),
    [(gzip.compress, "gunzip"), (lambda content: b"\x28\xb5\x2f\xfd" + content, "unzstd")],
)
def test_a_compressed_shard(packed, tool, tmp_path):
    for name in ("x.tar", "x.tar.gz"):
        (tmp_path / name).write_bytes(
            packed(write_tar(tmp_path / "whole.tar", sample("a")).read_bytes())
        )
        with pytest.raises(
            DataError, match=f"{name} is compressed, so that .* unpack it with {tool}"
        ):
            opened(tmp_path / name, tmp_path)


def test_a_shard_that_is_none(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match="x.tar is no tar file .* fetch it again"):
        opened(tmp_path, tmp_path)


def test_shards_that_are_cut_short(tmp_path):
    """Wherever that happens, what is before it can be used and what is not there is counted."""
    keys = [f"{i:02d}" for i in range(4)]
    path = write_tar(
        tmp_path / "x.tar",
        {name: file for i, key in enumerate(keys) for name, file in sample(key, i).items()},
    )
    content = path.read_bytes()
    assert names(opened(path, tmp_path / "whole")) == [f"x/{key}" for key in keys]
    ends = [
        2048 * i + 1536 + len(sample("", i)[".json"]) for i in range(4)
    ]  # each file has a block of 512 bytes, after another for its head
    for cut in range(0, 4 * 2048 + 512, 44):
        path.write_bytes(content[:cut])
        rows = list(tar.TarListing(str(path)).scan(1))
        whole = [f"x/{key}" for key, end in zip(keys, ends) if end <= cut]
        left = [row for row in rows if isinstance(row, Unusable)]
        assert [row.name for row in rows if isinstance(row, IndexRecord)] == whole, cut
        assert left[-1] == ("x", "shard cut short") and len(left) <= 2, cut
        assert all(row.kind in ("shard cut short", "no caption") for row in left), cut


def test_bytes_that_are_no_head_of_a_member(tmp_path):
    path = write_tar(tmp_path / "x.tar", sample("a", 1) | sample("b", 2))
    content = bytearray(path.read_bytes())
    content[2048:2060] = b"something else"[:12]
    path.write_bytes(content)
    source = opened(path, tmp_path)
    assert names(source) == ["x/a"]
    assert source.skip_counts == {"shard cut short": 1}


def test_a_shard_that_goes_or_shrinks_while_it_is_needed(tmp_path):
    source = opened(fill_tar(tmp_path), tmp_path)
    (tmp_path / "0000.tar").write_bytes((tmp_path / "0000.tar").read_bytes()[:600])
    with pytest.raises(DataError, match="0000.tar is shorter than it was"):
        source.load_image(1)
    (tmp_path / "0001.tar").unlink()
    with pytest.raises(DataError, match="0001.tar cannot be read .*No such file"):
        source.load_image(6)


def test_what_is_sent_to_a_worker_is_small(tmp_path):
    listing = tar.TarListing(str(fill_tar(tmp_path)))
    again = pickle.loads(pickle.dumps(listing))
    row = list(listing.scan(1))[7]
    assert again.read(row.location) == listing.read_file(row.location) == toy_image(7)
    assert not hasattr(again, "shards")
