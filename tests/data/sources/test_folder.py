"""The data source `folder`: which images are read, which are left out, and stable splits."""

import errno
import io
import json
import os
import shutil
import zlib

import numpy as np
import pytest
from PIL import Image

from radiance import config
from radiance.base.errors import DataError
from radiance.data.batches import Batches
from radiance.data.datasets import describe_source, open_source, open_splits
from radiance.data.listing import EDGE_BYTES, compute_split_hash
from radiance.text.hash_encoder import HashEncoder
from tests.helpers.toy_folders import (
    captions,
    fill,
    names,
    open_folder,
    save,
    settings,
    write_metadata,
)

# --- images and captions --------------------------------------------------------------------------


def test_every_format_is_read_in_order_of_names(tmp_path):
    for i, name in enumerate(
        ("b/x.jpg", "a.png", "B.JPEG", "c.d.webp", "b/a.bmp", "e.gif", "b.PNG", "f.tif")
    ):
        save(tmp_path / name, f"caption {i}")
    (tmp_path / "really_a_jpeg.png").write_bytes((tmp_path / "B.JPEG").read_bytes())
    (tmp_path / "really_a_jpeg.txt").write_text("a caption")
    source = open_folder(tmp_path)
    assert names(source) == sorted(names(source))
    assert set(names(source)) == {
        "b/x.jpg",
        "a.png",
        "B.JPEG",
        "c.d.webp",
        "b/a.bmp",
        "e.gif",
        "b.PNG",
        "f.tif",
        "really_a_jpeg.png",
    }
    index = names(source).index("c.d.webp")
    assert source.captions(index) == ("caption 3",)
    assert source.load_image(index).size == (12, 10)
    assert source.attributes(index) == {}
    assert source.sizes.tolist() == [[12, 10]] * 9
    assert source.loss_weights.tolist() == [1] * 9
    assert source.skip_counts == {}


def test_captions_are_read_from_text_files(tmp_path):
    files = {
        "plain": (b"a red square", ("a red square",)),
        "several": (b"one\n\n  two \nthree\n", ("one", "two", "three")),
        "windows": (b"\xef\xbb\xbfa caf\xc3\xa9\r\nsecond line\r\n", ("a café", "second line")),
        "separators": ("a\u2028cat\x85\fhere".encode(), ("a\u2028cat\x85\fhere",)),
        "scripts": ("猫と犬\nкот 🐈".encode(), ("猫と犬", "кот 🐈")),
    }
    for name, (content, _) in files.items():
        save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_bytes(content)
    source = open_folder(tmp_path)
    assert captions(source) == {f"{name}.png": expected for name, (_, expected) in files.items()}


def test_suffixes_may_be_in_any_case(tmp_path):
    for name in ("DSC1.JPG", "DSC2.JPG", "DSC3.JPG", "sub/DSC4.JPG"):
        save(tmp_path / name)
    (tmp_path / "DSC1.TXT").write_text("of 1")
    (tmp_path / "DSC2.TXT").write_text("in capitals")
    (tmp_path / "DSC2.txt").write_text("of 2")
    (tmp_path / "DSC3.Txt").write_text("of 3")
    write_metadata(tmp_path / "sub", {"file_name": "DSC4.JPG", "text": "of 4"})
    (tmp_path / "sub" / "metadata.jsonl").rename(tmp_path / "sub" / "METADATA.JSONL")
    expected = {f"DSC{i}.JPG": (f"of {i}",) for i in (1, 2, 3)} | {"sub/DSC4.JPG": ("of 4",)}
    assert captions(open_folder(tmp_path)) == expected


