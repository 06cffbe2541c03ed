"""The data source `tar`: samples, the shards that a path names, and broken shards."""

import contextlib
import gzip
import io
import pickle
import tarfile

import pytest

from radiance import config
from radiance.base.errors import DataError
from radiance.data.datasets import open_source
from radiance.data.listing import IndexRecord, UnusableRecord, compute_split_hash
from radiance.data.sources import tar
from tests.helpers.toy_shards import (
    fill_tar,
    gray_values,
    shard_settings,
    tar_sample,
    toy_image,
    write_tar,
)


def open_shards(path, cache_dir):
    return open_source(shard_settings("tar", path, cache_dir), "train")


def names(source):
    return [source.name(i) for i in range(len(source))]


# --- samples --------------------------------------------------------------------------------------


def test_files_of_one_key_are_a_sample(tmp_path):
    files = {
        "a.jpg": toy_image(7, (30, 20), "JPEG"),
        "a.txt": "one\n two \n",
        "a.json": '{"caption": "listed", "is_tag_based": true, "loss_weight": 0.5}',
        "./b/c.d.e.png": b"no suffix of an image",
        "./b/c.PNG": toy_image(8),
        "./b/c.json": '{"caption_or_tags": "", "text": ["x", " y "]}',
        "e/a.webp": toy_image(9, image_format="WEBP"),
        "e/a.cls": b"3",
        "e/a.json": '{"caption": "by caption", "loss_weight": null}',
    }
    source = open_shards(write_tar(tmp_path / "x.tar", files), tmp_path)
    assert names(source) == ["x/a", "x/b/c", "x/e/a"]
    assert source.skip_counts == {}
    assert [source.captions(i) for i in range(3)] == [("one", "two"), ("x", "y"), ("by caption",)]
    assert [source.has_tags(i) for i in range(3)] == [True, False, False]
    assert source.loss_weights.tolist() == [0.5, 1, 1]
    assert source.sizes.tolist() == [[30, 20], [12, 10], [12, 10]]
    assert [source.dataset_index.read_file(i) for i in range(3)] == [
        files["a.jpg"],
        files["./b/c.PNG"],
        files["e/a.webp"],
    ]
    assert gray_values(source) == [7, 8, 9]


def test_files_of_one_key_need_not_be_adjacent(tmp_path):
    files = {
        "a.png": toy_image(1),
        "b.png": toy_image(2),
        "a.txt": "of a",
        "b.txt": "of b",
        "a.json": "{}",
    }
    source = open_shards(write_tar(tmp_path / "x.tar", files), tmp_path)
    assert [source.captions(i) for i in range(2)] == [("of a",), ("of b",)]


def test_keys_may_contain_dots(tmp_path):
    """Files such as c.mask.png are not samples, because WebDataset counts them to c."""
    samples = {"c": 3, "v1.2/a.b.0": 1, "v1.2/a.b.1": 2}
    files = {"c.mask.png": toy_image(9), "c.mask.txt": "of the mask"}
    files |= {name: file for key, i in samples.items() for name, file in tar_sample(key, i).items()}
    path = write_tar(tmp_path / "x.tar", files | {"v1.2/._a.b.0.png": b"what a Mac leaves"})
    source = open_shards(path, tmp_path)
    assert names(source) == ["x/c", "x/v1.2/a.b.0", "x/v1.2/a.b.1"]
    assert gray_values(source) == [3, 1, 2]
    assert source.skip_counts == {}
    split_hashes = source.dataset_index.metadata["split_hash"]
    assert len(set(split_hashes)) == 3
    assert split_hashes[0] == compute_split_hash("x/c")


def test_one_name_twice_is_counted(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as shard:
        for name, content in [
            *tar_sample("good", 1).items(),
            *tar_sample("image", 2).items(),
            ("./image.PNG", toy_image(3)),
            *tar_sample("text", 4).items(),
            ("text.txt", b"one"),
            ("text.txt", b"two"),
            ("good.cls", b"1"),
            ("good.cls", b"2"),
        ]:
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))
    source = open_shards(path, tmp_path)
    assert gray_values(source) == [1]
    assert source.skip_counts == {"two files of one name": 2}


