"""Decoding of image files to sRGB: as browsers show them, or `UnusableError`."""

import contextlib
import errno
import io
import pickle
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from radiance.base.images import to_array, to_image
from radiance.data.colors import MAX_PROFILE_BYTES
from radiance.data.decode import (
    MAX_PIXELS,
    MAX_SLOW_PIXELS,
    ORIENTATION_TRANSPOSES,
    decode_image,
    decode_mask,
    read_image_size,
)
from radiance.data.unusable import UnusableError
from tests.helpers.toy_runs import output_of

RNG = np.random.default_rng(0)
SMOOTH = Image.fromarray(RNG.integers(0, 256, (4, 6, 3), np.uint8)).resize(
    (48, 32), Image.Resampling.BICUBIC
)


def encode(image, image_format, **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def psnr(a, b):
    return 10 * np.log10(
        255**2 / max(1e-9, np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    )


def pixel(content, **options):
    return decode_image(content, **options).getpixel((0, 0))


FILES = {
    "png": encode(SMOOTH, "PNG"),
    "jpeg": encode(SMOOTH, "JPEG"),
    "progressive": encode(SMOOTH, "JPEG", progressive=True),
    "cmyk": encode(SMOOTH.convert("CMYK"), "JPEG"),
    "webp": encode(SMOOTH, "WEBP"),
    "lossless webp": encode(SMOOTH, "WEBP", lossless=True),
    "gif": encode(SMOOTH.quantize(), "GIF"),
    "bmp": encode(SMOOTH, "BMP"),
    "tiff": encode(SMOOTH, "TIFF"),
    "deflated tiff": encode(SMOOTH, "TIFF", compression="tiff_adobe_deflate"),
    "jpeg 2000": encode(SMOOTH, "JPEG2000"),
    "ppm": encode(SMOOTH, "PPM"),
    "tga": encode(SMOOTH, "TGA", compression="tga_rle"),
}
if features.check("avif"):
    FILES["avif"] = encode(SMOOTH, "AVIF")


def test_decoding_does_not_import_jax():
    code = (
        "import sys, radiance.data.decode, radiance.data.captions, radiance.base.images; "
        "print('jax' in sys.modules)"
    )
    assert output_of(code) == b"False\n"


# --- orientation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_rotated_and_flipped_by_their_orientation(image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(
        SMOOTH, image_format, exif=exif, **({} if image_format == "PNG" else {"quality": 95})
    )
    upright = SMOOTH.transpose(ORIENTATION_TRANSPOSES[orientation]) if orientation > 1 else SMOOTH
    assert read_image_size(io.BytesIO(content)) == upright.size == decode_image(content).size
    assert psnr(decode_image(content), upright) > 30


def test_an_unreadable_orientation_is_ignored():
    for exif in (b"Exif\0\0no TIFF", b""):
        assert read_image_size(io.BytesIO(encode(SMOOTH, "PNG", exif=exif))) == SMOOTH.size


def test_the_size_of_a_png_is_read_without_its_pixels():
    assert read_image_size(io.BytesIO(FILES["png"][:60])) == SMOOTH.size


LONG_TEXT = b"a workflow of another tool " * 120_000  # 3 MB
TEXT_CHUNKS = {
    "text": (b"tEXt", b"prompt\0" + LONG_TEXT),
    "compressed text": (b"zTXt", b"prompt\0\0" + zlib.compress(LONG_TEXT)),
    "international text": (b"iTXt", b"workflow\0\0\0\0\0" + LONG_TEXT),
    "compressed international text": (
        b"iTXt",
        b"workflow\0\1\0\0\0" + zlib.compress(LONG_TEXT),
    ),
    "metadata": (b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG_TEXT)),
    "text that is not compressed": (b"zTXt", b"prompt\0\7" + LONG_TEXT),
    "exif": (b"eXIf", b"II*\0\x08\0\0\0" + LONG_TEXT),
    "private": (b"prVt", LONG_TEXT),
}


@pytest.mark.parametrize("name", TEXT_CHUNKS)
@pytest.mark.parametrize("position", [33, -12])
@pytest.mark.parametrize("num_chunks", [1, 30])
def test_long_texts_in_a_png_change_nothing(name, position, num_chunks):
    """Before the pixels and after them; 30 of them are more than Pillow reads."""
    content = FILES["png"]
    chunks = chunk(*TEXT_CHUNKS[name]) * num_chunks
    content = content[:position] + chunks + content[position:]
    assert read_image_size(io.BytesIO(content)) == SMOOTH.size
    assert np.array_equal(decode_image(content), SMOOTH)


