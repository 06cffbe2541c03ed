"""Readers of data use, leave out or reject damaged files, in little time and memory.

    RADIANCE_FUZZ=100000 python -m pytest tests/data/test_fuzz.py

reads that many damaged files instead of two thousand; the first ones of each target are the same.
RADIANCE_FUZZ_SEED=1 makes others. RADIANCE_FUZZ_KEEP=FOLDER saves a file that breaks a reader.
"""

import faulthandler
import io
import json
import os
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from radiance.base.errors import RadianceError
from radiance.config.data import PROTOCOLS
from radiance.data.decode import decode_image, decode_mask
from radiance.data.listing import IndexRecord, read_image_header
from radiance.data.sources.folder import FolderListing
from radiance.data.sources.jsonl import JsonlListing
from radiance.data.sources.parquet import ParquetListing
from radiance.data.sources.tar import TarListing
from radiance.data.unusable import UnusableError
from tests.helpers.memory import needs_peak, peak_bytes, reset_peak
from tests.helpers.toy_shards import tar_sample, toy_image, write_parquet, write_tar

NUM_INPUTS = int(os.environ.get("RADIANCE_FUZZ", "2000"))
SEED = [int(x) for x in os.environ.get("RADIANCE_FUZZ_SEED", "").split()]
MAX_SECONDS = 10.0  # for one input
MAX_MEMORY = 1_000_000_000  # bytes that a reader may add to the peak of the process
MAX_PARQUET_MEMORY = 3_000_000_000  # pyarrow allocates the size that a page states, up to 2 GiB

ODD_NUMBERS = [0, 1, 127, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]
ODD_WORDS = [
    *(b"-1", b"1e999", b"null", b"[]", b"{}", b'""', b"true", b"9" * 5000, b"[" * 200, b"NaN"),
    *(b"\\ud800", b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", "\u2028".encode(), b"\x80"),
    *(b"../", b"/", b"file:///dev/zero", b"reference://x::", b"memory://", b"::", b"://"),
    *(b'"width":1e400,', b'"height":-1,', b'"is_tag_based":"false",', b'"loss_weight":1e-50,'),
    *(b"IHDR", b"iCCP", b"zTXt", b"IDAT", b"\xff\xda", b"\xff\xe1", b"PAR1", b"ustar"),
]


def mutate(content: bytes, rng: np.random.Generator) -> bytes:
    """Make one to four changes, anywhere or where most formats have their structure."""
    out = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        edge = int(rng.integers(0, 600))
        at = [int(rng.integers(0, len(out) + 1)), edge, len(out) - edge][rng.integers(3)]
        at = min(max(at, 0), len(out))
        number = ODD_NUMBERS[rng.integers(len(ODD_NUMBERS))]
        match rng.integers(0, 9):
            case 0:
                out[at : at + 1] = bytes([rng.integers(256)])
            case 1:
                out[at : at + 1] = bytes([b ^ 1 << int(rng.integers(8)) for b in out[at : at + 1]])
            case 2:
                out[at : at + 8] = struct.pack("<Q", number)
            case 3:
                out[at : at + 4] = struct.pack([">I", "<I"][rng.integers(2)], number % 2**32)
            case 4:
                del out[at:]
            case 5:
                del out[at : at + int(rng.integers(1, 600))]
            case 6:
                other = int(rng.integers(0, len(out) + 1))
                out[at:at] = out[other : other + int(rng.integers(1, 600))]
            case 7:
                word = ODD_WORDS[rng.integers(len(ODD_WORDS))]
                out[at : at + len(word) * int(rng.integers(2))] = word
            case 8:
                out[at : at + int(rng.integers(1, 600))] = bytes(int(rng.integers(1, 600)))
    return bytes(out)


# --- targets --------------------------------------------------------------------------------------


def encode(image_format: str, **options) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    if image_format in ("PNG", "JPEG", "WEBP", "TIFF", "AVIF"):
        options = {"exif": exif} | options
    Image.fromarray(pixels).save(file, image_format, **options)
    return file.getvalue()


IMAGE_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "TGA", "PPM"]
IMAGE_FORMATS += ["AVIF"] if features.check("avif") else []
LINES = [
    {"filename": "a.png", "caption_or_tags": "a, b", "is_tag_based": True, "width": 12},
    {"file_name": "b.jpg", "text": ["one", "two"], "loss_weight": 0.5, "width": 9, "height": 9.0},
    {"filename": "/etc/hostname", "caption": "x"},
]
LIST = b"".join(json.dumps(line).encode() + b"\n" for line in LINES)