@pytest.mark.parametrize("tar_format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read(tar_format, tmp_path):
    key = "ordner/" + "ö" * 300
    source = open_shards(write_tar(tmp_path / "x.tar", tar_sample(key, 5), tar_format), tmp_path)
    assert names(source) == [f"x/{key}"]
    assert source.load_image(0).getpixel((0, 0))[0] == 5


def test_unusable_samples_are_counted(tmp_path):
    good = tar_sample("good")
    files = good | {
        "alone.txt": "no image",
        "mute.png": toy_image(),
        "empty.png": toy_image(),
        "empty.txt": "\n",
        "two.png": toy_image(),
        "two.jpg": toy_image(image_format="JPEG"),
        "two.txt": "which?",
        "text.png": b"no image",
        "text.txt": "a caption",
        "new.jxl": b"\xff\x0a",
        "new.txt": "a caption",
        "list.png": toy_image(),
        "list.json": "[1]",
        "broken.png": toy_image(),
        "broken.json": "{",
        "number.png": toy_image(),
        "number.json": '{"text": 3}',
        "latin.png": toy_image(),
        "latin.txt": "é".encode("latin-1"),
        "weight.png": toy_image(),
        "weight.json": '{"text": "a", "loss_weight": -1}',
        "._good.png": b"what a Mac leaves",
        "sub/.hidden": b"",
    }
    source = open_shards(write_tar(tmp_path / "x.tar", files), tmp_path)
    assert names(source) == ["x/good"]
    assert source.skip_counts == {
        "no image": 1,
        "no caption": 1,
        "empty caption": 1,
        "several images of one key": 1,
        "not an image": 1,
        "unsupported format": 1,
        "bad record": 3,
        "caption not in UTF-8": 1,
        "loss_weight not above 0": 1,
    }


# --- bounds on work -------------------------------------------------------------------------------


def make_header(name: bytes, size: int, member_type: bytes = tarfile.REGTYPE) -> bytes:
    """Return the header of a member, with a size in base 256 that may be negative."""
    header = bytearray(tarfile.TarInfo(name.decode()).tobuf(tarfile.USTAR_FORMAT))
    header[124:136] = (size % 256**12 | 0x80 << 88).to_bytes(12, "big")
    header[156:157] = member_type
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header)


def pax_header(**properties: str) -> bytes:
    """Return the header of properties of the next member."""
    header = tarfile.TarInfo._create_pax_generic_header(properties, tarfile.XHDTYPE, "utf-8")
    return header