def test_a_png_is_rotated_by_its_texts():
    xmp = b'<x tiff:Orientation="6"/>'
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = b"\nexif\n 1\n" + exif.tobytes().hex().encode()
    for text in (
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp),
        chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(profile)),
    ):
        content = FILES["png"][:33] + text + FILES["png"][33:]
        assert read_image_size(io.BytesIO(content)) == SMOOTH.size[::-1]
        assert decode_image(content).size == SMOOTH.size[::-1]


# --- colors ---------------------------------------------------------------------------------------


def profile_tag(kind, body):
    return kind + b"\0\0\0\0" + body


def matrix_profile(primaries, gamma):
    """Return an RGB profile with a gamma curve; columns of `primaries` are XYZ of D50."""
    fixed_point_tags = [
        profile_tag(b"XYZ ", struct.pack(">3i", *np.rint(column * 65536).astype(int)))
        for column in [*primaries.T, primaries.sum(1)]
    ]
    curve = profile_tag(b"curv", struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0")
    tags = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), fixed_point_tags)) | {
        name: curve for name in (b"rTRC", b"gTRC", b"bTRC")
    }
    return make_profile(b"RGB ", b"XYZ ", tags)


def make_profile(color_space, connection_space, tags, kind=b"mntr"):
    """Return an ICC profile (version 2) with these tags."""
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">2I", offset + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    header = struct.pack(
        ">I4sI4s4s4s12s4s28x3i48x",
        offset + len(body),
        b"\0" * 4,
        0x02400000,
        kind,
        color_space,
        connection_space,
        b"\0" * 12,
        b"acsp",
        63190,
        65536,
        54061,
    )
    return header + struct.pack(">I", len(tags)) + table + body


# XYZ of D50; columns are red, green and blue.
P3 = np.array(
    [[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]]
)
SRGB = np.array(
    [[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]]
)


def p3_to_srgb(color, gamma=2.2):
    light = np.linalg.solve(SRGB, P3 @ (np.array(color) / 255) ** gamma).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


COLORS = [
    (200, 100, 50),
    (30, 180, 90),
    (120, 120, 120),
    (255, 255, 255),
    (0, 0, 0),
    (90, 60, 200),
    (255, 0, 0),
]


@pytest.mark.parametrize("color", COLORS)
def test_colors_are_converted_by_their_profile(color):
    p3 = matrix_profile(P3, 2.2)
    content = encode(Image.new("RGB", (8, 8), color), "PNG", icc_profile=p3)
    np.testing.assert_allclose(pixel(content), p3_to_srgb(color), atol=2)
    palette = Image.new("RGB", (8, 8), color).quantize(2)
    np.testing.assert_allclose(
        pixel(encode(palette, "PNG", icc_profile=p3)), p3_to_srgb(color), atol=2
    )
    half_opaque = Image.new("RGBA", (8, 8), (*color, 128))
    composited = 255 * (127 / 255) + p3_to_srgb(color) * (
        128 / 255
    )  # the background is sRGB already
    np.testing.assert_allclose(
        pixel(encode(half_opaque, "PNG", icc_profile=p3)), composited, atol=2
    )


def test_long_profiles_of_a_png_are_used_up_to_a_limit():
    """Profiles of printers take more than the 1 MiB that Pillow decompresses."""
    profile = matrix_profile(P3, 1.8)
    short = decode_image(encode(SMOOTH, "PNG", icc_profile=profile))
    assert not np.array_equal(short, SMOOTH)
    for num_bytes, expected in (
        (MAX_PROFILE_BYTES // 2, short),
        (MAX_PROFILE_BYTES, short),
        (MAX_PROFILE_BYTES + 1, SMOOTH),
    ):
        long_profile = struct.pack(">I", num_bytes) + profile[4:]
        content = encode(SMOOTH, "PNG", icc_profile=long_profile.ljust(num_bytes, b"\0"))
        assert np.array_equal(decode_image(content), expected)


def test_srgb_and_unusable_profiles_change_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    p3 = matrix_profile(P3, 2.2)
    for icc_profile in (
        srgb,
        b"no profile",
        b"",
        p3[:200],
        p3.replace(b"acsp", b"abcd"),
        p3.replace(b"RGB ", b"CMYK"),
    ):
        assert np.array_equal(decode_image(encode(SMOOTH, "PNG", icc_profile=icc_profile)), SMOOTH)
    gray = SMOOTH.convert("L")
    assert np.array_equal(decode_image(encode(gray, "PNG", icc_profile=p3)), gray.convert("RGB"))


def test_gray_levels_are_converted_by_their_profile():
    white = profile_tag(b"XYZ ", struct.pack(">3i", 63190, 65536, 54061))
    linear = make_profile(
        b"GRAY",
        b"XYZ ",
        {b"wtpt": white, b"kTRC": profile_tag(b"curv", struct.pack(">IH", 1, 256) + b"\0\0")},
    )
    level = pixel(encode(Image.new("L", (4, 4), 55), "PNG", icc_profile=linear))
    np.testing.assert_allclose(level, 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055), atol=1)