def test_captions_are_read_from_metadata(tmp_path):
    for name in ("a.png", "b.png", "sub/c.png", "sub/deep/d.png", "both.png"):
        save(tmp_path / name)
    save(tmp_path / "no_suffix.png")
    (tmp_path / "no_suffix.png").rename(tmp_path / "no_suffix")
    (tmp_path / "both.txt").write_text("beside")
    write_metadata(
        tmp_path,
        {"file_name": "a.png", "text": "of a", "id": 3},
        {"file_name": "b.png", "text": None, "caption": "of b"},
        {"file_name": "b.png", "caption": ["again b", "and again"]},
        {"file_name": "both.png", "text": "listed"},
        {"file_name": "no_suffix", "text": "named by the list alone"},
    )
    write_metadata(
        tmp_path / "sub",
        {"file_name": "./c.png", "text": "of c\u2028in two lines"},
        {"file_name": "deep/d.png", "text": "of d"},
    )
    with (tmp_path / "metadata.jsonl").open("rb+") as file:
        content = file.read().replace(b"\n", b"\r\n")
        file.seek(0)
        file.write(b"\xef\xbb\xbf" + content + b"\r\n")
    source = open_folder(tmp_path)
    assert captions(source) == {
        "a.png": ("of a",),
        "b.png": ("of b", "again b", "and again"),
        "both.png": ("beside",),
        "no_suffix": ("named by the list alone",),
        "sub/c.png": ("of c\u2028in two lines",),
        "sub/deep/d.png": ("of d",),
    }
    assert source.skip_counts == {}


def test_tags_are_declared_in_metadata(tmp_path):
    fill(tmp_path, 3)
    for i in range(3):
        (tmp_path / f"{i:02d}.txt").unlink()
    rows = [
        {"file_name": f"{i:02d}.png", "text": "a,b, c"} | ({"is_tag_based": i == 1} if i else {})
        for i in range(3)
    ]
    write_metadata(tmp_path, *rows)
    source = open_folder(tmp_path)
    assert [source.has_tags(i) for i in range(3)] == [False, True, False]
    data = settings(
        tmp_path,
        batch_size=3,
        shuffle_tags=True,
        tag_dropout=0.5,
        lowercase_probability=0.5,
        caption_prefix="X ",
        caption_suffix=".",
    )
    batches = Batches(source, data, HashEncoder(8, 6), 0, 50, "one_pad")
    seen = {"text": set(), "tags": set()}
    for step in range(50):
        for index, caption in zip(
            batches.sampler[step].image_indices,
            batches._sample_captions(step, batches.sampler[step]),
        ):
            seen["tags" if index == 1 else "text"].add(caption)
    assert seen["text"] == {"X a,b, c."}
    assert seen["tags"] > {"X a, b, c.", "X c, a, b.", "X b, c.", "X c, a."}
    assert not any(x.count(",") == 0 for x in seen["tags"])


def test_unusual_names_are_read(tmp_path):
    unusual = ["with space.png", "猫.png", "new\nline.png", "quote'\".png", "%41#?.png", "-rf.png"]
    for name in unusual:
        save(tmp_path / name, f"caption of {name!r}")
    decomposed = "cafe\u0301.png"  # as macOS spells it
    save(tmp_path / decomposed)
    write_metadata(tmp_path, {"file_name": "café.png", "text": "a café"})
    undecodable = os.fsencode(tmp_path) + b"/\xff\xfe.png"
    try:
        shutil.copy(tmp_path / "猫.png", undecodable)
        shutil.copy(tmp_path / "猫.txt", undecodable[:-4] + b".txt")
    except OSError:
        pytest.skip("this file system takes only names in Unicode")
    source = open_folder(tmp_path)
    assert set(names(source)) == {*unusual, "café.png", os.fsdecode(b"\xff\xfe.png")}
    assert len(source.fingerprint()) == 64
    assert all(source.load_image(i).size == (12, 10) for i in range(len(source)))


