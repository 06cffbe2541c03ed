"""Addresses: what the settings name, and the little that data may name."""

import base64
import json
import os
import subprocess
import sys

import fsspec
import pytest

from radiance import config
from radiance.config.data import COMPOUND_PROTOCOLS, PROTOCOLS
from radiance.data import storage
from radiance.data.addresses import (
    join_address,
    parent_address,
    resolve_address,
    resolve_filename,
)
from radiance.data.datasets import open_source
from radiance.data.listing import IndexRecord
from radiance.data.sources.folder import FolderListing
from radiance.data.sources.jsonl import JsonlListing
from radiance.data.sources.records import read_header_at
from radiance.data.unusable import UnusableError
from tests.helpers.toy_folders import save
from tests.helpers.toy_shards import toy_image


def put(address, content):
    with fsspec.open(address, "wb") as file:
        file.write(content)


def save_list(folder, *filenames):
    path = folder / "list.jsonl"
    path.write_text("".join(json.dumps({"filename": n, "text": "x"}) + "\n" for n in filenames))
    return path


def test_addresses_are_joined_and_resolved(tmp_path):
    table = [
        ("/a", "b/c.png", "/a/b/c.png"),
        ("s3://b", "c/d", "s3://b/c/d"),
        ("s3://b/", "./c", "s3://b/c"),
        ("memory://", "c", "memory://c"),
    ]
    for folder, path, expected in table:
        assert join_address(folder, path) == expected
        assert resolve_filename(folder, path, ()) == expected
    remote_parent = parent_address("memory://list.jsonl")
    assert join_address(remote_parent, "a.png") == "memory://a.png"
    assert join_address(parent_address("/b/list.jsonl"), "a.png") == "/b/a.png"
    (tmp_path / "link").symlink_to(tmp_path)
    assert resolve_address(str(tmp_path / "link")) == str(tmp_path)
    assert resolve_address(f"file://{tmp_path}/link") == str(tmp_path)
    assert resolve_address("s3://b//c") == "s3://b//c"


# --- what data may name ---------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["/a", "s3://b"])
def test_data_may_name_absolute_paths_and_urls_of_allowed_protocols(root):
    for filename, address in (
        ("/d.png", "/d.png"),
        ("file:///d.png", "/d.png"),
        ("https://c/d", "https://c/d"),
        ("s3://c/../d", "s3://c/../d"),
    ):
        assert resolve_filename(root, filename, PROTOCOLS) == address
        with pytest.raises(UnusableError, match=r"protocol not in data\.protocols"):
            resolve_filename(root, filename, ("gs",))


@pytest.mark.parametrize("root", ["/a", "s3://b"])
@pytest.mark.parametrize(
    "filename",
    [
        *(f"{protocol}://a.png::file:///ref.json" for protocol in COMPOUND_PROTOCOLS),
        "simplecache::https://c/d.png",
        "memory://a.png",
        "nowhere://a.png",
        "HTTPS://c/d.png",
        " https://c/d.png",
        "c://d.png",
        "a/b://c",
        "://x",
        "../a.png",
        "b/../../a.png",
        "..",
        "file://a.png",
        "file://~/a.png",
    ],
)
def test_data_may_name_nothing_else(root, filename):
    with pytest.raises(UnusableError):
        resolve_filename(root, filename, PROTOCOLS)


def test_a_line_opens_no_file_system_within_another(tmp_path):
    """fsspec's reference file system interprets the JSON file that the line names."""
    image = b"base64:" + base64.b64encode(toy_image(7))
    put("memory://ref.json", json.dumps({"version": 1, "refs": {"a.png": image.decode()}}).encode())
    names = [
        "reference://a.png::memory://ref.json",
        "nowhere://a.png",
        "good.png",
        "good.png::memory://ref.json",
    ]
    save(tmp_path / "good.png")
    path = save_list(tmp_path, *names)
    data = config.Data(
        source="jsonl",
        path=str(path),
        cache_dir=str(tmp_path),
        resolution=8,
        validation_fraction=0.0,
    )
    source = open_source(data, "train")
    assert [source.name(i) for i in range(len(source))] == ["good.png"]
    assert source.skip_counts == {"protocol not in data.protocols": 3}


def test_the_dataset_index_is_not_trusted_either(tmp_path):
    listing = JsonlListing(str(save_list(tmp_path)), "", PROTOCOLS)
    with pytest.raises(UnusableError, match="protocol not in"):
        listing.read_file("reference://a.png::memory://ref.json")
    with pytest.raises(UnusableError, match="path outside of the folder"):
        listing.read_file("../../a.png")