def test_cmyk_is_converted_with_and_without_a_profile():
    """Without one it is (1 − ink)(1 − black); Adobe's files store the ink inverted."""
    content = encode(Image.new("CMYK", (16, 16), (0, 255, 255, 51)), "JPEG", quality=100)
    np.testing.assert_allclose(pixel(content), (204, 0, 0), atol=2)
    lut = struct.pack(">4B", 4, 3, 2, 0) + struct.pack(
        ">9i", *(np.eye(3, dtype=int).ravel() * 65536)
    )
    lut += bytes(range(256)) * 4
    corners = [
        (255 - 255 * black, 128, 128) for *_, black in np.ndindex(2, 2, 2, 2)
    ]  # black alone decides the lightness
    lut += bytes(np.array(corners, np.uint8).ravel()) + bytes(range(256)) * 3
    white = profile_tag(b"XYZ ", struct.pack(">3i", 63190, 65536, 54061))
    press = make_profile(
        b"CMYK", b"Lab ", {b"wtpt": white, b"A2B0": profile_tag(b"mft1", lut)}, b"prtr"
    )
    half_black = pixel(
        encode(
            Image.new("CMYK", (16, 16), (200, 0, 0, 128)), "JPEG", quality=100, icc_profile=press
        )
    )
    np.testing.assert_allclose(half_black, (118, 118, 118), atol=4)  # L* = 50 whatever the cyan


