"""Files of images to sRGB: as a browser would show them, or Broken."""

import contextlib
import errno
import io
import pickle
import struct
import time
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from radiance.base.images import to_array, to_image
from radiance.data.decode import (
    MAX_PIXELS,
    ORIENTATION_TRANSPOSES,
    UnusableError,
    decode_image,
    read_image_size,
)
from tests.helpers.toy_runs import output_of

DRAW = np.random.default_rng(0)
SMOOTH = Image.fromarray(DRAW.integers(0, 256, (4, 6, 3), np.uint8)).resize(
    (48, 32), Image.Resampling.BICUBIC
)


def saved(image, form, **how):
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def psnr(a, b):
    return 10 * np.log10(
        255**2 / max(1e-9, np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    )


def pixel(content, **how):
    return decode_image(content, **how).getpixel((0, 0))


FILES = {
    "png": saved(SMOOTH, "PNG"),
    "jpeg": saved(SMOOTH, "JPEG"),
    "progressive": saved(SMOOTH, "JPEG", progressive=True),
    "cmyk": saved(SMOOTH.convert("CMYK"), "JPEG"),
    "webp": saved(SMOOTH, "WEBP"),
    "lossless webp": saved(SMOOTH, "WEBP", lossless=True),
    "gif": saved(SMOOTH.quantize(), "GIF"),
    "bmp": saved(SMOOTH, "BMP"),
    "tiff": saved(SMOOTH, "TIFF"),
    "deflated tiff": saved(SMOOTH, "TIFF", compression="tiff_adobe_deflate"),
    "jpeg 2000": saved(SMOOTH, "JPEG2000"),
    "ppm": saved(SMOOTH, "PPM"),
    "tga": saved(SMOOTH, "TGA", compression="tga_rle"),
}
if features.check("avif"):
    FILES["avif"] = saved(SMOOTH, "AVIF")


def test_no_jax():
    told = "import sys, radiance.data.decode, radiance.data.captions, radiance.images; print('jax' in sys.modules)"
    assert output_of(told) == b"False\n"


# --- upright ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation(form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(SMOOTH, form, exif=exif, **({} if form == "PNG" else {"quality": 95}))
    upright = SMOOTH.transpose(ORIENTATION_TRANSPOSES[orientation]) if orientation > 1 else SMOOTH
    assert read_image_size(io.BytesIO(content)) == upright.size == decode_image(content).size
    assert psnr(decode_image(content), upright) > 30


def test_an_orientation_that_cannot_be_read():
    for exif in (b"Exif\0\0no TIFF", b""):
        assert read_image_size(io.BytesIO(saved(SMOOTH, "PNG", exif=exif))) == SMOOTH.size


def test_the_size_of_a_png_is_read_without_its_pixels():
    assert read_image_size(io.BytesIO(FILES["png"][:60])) == SMOOTH.size


# --- colors ------------------------------------------------------------------------------------------------------------


def tag(kind, body):
    return kind + b"\0\0\0\0" + body


def matrix_profile(primaries, gamma):
    """An ICC profile of RGB with a gamma curve; columns of `primaries` are XYZ of D50."""
    fixed = [
        tag(b"XYZ ", struct.pack(">3i", *np.rint(column * 65536).astype(int)))
        for column in [*primaries.T, primaries.sum(1)]
    ]
    curve = tag(b"curv", struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0")
    tags = dict(zip((b"rXYZ", b"gXYZ", b"bXYZ", b"wtpt"), fixed)) | {
        name: curve for name in (b"rTRC", b"gTRC", b"bTRC")
    }
    return profile(b"RGB ", b"XYZ ", tags)


def profile(space, connection, tags, kind=b"mntr"):
    offset, table, body = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        table += name + struct.pack(">2I", offset + len(body), len(content))
        body += content + b"\0" * (-len(content) % 4)
    head = struct.pack(">I4sI4s4s4s12s4s28x3i48x", offset + len(body), b"\0" * 4, 0x02400000, kind, space, connection, b"\0" * 12, b"acsp", 63190, 65536, 54061)  # fmt: skip
    return head + struct.pack(">I", len(tags)) + table + body


# Of D50, columns red, green and blue.
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
def test_profiles_lead_to_srgb(color):
    p3 = matrix_profile(P3, 2.2)
    content = saved(Image.new("RGB", (8, 8), color), "PNG", icc_profile=p3)
    np.testing.assert_allclose(pixel(content), p3_to_srgb(color), atol=2)
    palette = Image.new("RGB", (8, 8), color).quantize(2)
    np.testing.assert_allclose(
        pixel(saved(palette, "PNG", icc_profile=p3)), p3_to_srgb(color), atol=2
    )
    half = Image.new("RGBA", (8, 8), (*color, 128))
    over = 255 * (127 / 255) + p3_to_srgb(color) * (128 / 255)  # the background is sRGB already
    np.testing.assert_allclose(pixel(saved(half, "PNG", icc_profile=p3)), over, atol=2)


def test_profiles_that_change_nothing():
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    p3 = matrix_profile(P3, 2.2)
    for wrong in (
        srgb,
        b"no profile",
        b"",
        p3[:200],
        p3.replace(b"acsp", b"abcd"),
        p3.replace(b"RGB ", b"CMYK"),
    ):
        assert np.array_equal(decode_image(saved(SMOOTH, "PNG", icc_profile=wrong)), SMOOTH)
    grey = SMOOTH.convert("L")
    assert np.array_equal(decode_image(saved(grey, "PNG", icc_profile=p3)), grey.convert("RGB"))


def test_a_profile_of_greys():
    white = tag(b"XYZ ", struct.pack(">3i", 63190, 65536, 54061))
    linear = profile(
        b"GRAY",
        b"XYZ ",
        {b"wtpt": white, b"kTRC": tag(b"curv", struct.pack(">IH", 1, 256) + b"\0\0")},
    )
    told = pixel(saved(Image.new("L", (4, 4), 55), "PNG", icc_profile=linear))
    np.testing.assert_allclose(told, 255 * (1.055 * (55 / 255) ** (1 / 2.4) - 0.055), atol=1)


def test_cmyk():
    """(1 − ink)(1 − black), where Adobe's files keep the ink inverted; with a profile, as that says."""
    content = saved(Image.new("CMYK", (16, 16), (0, 255, 255, 51)), "JPEG", quality=100)
    np.testing.assert_allclose(pixel(content), (204, 0, 0), atol=2)
    lut = struct.pack(">4B", 4, 3, 2, 0) + struct.pack(
        ">9i", *(np.eye(3, dtype=int).ravel() * 65536)
    )
    lut += bytes(range(256)) * 4
    corners = [
        (255 - 255 * black, 128, 128) for *_, black in np.ndindex(2, 2, 2, 2)
    ]  # lightness is what black leaves
    lut += bytes(np.array(corners, np.uint8).ravel()) + bytes(range(256)) * 3
    white = tag(b"XYZ ", struct.pack(">3i", 63190, 65536, 54061))
    press = profile(b"CMYK", b"Lab ", {b"wtpt": white, b"A2B0": tag(b"mft1", lut)}, b"prtr")
    half = pixel(
        saved(Image.new("CMYK", (16, 16), (200, 0, 0, 128)), "JPEG", quality=100, icc_profile=press)
    )
    np.testing.assert_allclose(half, (118, 118, 118), atol=4)  # L* = 50 whatever the cyan


def test_transparent_pixels():
    green = (0, 255, 0)
    assert pixel(saved(Image.new("RGBA", (4, 4), (9, 9, 9, 0)), "PNG"), background=green) == green
    assert pixel(saved(Image.new("LA", (4, 4), (0, 51)), "PNG")) == (204, 204, 204)
    assert pixel(saved(Image.new("P", (4, 4), 0), "PNG", transparency=0), background=green) == green
    assert pixel(saved(Image.new("P", (4, 4), 0), "PNG", transparency=bytes([51]))) == (
        204,
        204,
        204,
    )
    assert pixel(saved(Image.new("L", (4, 4), 7), "PNG", transparency=7), background=green) == green
    assert (
        pixel(
            saved(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 3)),
            background=green,
        )
        == green
    )
    assert pixel(
        saved(Image.new("RGB", (4, 4), (1, 2, 3)), "PNG", transparency=(1, 2, 4)), background=green
    ) == (1, 2, 3)


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_greys_of_16_bits_are_scaled(form):
    levels = np.array([[0, 256, 0x8080, 0xFFFF]], np.uint16)
    told = np.asarray(decode_image(saved(Image.fromarray(levels), form)))
    assert told[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_greys_of_32_bits():
    for levels in (
        np.float32([[0, 0.5, 1]]),
        np.float32([[0, 127.5, 255]]),
        np.int32([[0, 32768, 65535]]),
    ):
        assert (
            np.abs(
                np.asarray(decode_image(saved(Image.fromarray(levels), "TIFF")))[0, :, 0]
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
        with pytest.raises(UnusableError, match="unknown range of greys"):
            decode_image(saved(Image.fromarray(levels), "TIFF"))


def test_other_modes():
    assert pixel(saved(Image.new("1", (4, 4), 1), "PNG")) == (255, 255, 255)
    np.testing.assert_allclose(
        pixel(saved(Image.new("YCbCr", (4, 4), (128, 128, 128)), "TIFF")), 128, atol=1
    )
    np.testing.assert_allclose(
        pixel(saved(Image.new("LAB", (4, 4), (128, 128, 128)), "TIFF")), 119, atol=2
    )


# --- smaller and cut ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(1024, 768), (1021, 779)])
@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller(size, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(SMOOTH.resize(size, Image.Resampling.BICUBIC), "JPEG", quality=95, exif=exif)
    whole, cover = decode_image(content), (64, 48)[:: 1 if orientation == 1 else -1]
    for asked in (cover, (cover[0] * 3, cover[1] * 3)):
        small = decode_image(content, asked)
        assert small.size in [
            (whole.width // f, whole.height // f) for f in (2, 4, 8)
        ]  # no pixel of a part of the image
        assert small.width >= 2 * asked[0]
        assert small.height >= 2 * asked[1]
        assert psnr(*(np.asarray(to_image(to_array(x, *asked))) for x in (small, whole))) > 38
    assert decode_image(content, whole.size).size == whole.size
    assert decode_image(FILES["png"], (4, 4)).size == SMOOTH.size


# --- what cannot be used ------------------------------------------------------------------------------------------------


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


def frames(form):
    first, second = (Image.new("RGB", (12, 10), color) for color in ("red", "blue"))
    return saved(first, form, save_all=True, append_images=[second])


def jpeg_of_many_scans():
    content = saved(Image.new("L", (5000, 5000)), "JPEG", progressive=True)
    last = content.rindex(b"\xff\xda")
    return content[:-2] + content[last:-2] * 2000 + content[-2:]


ZEROS = chunk(b"IDAT", zlib.compress(b"\0" * 10**7)) + chunk(b"IEND", b"")
UNFIT = {
    "page": (b"<!DOCTYPE html>404", "not an image"),
    "empty": (b"", "not an image"),
    "postscript": (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
        "not an image",
    ),
    "icon": (saved(SMOOTH, "ICO", sizes=[(16, 16)]), "not an image"),
    "gif": (frames("GIF"), "animated"),
    "apng": (frames("PNG"), "animated"),
    "webp": (frames("WEBP"), "animated"),
    "claimed": (png(60_000, 60_000, ZEROS), "too large"),
    "just too large": (png(MAX_PIXELS // 1000 + 1, 1000, ZEROS), "too large"),
    "absurd": (png(2**31 - 1, 2**31 - 1, ZEROS), "too large"),
    "gif's claim": (
        saved(SMOOTH.quantize(), "GIF").replace(struct.pack("<2H", 48, 32), b"\xff" * 4, 1),
        "too large",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_a_head_tells(case, recwarn):
    content, kind = UNFIT[case]
    for look in (lambda: read_image_size(io.BytesIO(content)), lambda: decode_image(content)):
        with pytest.raises(UnusableError) as told:
            look()
        assert told.value.kind == kind
    assert not recwarn.list
    assert pickle.loads(pickle.dumps(told.value)).kind == kind


def test_photographs_with_previews_and_pages_are_still():
    assert pixel(frames("MPO"))[0] > 200
    assert pixel(frames("TIFF")) == (255, 0, 0)


def test_bombs():
    content = saved(Image.new("1", (9000, 9900)), "PNG")  # real, of 12 KB, and just small enough
    assert decode_image(content).size == (9000, 9900)
    row = chunk(b"IDAT", zlib.compress(b"\0" * 5)) + chunk(b"IEND", b"")
    assert decode_image(png(4, 1, row)).size == (4, 1)
    for name in (b"iCCP", b"zTXt"):
        with pytest.raises(UnusableError):
            decode_image(png(4, 1, chunk(name, b"x\0\0" + zlib.compress(b"\0" * 10**8)), row))
    with pytest.raises(UnusableError, match="too many scans"):
        decode_image(jpeg_of_many_scans())


def test_a_file_that_fails_is_no_broken_image():
    class Failing(io.BytesIO):
        def read(self, *_):
            raise OSError(errno.EIO, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        read_image_size(Failing(FILES["png"]))


@pytest.mark.parametrize("form", FILES)
def test_files_cut_short(form):
    """Never half an image: what lacks only its last bytes may still be whole."""
    content = FILES[form]
    whole = np.asarray(decode_image(content))
    for tenth in range(10):
        with pytest.raises(UnusableError):
            decode_image(content[: len(content) * tenth // 10])
    for cut in (1, 2, 3, 8, 12):
        with contextlib.suppress(UnusableError):
            assert np.array_equal(decode_image(content[:-cut]), whole)


def test_wrong_bytes(recwarn):
    """Each file is an image or Broken; the slowest is printed, to be looked at."""
    draw, slowest = np.random.default_rng(1), (0.0, "")
    for i in range(2000):
        form = list(FILES)[i % len(FILES)]
        content = bytearray(FILES[form])
        for place in draw.integers(0, len(content) if i % 2 else 200, draw.integers(1, 6)):
            content[place] = draw.integers(256)
        start = time.perf_counter()
        with contextlib.suppress(UnusableError):
            read_image_size(io.BytesIO(content))
            decode_image(bytes(content), (8, 8))
        slowest = max(slowest, (time.perf_counter() - start, form))
    print(f"slowest: {slowest[0]:.3f} s, {slowest[1]}")
    assert not recwarn.list