def test_names_in_a_listing_open_no_file_system_within_another(tmp_path):
    """A store may contain names with "::"; local:// reads this one by way of fsspec."""
    save(tmp_path / "reference::a.png", "a caption")
    (record,) = FolderListing(f"local://{tmp_path}").scan(1)
    assert isinstance(record, IndexRecord)
    assert record.captions == ("a caption",)


def test_names_are_utf_8_in_every_locale(tmp_path):
    """Names decide splits."""
    save(tmp_path / "猫.png")
    save(tmp_path / os.fsdecode(b"caf\xe9.png"), "not UTF-8")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "猫.png", "text": "a cat"}', "utf-8")
    path = save_list(tmp_path, "猫.png", "caf\udce9.png")
    code = (
        "from radiance.data.sources.folder import FolderListing; "
        "from radiance.data.sources.jsonl import JsonlListing; "
        f"listings = [FolderListing({str(tmp_path)!r}), JsonlListing({str(path)!r})]; "
        "records = [record for listing in listings for record in listing.scan(1)]; "
        "print([(ascii(record.name), record.captions) for record in records])"
    )
    outputs = []
    for utf_8 in "10":
        variables = {"LC_ALL": "C", "PYTHONUTF8": utf_8, "PYTHONCOERCECLOCALE": "0"}
        command = [sys.executable, "-c", code]
        outputs.append(subprocess.check_output(command, text=True, env=os.environ | variables))
    names = ["'caf\\udce9.png'", "'\\u732b.png'"]
    expected = [(names[0], ("not UTF-8",)), (names[1], ("a cat",)), (names[1], ("x",))]
    assert outputs == [f"{[*expected, (names[0], ('x',))]}\n"] * 2


def test_a_protocol_without_its_package_leaves_out_the_line_only(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    save(tmp_path / "good.png")
    path = save_list(tmp_path, "s3://bucket/a.png", "good.png")
    kinds = [getattr(item, "kind", "") for item in JsonlListing(str(path), "", PROTOCOLS).scan(1)]
    assert kinds == ["protocol without an installed package", ""]
    listing = JsonlListing(str(path), "", PROTOCOLS)
    with pytest.raises(UnusableError, match="protocol without an installed package"):
        listing.read_file("s3://bucket/a.png")


def test_the_settings_name_only_protocols_of_plain_files():
    for protocol in ("reference", "zip", "simplecache", "a::b", ""):
        with pytest.raises(config.ConfigError, match="not a protocol of plain files"):
            config.Data(protocols=("https", protocol))


# --- bounds on work -------------------------------------------------------------------------------


def test_pipes_and_devices_are_not_read(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "pipe.txt").write_text("a caption")
    (item,) = FolderListing(str(tmp_path)).scan(1)
    assert item.kind == "unreadable file"
    for path in (str(tmp_path / "pipe.png"), "/dev/zero"):
        with pytest.raises(UnusableError, match="unreadable file"):
            read_header_at(path)
        with pytest.raises(PermissionError):
            storage.read_bytes(path)
    save(tmp_path / "a.png")
    os.mkfifo(tmp_path / "a.txt")
    assert [item.kind for item in FolderListing(str(tmp_path)).scan(1)] == ["unreadable file"] * 2


def test_files_and_lines_have_a_largest_size(tmp_path, monkeypatch):
    put("memory://large", bytes(100))
    (tmp_path / "large").write_bytes(bytes(100))
    for address in ("memory://large", str(tmp_path / "large")):
        assert len(storage.read_file(address, 100)) == 100
        with pytest.raises(UnusableError, match="too large"):
            storage.read_file(address, 99)
    with open(tmp_path / "sparse.png", "wb") as file:
        file.write(b"RIFF\xff\xff\xff\x00WEBP")
        file.truncate(2**40)
    with pytest.raises(UnusableError, match="too large"):
        read_header_at(str(tmp_path / "sparse.png"))
    monkeypatch.setattr("radiance.data.sources.jsonl.MAX_TEXT_BYTES", 1000)
    save(tmp_path / "a.png")
    path = save_list(tmp_path, "a.png", "b" * 5000, "a.png")
    kinds = [getattr(item, "kind", "") for item in JsonlListing(str(path)).scan(1)]
    assert kinds == ["", "bad line", ""]


def test_a_server_of_endless_folders_is_left(monkeypatch):
    monkeypatch.setattr(storage, "MAX_FOLDERS", 10)
    put("memory://endless/" + "a/" * 30 + "x.png", b"")
    with pytest.raises(storage.DataError, match="has more than 10 folders"):
        storage.list_files("memory://endless")