def decode(content: bytes, folder: Path):
    """Read the header of an image, then decode it."""
    file = io.BytesIO(content)
    width, height, _ = read_image_header(file)
    image = decode_image(content)
    assert image.size == (width, height)
    decode_image(content, (4, 4))
    decode_mask(content)


def scan(listing, has_files: bool = True):
    """Scan a listing and read the files of its records."""
    for item in listing.scan(1):
        if isinstance(item, IndexRecord):
            assert item.captions
            assert item.width > 0 < item.height
            json.dumps([item.name, item.captions, item.attributes])
            if has_files:
                try:
                    listing.read_file(item.location)
                except UnusableError:
                    continue


def read_file(name: str, make_listing, has_files: bool = True):
    """Return a reader that writes its input to a file and scans the listing."""

    def read(content: bytes, folder: Path):
        (folder / name).write_bytes(content)
        scan(make_listing(folder), has_files)

    return read


def make_parquet(folder: Path) -> bytes:
    images = [[toy_image(i)] for i in range(4)]
    texts = ["a", "b", "c", None]
    path = folder / "source.parquet"
    write_parquet(path, image=images, text=texts, is_tag_based=["true", "0", None, "false"])
    content = path.read_bytes()
    path.unlink()
    return content


def make_tar(folder: Path) -> bytes:
    files = tar_sample("a", 1) | {"b/c.png": toy_image(2), "b/c.txt": "one\ntwo"}
    path = write_tar(folder / "source.tar", files | tar_sample("ö" * 200, 3))
    content = path.read_bytes()
    path.unlink()
    return content


READERS = {
    **{name: (lambda folder, name=name: encode(name), decode) for name in IMAGE_FORMATS},
    "list": (
        lambda folder: LIST,
        read_file("x.jsonl", lambda folder: JsonlListing(f"{folder}/x.jsonl", "", PROTOCOLS)),
    ),
    "metadata": (
        lambda folder: LIST,
        read_file("metadata.jsonl", lambda folder: FolderListing(str(folder))),
    ),
    "captions": (
        lambda folder: "a cat\r\nзвук\u2028 \f x\n".encode(),
        read_file("a.txt", lambda folder: FolderListing(str(folder))),
    ),
    "tar": (make_tar, read_file("x.tar", lambda folder: TarListing(f"{folder}/x.tar"))),
    "parquet": (
        make_parquet,
        read_file(
            "x.parquet",
            lambda folder: ParquetListing(f"{folder}/x.parquet", "image", "text", folder),
            has_files=False,
        ),
    ),
}


@pytest.mark.slow
@needs_peak
@pytest.mark.parametrize("target", READERS)
def test_readers_use_or_reject_damaged_files(target, tmp_path):
    make_content, read = READERS[target]
    valid_content = make_content(tmp_path)
    (tmp_path / "a.png").write_bytes(toy_image())
    read(valid_content, tmp_path)
    rng = np.random.default_rng([list(READERS).index(target), *SEED])
    reset_peak()
    before = peak_bytes()
    for i in range(NUM_INPUTS // len(READERS)):
        content = mutate(valid_content, rng)
        start_time, message = time.monotonic(), ""
        faulthandler.dump_traceback_later(6 * MAX_SECONDS, exit=True)  # a hang
        try:
            read(content, tmp_path)
        except (UnusableError, RadianceError) as error:
            message = str(error)
        except BaseException:
            folder = Path(os.environ.get("RADIANCE_FUZZ_KEEP", tmp_path))
            (folder / f"{target}-{i}.bin").write_bytes(content)
            raise
        finally:
            faulthandler.cancel_dump_traceback_later()
        assert "\n" not in message, f"input {i}"
        assert time.monotonic() - start_time < MAX_SECONDS, f"input {i}"
    limit = MAX_PARQUET_MEMORY if target == "parquet" else MAX_MEMORY
    assert peak_bytes() - before < limit