def test_transparent_pixels_show_the_background():
    green = (0, 255, 0)
    assert pixel(encode(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG"), background=green) == green
    assert pixel(encode(Image.new("LA", (4, 4), (0, 51)), "PNG")) == (204, 204, 204)
    assert (
        pixel(encode(Image.new("P", (4, 4), 0), "PNG", transparency=0), background=green) == green
    )
    assert pixel(encode(Image.new("P", (4, 4), 0), "PNG", transparency=bytes([51]))) == (
        204,
        204,
        204,
    )
    assert (
        pixel(encode(Image.new("L", (4, 4), 7), "PNG", transparency=7), background=green) == green
    )
    assert (
        pixel(
            encode(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
            background=green,
        )
        == green
    )
    assert pixel(
        encode(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 4)), background=green
    ) == (1, 2, 3)


@pytest.mark.parametrize("image_format", ["PNG", "TIFF"])
def test_gray_levels_of_16_bits_are_scaled(image_format):
    levels = np.array([[0, 256, 0x8080, 0xFFFF]], np.uint16)
    pixels = np.asarray(decode_image(encode(Image.fromarray(levels), image_format)))
    assert pixels[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_gray_levels_of_32_bits_are_scaled_if_their_range_is_known():
    for levels in (
        np.float32([[0, 0.5, 1]]),
        np.float32([[0, 127.5, 255]]),
        np.int32([[0, 32768, 65535]]),
    ):
        assert (
            np.abs(
                np.asarray(decode_image(encode(Image.fromarray(levels), "TIFF")))[0, :, 0]
                - np.array([0.0, 128, 255])
            ).max()
            <= 1
        )
    for levels in (
        np.float32([[0, np.nan]]),
        np.float32([[-1, 1]]),
        np.float32([[0, 1e9]]),
        np.int32([[-5, 5]]),
    ):
        with pytest.raises(UnusableError, match="unknown range of gray levels"):
            decode_image(encode(Image.fromarray(levels), "TIFF"))


def test_other_modes_are_converted():
    assert pixel(encode(Image.new("1", (4, 4), 1), "PNG")) == (255, 255, 255)
    np.testing.assert_allclose(
        pixel(encode(Image.new("YCbCr", (4, 4), (128, 128, 128)), "TIFF")), 128, atol=1
    )
    np.testing.assert_allclose(
        pixel(encode(Image.new("LAB", (4, 4), (128, 128, 128)), "TIFF")), 119, atol=2
    )


# --- smaller JPEGs --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1024, 768), (1021, 779)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller(size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = encode(SMOOTH.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=95, exif=exif)
    full_image, size = decode_image(content), (64, 48)[:: 1 if orientation == 1 else -1]
    for cover_size in (size, (size[0] * 3, size[1] * 3)):
        small_image = decode_image(content, cover_size)
        # Pixels that the image covers only partly are cropped.
        sizes = [(full_image.width // f, full_image.height // f) for f in (2, 4, 8)]
        assert small_image.size in sizes
        assert small_image.width >= 2 * cover_size[0]
        assert small_image.height >= 2 * cover_size[1]
        resized = [to_image(to_array(image, *cover_size)) for image in (small_image, full_image)]
        assert psnr(*map(np.asarray, resized)) > 38
    assert decode_image(content, full_image.size).size == full_image.size
    assert decode_image(FILES["png"], (4, 4)).size == SMOOTH.size


# --- masks ----------------------------------------------------------------------------------------


def test_masks_are_read_from_brightness_or_from_the_alpha_channel():
    levels = Image.linear_gradient("L")
    opaque = Image.new("L", levels.size, 255)
    for image in (levels, levels.convert("RGB"), Image.merge("LA", (levels, opaque))):
        assert np.array_equal(decode_mask(encode(image, "PNG")), levels)
    for color in ("white", "black", "green"):
        image = Image.new("RGBA", levels.size, color)
        image.putalpha(levels)
        assert np.array_equal(decode_mask(encode(image, "PNG")), levels)
    strokes = Image.new("RGBA", (4, 1), (9, 8, 7, 0))  # an editor's layer
    strokes.paste("white", (1, 0, 3, 1))
    assert np.asarray(decode_mask(encode(strokes, "PNG"))).tolist() == [[0, 255, 255, 0]]
    green = Image.new("RGB", (4, 1), (0, 255, 0))
    assert decode_mask(encode(green, "PNG")).getpixel((0, 0)) == 150


def test_a_mask_in_colors_and_alpha_is_refused():
    levels = Image.linear_gradient("L")
    with pytest.raises(UnusableError, match="both its colors and its alpha channel"):
        decode_mask(encode(Image.merge("LA", (levels, levels.rotate(90))), "PNG"))


# --- unusable files -------------------------------------------------------------------------------


def chunk(name, content):
    return (
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
    )


def png(width, height, *chunks):
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">2I5B", width, height, 8, 0, 0, 0, 0))
        + b"".join(chunks)
    )


def frames(image_format):
    first, second = (Image.new("RGB", (12, 10), color) for color in ("red", "blue"))
    return encode(first, image_format, save_all=True, append_images=[second])


def jpeg_of_many_scans():
    content = encode(Image.new("L", (5000, 5000)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * 2000 + content[-2:]


def tiled_tiff(tile_width, tile_height):
    """Return a TIFF file of 16 × 16 pixels in one tile."""
    values = [(256, 16), (257, 16), (258, 8), (259, 8), (262, 1), (277, 1)]
    values += [(322, tile_width), (323, tile_height), (324, 138), (325, 1000)]
    tags = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in values)
    header = b"II*\0\x08\0\0\0" + struct.pack("<H", len(values)) + tags + bytes(8)
    return header + zlib.compress(bytes(100_000)).ljust(1000, b"\0")


ZEROS = chunk(b"IDAT", zlib.compress(b"\0" * 10**7)) + chunk(b"IEND", b"")
UNUSABLE = {
    "page": (b"<!DOCTYPE html>404", "not an image"),
    "empty": (b"", "not an image"),
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "not an image",
    ),
    "icon": (encode(SMOOTH, "ICO", sizes=[(16, 16)]), "not an image"),
    "gif": (frames("GIF"), "animated"),
    "apng": (frames("PNG"), "animated"),
    "webp": (frames("WEBP"), "animated"),
    "png that claims to be large": (png(60_000, 60_000, ZEROS), "too large"),
    "just too large": (png(MAX_PIXELS // 1000 + 1, 1000, ZEROS), "too large"),
    "slow to decode": (
        b"qoif" + struct.pack(">2I2B", MAX_SLOW_PIXELS // 1000 + 1, 1000, 3, 0) + b"\xfd" * 300_000,
        "too large",
    ),
    "absurd": (png(2**31 - 1, 2**31 - 1, ZEROS), "too large"),
    "tile of a small tiff": (tiled_tiff(2**15, 2**15), "too large"),
    "gif that claims to be large": (
        encode(SMOOTH.quantize(), "GIF").replace(struct.pack("<2H", 48, 32), b"\xff" * 4, 1),
        "too large",
    ),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_headers_of_unusable_images_raise_an_error(case, recwarn):
    content, kind = UNUSABLE[case]
    for read in (lambda: read_image_size(io.BytesIO(content)), lambda: decode_image(content)):
        with pytest.raises(UnusableError) as error:
            read()
        assert error.value.kind == kind
    assert not recwarn.list
    assert pickle.loads(pickle.dumps(error.value)).kind == kind


def test_tiles_of_a_tiff_may_exceed_it():
    assert decode_image(tiled_tiff(64, 64)).size == (16, 16)


def test_photographs_with_previews_or_pages_are_not_animated():
    assert pixel(frames("MPO"))[0] > 200
    assert pixel(frames("TIFF")) == (255, 0, 0)


def test_decompression_bombs_raise_an_error():
    content = encode(Image.new("1", (9000, 9900)), "PNG")  # 12 KB, and just small enough
    assert decode_image(content).size == (9000, 9900)
    row = chunk(b"IDAT", zlib.compress(b"\0" * 5)) + chunk(b"IEND", b"")
    assert decode_image(png(4, 1, row)).size == (4, 1)
    for name in (b"iCCP", b"zTXt", b"iTXt", b"xxXx"):
        bomb = chunk(name, b"x\0\0" + zlib.compress(b"\0" * 10**8))
        tracemalloc.start()
        assert decode_image(png(4, 1, bomb, row)).size == (4, 1)
        assert tracemalloc.get_traced_memory()[1] < 4 * MAX_PROFILE_BYTES
        tracemalloc.stop()
    with pytest.raises(UnusableError, match="too many scans"):
        decode_image(jpeg_of_many_scans())


@pytest.mark.parametrize("image_format", ["TIFF", "JPEG", "PNG", "WEBP"])
def test_overlapping_tags_take_no_more_memory_than_the_file(image_format):
    """Each of 2000 tags has all bytes of the file as its value."""
    num_tags, size = 2000, 50_000
    tags = b"".join(struct.pack("<HHII", 0x1000 + i, 7, size, 0) for i in range(num_tags))
    directory = b"II*\0\x08\0\0\0" + struct.pack("<H", num_tags) + tags + bytes(4 + size)
    if image_format == "TIFF":
        content = directory
    else:
        content = encode(SMOOTH, image_format, exif=b"Exif\0\0" + directory[:65_000])
    tracemalloc.start()
    with contextlib.suppress(UnusableError):
        read_image_size(io.BytesIO(content))
        decode_image(content)
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_an_error_of_the_storage_is_not_a_broken_image():
    class FailingFile(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        read_image_size(FailingFile(FILES["png"]))


@pytest.mark.parametrize("image_format", FILES)
def test_truncated_files_are_never_decoded_in_part(image_format):
    """A file that lacks only its last bytes may still be complete."""
    content = FILES[image_format]
    complete = np.asarray(decode_image(content))
    for tenth in range(10):
        with pytest.raises(UnusableError):
            decode_image(content[: len(content) * tenth // 10])
    for num_missing in (1, 2, 3, 8, 12):
        with contextlib.suppress(UnusableError):
            assert np.array_equal(decode_image(content[:-num_missing]), complete)


def test_files_with_wrong_bytes_are_decoded_or_unusable(recwarn):
    """The time of the slowest file is printed."""
    rng, slowest = np.random.default_rng(1), (0.0, "")
    for i in range(2000):
        image_format = list(FILES)[i % len(FILES)]
        content = bytearray(FILES[image_format])
        for position in rng.integers(0, len(content) if i % 2 else 200, rng.integers(1, 6)):
            content[position] = rng.integers(256)
        start = time.perf_counter()
        with contextlib.suppress(UnusableError):
            read_image_size(io.BytesIO(content))
            decode_image(bytes(content), (8, 8))
        slowest = max(slowest, (time.perf_counter() - start, image_format))
    print(f"slowest: {slowest[0]:.3f} s, {slowest[1]}")
    assert not recwarn.list