@pytest.mark.parametrize(
    "content",
    [
        make_header(b"b.png", -512),
        make_header(b"b.png", -(2**60)),
        make_header(b"b.png", 2**80),
        make_header(b"b.png", 2**40, tarfile.XHDTYPE),
        make_header(b"b.png", -1, tarfile.GNUTYPE_LONGNAME),
        pax_header(size="-2048") + make_header(b"b.png", 0),
        pax_header(size="1e99") + make_header(b"b.png", 0),
        pax_header(size="9" * 4000) + make_header(b"b.png", 0),
        pax_header(**{"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}) + make_header(b"b.png", 0),
        pax_header(**{"GNU.sparse.map": "x,y"}) + make_header(b"b.png", 0),
        make_header(b"b.png", 512, tarfile.GNUTYPE_SPARSE)[:482] + b"\1" * 30,
        (make_header(b"b.png", 0, tarfile.GNUTYPE_LONGNAME) * 3000),
        (make_header(b"b.png", 2**20 + 1, tarfile.GNUTYPE_LONGNAME) + bytes(2**21)),
    ],
)
def test_a_shard_ends_at_an_impossible_member(content, tmp_path):
    path = write_tar(tmp_path / "x.tar", tar_sample("a", 1))
    path.write_bytes(path.read_bytes()[:2048] + content + bytes(1024))
    records = list(tar.TarListing(str(path)).scan(1))
    assert records[0].name == "x/a"
    assert [item for item in records[1:] if isinstance(item, IndexRecord)] == []
    (tmp_path / "x.tar").write_bytes(content + bytes(1024))
    with contextlib.suppress(DataError):
        assert not any(isinstance(item, IndexRecord) for item in tar.TarListing(str(path)).scan(1))


def test_long_annotations_are_not_read(tmp_path):
    files = tar_sample("a") | {"b.png": toy_image(), "b.txt": b"x" * (2**20 + 1)}
    source = open_shards(write_tar(tmp_path / "x.tar", files), tmp_path)
    assert source.skip_counts == {"too large": 1}


# --- shards ---------------------------------------------------------------------------------------


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
def test_shards_are_named_by_a_folder_or_a_pattern(path, shards, tmp_path):
    for index, name in enumerate(("a/0010", "a/0008", "b/0008", "a/0009")):
        write_tar(tmp_path / "in" / f"{name}.tar", tar_sample("key", index))
    (tmp_path / "in" / "a" / "stats.json").write_text("{}")
    path = str(tmp_path / "in") + ("/" + path if path else "")
    if shards is None:
        with pytest.raises(
            config.ConfigError, match=r"data\.path=.* is not a \.tar file and contains none"
        ):
            tar.TarListing(path)
    else:
        assert names(open_shards(path, tmp_path)) == [f"{shard}/key" for shard in shards.split()]


def test_a_path_that_looks_like_a_pattern_is_read(tmp_path):
    path = write_tar(tmp_path / "all [of] {them}" / "x.tar", tar_sample("a"))
    for shards in (path, path.parent):
        assert names(open_shards(shards, tmp_path)) == ["x/a"]


def test_linked_folders_of_shards_are_listed_once(tmp_path):
    write_tar(tmp_path / "in" / "a.tar", tar_sample("key"))
    for name in ("self", "again"):  # each of 40 levels would double the number of shards
        (tmp_path / "in" / name).symlink_to(tmp_path / "in", target_is_directory=True)
    (tmp_path / "in" / "broken.tar").symlink_to(tmp_path / "nowhere")
    assert names(open_shards(tmp_path / "in", tmp_path)) == ["a/key"]


def test_suffixes_of_shards_may_be_in_any_case(tmp_path):
    for index, name in enumerate(("a.tar", "a.TAR", "b.Tar")):
        write_tar(tmp_path / "in" / name, tar_sample("key", index))
    source = open_shards(tmp_path / "in", tmp_path)
    assert sorted(zip(names(source), gray_values(source))) == [
        ("a.TAR/key", 1),
        ("a/key", 0),
        ("b.Tar/key", 2),
    ]
    assert len(open_shards(tmp_path / "in" / "a.TAR", tmp_path)) == 1


def test_the_identity_depends_on_the_shards(tmp_path):
    identity = tar.TarListing(str(fill_tar(tmp_path))).identity
    assert tar.TarListing(str(tmp_path)).identity == identity
    write_tar(tmp_path / "0001.tar", tar_sample("other"))
    assert tar.TarListing(str(tmp_path)).identity != identity
    assert tar.TarListing(str(tmp_path / "*[01].tar")).identity != identity


@pytest.mark.parametrize(
    ("compress", "tool"),
    [(gzip.compress, "gunzip"), (lambda content: b"\x28\xb5\x2f\xfd" + content, "unzstd")],
)
def test_a_compressed_shard_is_an_error(compress, tool, tmp_path):
    for name in ("x.tar", "x.tar.gz"):
        shard = write_tar(tmp_path / "complete.tar", tar_sample("a"))
        (tmp_path / name).write_bytes(compress(shard.read_bytes()))
        with pytest.raises(DataError, match=rf"{name} is compressed, .* unpack it with {tool}"):
            open_shards(tmp_path / name, tmp_path)


def test_a_file_that_is_not_a_shard_is_an_error(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"<html>404</html>" * 100)
    with pytest.raises(DataError, match=r"x.tar is not a tar file .* download it again"):
        open_shards(tmp_path, tmp_path)


def test_truncated_shards_are_used_as_far_as_they_go(tmp_path):
    keys = [f"{i:02d}" for i in range(4)]
    path = write_tar(
        tmp_path / "x.tar",
        {name: file for i, key in enumerate(keys) for name, file in tar_sample(key, i).items()},
    )
    content = path.read_bytes()
    assert names(open_shards(path, tmp_path / "complete")) == [f"x/{key}" for key in keys]
    # Each file has a block of 512 bytes, after another for its header.
    ends = [2048 * i + 1536 + len(tar_sample("", i)[".json"]) for i in range(4)]
    for cut in range(0, 4 * 2048 + 512, 44):
        path.write_bytes(content[:cut])
        entries = list(tar.TarListing(str(path)).scan(1))
        complete = [f"x/{key}" for key, end in zip(keys, ends) if end <= cut]
        unusable = [entry for entry in entries if isinstance(entry, UnusableRecord)]
        assert [entry.name for entry in entries if isinstance(entry, IndexRecord)] == complete, cut
        assert unusable[-1] == UnusableRecord("x", "truncated shard"), cut
        assert len(unusable) <= 2, cut
        assert all(entry.kind in ("truncated shard", "no caption") for entry in unusable), cut


def test_a_shard_is_used_up_to_a_broken_header(tmp_path):
    path = write_tar(tmp_path / "x.tar", tar_sample("a", 1) | tar_sample("b", 2))
    content = bytearray(path.read_bytes())
    content[2048:2060] = b"something else"[:12]
    path.write_bytes(content)
    source = open_shards(path, tmp_path)
    assert names(source) == ["x/a"]
    assert source.skip_counts == {"truncated shard": 1}


def test_a_shard_that_vanishes_or_shrinks_is_an_error(tmp_path):
    source = open_shards(fill_tar(tmp_path), tmp_path)
    (tmp_path / "0000.tar").write_bytes((tmp_path / "0000.tar").read_bytes()[:600])
    with pytest.raises(DataError, match=r"0000.tar is shorter than it was"):
        source.load_image(1)
    (tmp_path / "0001.tar").unlink()
    with pytest.raises(DataError, match=r"0001.tar cannot be read .*No such file"):
        source.load_image(6)


def test_a_pickled_listing_only_reads_files(tmp_path):
    listing = tar.TarListing(str(fill_tar(tmp_path)))
    copy = pickle.loads(pickle.dumps(listing))
    record = list(listing.scan(1))[7]
    assert copy.read_file(record.location) == listing.read_file(record.location) == toy_image(7)
    assert not hasattr(copy, "shards")