def test_links_are_followed_but_not_in_circles(tmp_path):
    save(tmp_path / "real" / "sub" / "a.png", "a caption")
    (tmp_path / "real" / "sub" / "up").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real" / "self").symlink_to("self")
    (tmp_path / "real" / "circle.png").symlink_to("circle.png")
    save(tmp_path / "elsewhere" / "b.png", "another caption")
    (tmp_path / "real" / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (tmp_path / "real" / "again").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    source = open_folder(tmp_path / "real")
    assert names(source) == ["again/b.png", "sub/a.png"]
    assert source.skip_counts == {"no caption": 1}
    (tmp_path / "real" / "circle.txt").write_text("a caption")
    assert open_folder(tmp_path / "real").skip_counts == {"unreadable file": 1}


def test_hidden_files_are_skipped(tmp_path):
    save(tmp_path / "a.png", "a caption")
    for name in (".trash/b.png", "._a.png"):
        save(tmp_path / name, "hidden")
    (tmp_path / "README.md").write_text("about these images")
    (tmp_path / "notes.txt").write_text("nothing's caption")
    source = open_folder(tmp_path)
    assert names(source) == ["a.png"]
    assert source.skip_counts == {}


def test_images_are_upright_over_the_background_and_not_clipped(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90°
    save(tmp_path / "rotated.jpg", "rotated", size=(20, 10), exif=exif)
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).quantize().save(
        tmp_path / "clear.png", transparency=0
    )
    (tmp_path / "clear.txt").write_text("nothing")
    Image.fromarray(np.full((10, 10), 0x8040, np.uint16)).save(tmp_path / "gray.png")
    (tmp_path / "gray.txt").write_text("sixteen bits")
    source = open_folder(tmp_path)
    clear, gray, rotated = (source.load_image(i) for i in range(3))
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert open_folder(tmp_path, background=(0, 0, 255)).load_image(0).getpixel((0, 0)) == (
        0,
        0,
        255,
    )
    assert gray.convert("RGB").getpixel((0, 0)) == (128, 128, 128)
    assert rotated.size == (10, 20)
    assert source.sizes[2].tolist() == [10, 20]


# --- unusable images ------------------------------------------------------------------------------


def animation(**options):
    frames = [Image.new("RGB", (12, 10), color) for color in ("red", "blue")]
    file = io.BytesIO()
    frames[0].save(file, save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def png_header(width, height):
    """Return a PNG file whose header claims this size."""
    file = io.BytesIO()
    Image.new("L", (1, 1)).save(file, "PNG")
    content = bytearray(file.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


UNUSABLE = {
    "no image": ("x.png", b"<!DOCTYPE html>404", b"a caption", "not an image"),
    "empty file": ("x.jpg", b"", b"a caption", "not an image"),
    "another format inside": (
        "x.png",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"a caption",
        "not an image",
    ),
    "another format": ("x.HEIC", b"ftypheic", b"a caption", "unsupported format"),
    "animated gif": ("x.gif", animation(format="GIF"), b"a caption", "animated"),
    "animated png": ("x.png", animation(format="PNG"), b"a caption", "animated"),
    "animated webp": ("x.webp", animation(format="WEBP"), b"a caption", "animated"),
    "large": ("x.png", png_header(10_000, 9_000), b"a caption", "too large"),
    "absurd": ("x.png", png_header(2**20, 2**20), b"a caption", "too large"),
    "small": ("x.png", png_header(500, 3), b"a caption", "too small"),
    "no caption": ("x.png", png_header(10, 10), None, "no caption"),
    "empty caption": ("x.png", png_header(10, 10), b"\xef\xbb\xbf \r\n\t\n", "empty caption"),
    "utf-16": ("x.png", png_header(10, 10), "a caption".encode("utf-16"), "caption not in UTF-8"),
    "lost blocks": ("x.png", png_header(10, 10), b"a caption" + bytes(9), "caption not in UTF-8"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_unusable_images_are_counted(case, tmp_path, capsys, recwarn):
    name, content, caption, kind = UNUSABLE[case]
    fill(tmp_path, 3)
    for i in range(5):
        path = tmp_path / f"{i}{name}"
        path.write_bytes(content)
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption)
    source = open_folder(tmp_path)
    assert names(source) == ["00.png", "01.png", "02.png"]
    assert source.skip_counts == {kind: 5}
    examples = f"'0{name}', '1{name}', '2{name}'"
    message = f"folder {tmp_path}, train: 3 images; left out: 5 × {kind} ({examples}).\n"
    assert capsys.readouterr().err == message
    assert not recwarn.list
    described = describe_source(source, config.Data(source="folder", path=str(tmp_path)), "train")
    assert json.loads(json.dumps(described)) == described
    assert described["skipped"] == {kind: 5}


def test_a_photograph_with_a_preview_is_not_an_animation(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(animation(format="MPO"))
    (tmp_path / "photo.txt").write_text("a photograph")
    assert open_folder(tmp_path).load_image(0).getpixel((0, 0))[0] > 200


def test_unusable_lines_of_metadata_are_counted(tmp_path):
    fill(tmp_path, 2)
    save(tmp_path / "no_text.png")
    save(tmp_path / "surrogate.png")
    lines = [
        "{",
        "[1]",
        "7",
        '{"text": "no name"}',
        '{"file_name": 5, "text": "x"}',
        '{"file_name": "00.png", "text": {"en": "x"}}',
        '{"file_name": "00.png", "text": ["x", 3]}',
        "[" * 100_000,
        '{"file_name": "no_text.png", "text": ""}',
        '{"file_name": "gone.png", "text": "x"}',
        '{"file_name": "../outside.png", "text": "x"}',
        '{"file_name": "/etc/passwd", "text": "x"}',
        '{"file_name": "surrogate.png", "text": "\\ud800"}',
        '{"file_name": "00.png", "text": "not in UTF-8: \udcff"}',
        "",
    ]
    (tmp_path / "metadata.jsonl").write_bytes(os.fsencode("\n".join(lines)))
    source = open_folder(tmp_path)
    assert source.captions(0) == ("image 0",)
    assert len(source) == 2
    assert source.skip_counts == {
        "bad line of metadata.jsonl": 9,
        "missing file": 3,
        "empty caption": 1,
        "caption not in UTF-8": 1,
    }


def test_unreadable_folders_are_counted(tmp_path, monkeypatch):
    fill(tmp_path, 2)
    save(tmp_path / "closed" / "a.png", "a caption")
    scan = os.scandir

    def deny(path):
        if str(path).endswith("closed"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", deny)  # root may list everything
    source = open_folder(tmp_path)
    assert len(source) == 2
    assert source.skip_counts == {"unreadable folder": 1}


def test_an_empty_split_is_an_error(tmp_path):
    with pytest.raises(config.ConfigError, match=r"data.path=nowhere is not a folder"):
        open_folder("nowhere")
    with pytest.raises(
        DataError,
        match=r"train split .* is empty \(left out: none; in the other split: 0\): put more",
    ):
        open_folder(tmp_path)
    save(tmp_path / "a.png")
    with pytest.raises(
        DataError, match=r"left out: 1 × no caption \('a.png'\); in the other split: 0"
    ) as error:
        open_folder(tmp_path)
    assert "\n" not in str(error.value)
    fill(tmp_path, 3)
    with pytest.raises(
        DataError,
        match=r"validation split .* is empty \(left out: none; in the other split: 3\)"
        r".* or set data.validation_fraction=0.05",
    ):
        open_folder(tmp_path, "validation")
    with pytest.raises(DataError, match=r"train split .* or set data.validation_fraction=0.05"):
        open_folder(tmp_path, "train", 0.999999)
    assert open_splits(settings(tmp_path, 0.05)).keys() == {"train", "validation"}
    assert open_splits(settings(tmp_path, 0.0)).keys() == {"train"}


def test_one_image_cannot_be_split(tmp_path):
    fill(tmp_path, 1)
    message = r"put more images with captions there, or .* \(data.validation_fraction=0\)"
    with pytest.raises(DataError, match=message):
        open_splits(settings(tmp_path, 0.05))
    assert names(open_splits(settings(tmp_path, 0.0))["train"]) == ["00.png"]


def test_a_fraction_holds_out_at_least_one_image(tmp_path):
    fill(tmp_path, 12)
    first = min((f"{i:02d}.png" for i in range(12)), key=compute_split_hash)
    for fraction in (1e-9, 0.01, 0.05):
        splits = open_splits(settings(tmp_path, fraction))
        assert names(splits["validation"]) == [first]
        assert len(splits["train"]) == 11
    save(tmp_path / first, "too small", size=(2, 2))  # and so never used
    held_out = names(open_folder(tmp_path, "validation", 0.01))
    assert held_out == [
        min((f"{i:02d}.png" for i in range(12) if f"{i:02d}.png" != first), key=compute_split_hash)
    ]


def test_contradictory_settings_are_errors():
    with pytest.raises(
        config.ConfigError,
        match=r"data.path=x is not used by data.source=digits: choose another source",
    ):
        config.Data(path="x")
    with pytest.raises(config.ConfigError, match=r"data.source=folder needs data.path: give"):
        open_source(config.Data(source="folder"), "train")
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(config.ConfigError, match=r"data.validation_fraction"):
            config.Data(source="folder", path="x", validation_fraction=fraction)


# --- stability ------------------------------------------------------------------------------------


def test_images_never_change_their_split(tmp_path):
    fill(tmp_path)
    before = {
        split: set(names(open_folder(tmp_path, split, 0.3))) for split in ("train", "validation")
    }
    assert before["train"] | before["validation"] == {f"{i:02d}.png" for i in range(40)}
    assert not before["train"] & before["validation"]
    assert 4 <= len(before["validation"]) <= 20
    for i in range(40):
        save(tmp_path / "more" / f"{i}.png", "another")
    for i in range(0, 40, 2):
        (tmp_path / f"{i:02d}.png").unlink()
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    for split, old in before.items():
        now = set(names(open_folder(moved, split, 0.3)))
        assert {name for name in now if "/" not in name} == {
            name for name in old if int(name[:2]) % 2
        }
    assert compute_split_hash("a/b.png") == compute_split_hash("a/b.webp")
    assert before["validation"] <= {
        f"{i:02d}.png" for i in range(40) if is_validation(f"{i:02d}.png", 0.6)
    }  # a larger fraction only adds images


def is_validation(name, fraction):
    return compute_split_hash(name) < fraction * 2**64


def test_splits_are_the_same_everywhere():
    """Runs with other versions and on other machines must agree."""
    assert [i for i in range(40) if is_validation(f"{i:02d}.png", 0.2)] == SPLIT
    assert abs(sum(is_validation(f"{i}.jpg", 0.05) for i in range(20_000)) / 20_000 - 0.05) < 0.005


SPLIT = [4, 14, 16, 21, 25, 30, 38]


def test_the_fingerprint_depends_on_contents_only(tmp_path):
    first = fill(tmp_path / "first", 4)
    large = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    Image.fromarray(large).save(first / "large.bmp")
    (first / "large.txt").write_text("noise")
    before = open_folder(first).fingerprint()
    again = shutil.copytree(first, tmp_path / "elsewhere" / "second", copy_function=shutil.copy)
    assert open_folder(again).fingerprint() == before

    def changes_fingerprint(change):
        folder = shutil.copytree(first, tmp_path / "changed", dirs_exist_ok=False)
        change(folder)
        now = open_folder(folder).fingerprint()
        shutil.rmtree(folder)
        return now != before

    def flip_bit(position):
        def change(folder):
            content = bytearray((folder / "large.bmp").read_bytes())
            content[position] ^= 1
            (folder / "large.bmp").write_bytes(content)

        return change

    assert len((first / "large.bmp").read_bytes()) > 2 * EDGE_BYTES
    assert changes_fingerprint(lambda f: (f / "00.txt").write_text("another caption"))
    assert changes_fingerprint(lambda f: (f / "00.txt").write_text("image\n0"))
    assert changes_fingerprint(
        lambda f: (f / "00.png").rename(f / "0.png") and (f / "00.txt").rename(f / "0.txt")
    )
    assert changes_fingerprint(lambda f: save(f / "00.png", "image 0", color="white"))
    assert changes_fingerprint(lambda f: (f / "03.png").unlink())
    assert changes_fingerprint(flip_bit(EDGE_BYTES - 1))
    assert changes_fingerprint(flip_bit(-EDGE_BYTES))
    assert changes_fingerprint(flip_bit(-1))
    assert not changes_fingerprint(lambda f: os.utime(f / "00.png", (1, 1)))
    assert not changes_fingerprint(
        flip_bit(2 * EDGE_BYTES)
    )  # the middle of large files is not read
