"""Files of images to 8-bit sRGB: upright, whole, over a background, whatever they were kept as.

Nothing here trusts a file. What cannot be used raises Broken, and an image's head bounds what decoding it will cost.
"""

import errno
import functools
import io
import logging
import re
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageCms

MAX_PIXELS = 89_478_485  # pixels: where Pillow begins to suspect a decompression bomb
MAX_PROFILE_BYTES = 4 * 2**20  # bytes: those of presses take one or two million
MAX_SCANS = 20  # passes over LARGEST pixels that a JPEG may ask for; over fewer pixels, more
# What Pillow opens and is no image. The rest is told by its content, whatever the file is called.
EXCLUDED_FORMATS = frozenset(
    (
        "EPS",  # a program, which Ghostscript runs
        *(
            "WMF",
            "BUFR",
            "GRIB",
            "HDF5",
            "MPEG",
        ),  # recognized, and drawn by nothing or by the system alone
        *("FITS", "MCIDAS", "SPIDER"),  # measurements
        *("CUR", "ICO", "ICNS", "GBR", "XVTHUMB"),  # cursors, icons, brushes and previews
        *("FLI", "IPTC"),  # films, and captions around something else
    )
)
# Their further frames are previews, layers and pages: the first is the image.
STILL_FORMATS = ("MPO", "PSD", "TIFF")
# What Pillow raises for a broken file.
DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, AttributeError, AssertionError, RuntimeError,
    MemoryError, struct.error, zlib.error, ImageCms.PyCMSError,
)  # fmt: skip
ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The color space that a profile must be of to explain pixels of that mode.
PROFILE_COLOR_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}

Image.init()  # every format, not only the commonest
logging.getLogger("PIL").addHandler(
    logging.NullHandler()
)  # what it logs of a file goes nowhere unless someone listens


class UnusableError(Exception):
    """An image that cannot be used. `kind`, in a few words, is what it is counted under."""

    def __init__(self, kind: str, detail: object = ""):
        super().__init__(f"{kind} ({detail})" if str(detail) else kind)
        self.kind = kind


def read_image_size(file: BinaryIO) -> tuple[int, int]:
    """Width and height in pixels, upright, of an image that is not decoded. `head` is an open file: most formats need its first
    kilobytes, WebP and AVIF the whole.

    Raises Broken: not an image, animated, too large. An OSError of the file itself is passed on.
    """
    with _suppress_warnings():
        image = _open_image(file)
        width, height = image.size
        return (height, width) if _read_orientation(image) >= 5 else (width, height)


def decode_image(
    content: bytes,
    cover_size: tuple[int, int] | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """A file decoded: mode "RGB", 8-bit sRGB, turned as its EXIF says, and nothing else of the file.

    Colors go through the file's ICC profile (relative colorimetric, with black point compensation), unless that is broken or of
    another color space than the pixels; without one they are sRGB. Transparent pixels lie over `background`, blended in sRGB as
    browsers do.

    cover: (width, height) that the image will be scaled to cover. A JPEG that is far larger is decoded at a half, a quarter or an eighth of
    its size, and never at less than twice what is needed.

    Raises Broken, and nothing else: for what size_of does, and for files that are cut short or broken.
    """
    with _suppress_warnings():
        image = _open_image(io.BytesIO(content))
        orientation, profile, box = _read_orientation(image), image.info.get("icc_profile"), None
        try:
            if image.format in ("JPEG", "MPO"):
                _check_num_scans(content, image)
                box = (
                    _request_draft(image, cover_size[::-1] if orientation >= 5 else cover_size)
                    if cover_size
                    else None
                )
            elif image.format == "JPEG2000" and b"\xff\xd9" not in content:
                raise UnusableError(
                    "broken image", "its end is missing"
                )  # of which its decoder makes a black one
            image.load()
            rgb_image = _to_rgb(image.crop(box) if box else image, profile, background)
        except MemoryError:
            raise UnusableError("too large") from None
        except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
            raise UnusableError("broken image", error) from None
    return (
        rgb_image.transpose(ORIENTATION_TRANSPOSES[orientation])
        if orientation in ORIENTATION_TRANSPOSES
        else rgb_image
    )


# --- opening ------------------------------------------------------------------------------------------------------------

_warnings_lock, _suppression_depth, _warning_filters = (
    threading.Lock(),
    0,
    warnings.catch_warnings(),
)


@contextmanager
def _suppress_warnings() -> Iterator[None]:
    """No warnings: what Pillow warns of is either counted or of no account. The filters are the process's own, so that of several
    threads the first changes them and the last puts them back.
    """
    global _suppression_depth, _warning_filters
    with _warnings_lock:
        if _suppression_depth == 0:
            _warning_filters = warnings.catch_warnings()
            _warning_filters.__enter__()
            warnings.simplefilter("ignore")
        _suppression_depth += 1
    try:
        yield
    finally:
        with _warnings_lock:
            _suppression_depth -= 1
            if _suppression_depth == 0:
                _warning_filters.__exit__(None, None, None)


def _open_image(file: BinaryIO) -> Image.Image:
    """The head read and judged."""
    try:
        image = Image.open(
            file, formats=[name for name in Image.ID if name not in EXCLUDED_FORMATS]
        )
        is_animated = image.format not in STILL_FORMATS and getattr(image, "is_animated", False)
    except (Image.DecompressionBombError, MemoryError):
        raise UnusableError("too large") from None
    except DECODE_ERRORS as error:
        # Pillow's own complaints have no number, and a broken file may send it to a place that cannot be.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UnusableError("not an image") from None
    if image.width * image.height > MAX_PIXELS:
        raise UnusableError("too large", f"{image.width}×{image.height}")
    if is_animated:
        raise UnusableError("animated")
    return image


def _read_orientation(image: Image.Image) -> int:
    """1 to 8, as in EXIF; one that cannot be read is none."""
    if image.format == "TIFF":  # which Pillow turns itself
        return 1
    try:
        # Not PNG's own method, which decodes the whole image to see whether EXIF follows the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in ORIENTATION_TRANSPOSES else 1
    except DECODE_ERRORS:
        return 1


def _check_num_scans(content: bytes, image: Image.Image):
    """Raises Broken for a JPEG of thousands of scans: each may take ten bytes, and sends the decoder over the whole image."""
    position, marker = 2, b""
    while marker != b"\xda":  # the segments before the first scan
        position = content.find(b"\xff", position) + 1
        marker = content[position : position + 1]
        if position == 0 or not marker:
            return
        if not b"\xd0" <= marker <= b"\xd8" and marker not in b"\x00\x01\xff":
            position += 1 + int.from_bytes(content[position + 1 : position + 3], "big")
    num_scans = 1
    for marker in re.finditer(b"\xff[\xd9\xda]", memoryview(content)[position:]):
        num_scans += 1
        if num_scans * image.width * image.height > MAX_SCANS * MAX_PIXELS:
            raise UnusableError("too many scans")
        if marker[0] == b"\xff\xd9":
            return


def _request_draft(
    image: Image.Image, cover_size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Asks JPEG's decoder for a smaller image, where one is enough. The part of it that holds whole pixels: at its far edges may stand
    parts of some.
    """
    scale = 2 * max(cover_size[0] / image.width, cover_size[1] / image.height)
    for factor in (8, 4, 2):
        width, height = image.width // factor, image.height // factor
        if width >= scale * image.width and height >= scale * image.height:
            image.draft(image.mode, (width, height))
            return 0, 0, width, height
    return None


# --- pixels -------------------------------------------------------------------------------------------------------------


def _to_rgb(
    image: Image.Image, profile: bytes | None, background: tuple[int, int, int]
) -> Image.Image:
    """In sRGB, and transparent pixels over the background: colors first, for the background is sRGB already."""
    colors, alpha = _split_alpha(image)
    colors = _to_srgb(colors, profile)
    colors.info = {}
    if alpha is None:
        return colors
    canvas = Image.new("RGB", colors.size, background)
    canvas.paste(colors, mask=alpha)
    return canvas


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colors of mode L, RGB, CMYK or LAB, and how opaque each pixel is."""
    mode, transparency = image.mode, image.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(image)
        alpha = (
            Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8))
            if isinstance(transparency, int)
            else None
        )
        return _scale_to_8_bits(values), alpha
    if (
        mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255
    ):  # of 16 bits, of which Pillow keeps the upper 8
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    if image.has_transparency_data:
        is_gray = mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if is_gray else "RGBA")
        return image.convert("L" if is_gray else "RGB"), image.getchannel("A")
    if mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if mode == "1" else "RGB"), None


def _scale_to_8_bits(values: np.ndarray) -> Image.Image:
    """Greys of more than 8 bits, scaled to 8. Of integers of 32 bits and of floats no file says which is white: it is the least usual
    one that the brightest pixel does not exceed.
    """
    if values.dtype.kind == "f":
        white_levels = (1, 255, 65535)
    else:
        white_levels = (65535, 2**31 - 1) if values.dtype.itemsize == 4 else (65535,)
    darkest, brightest = values.min(), values.max()
    white_level = next(
        (white_level for white_level in white_levels if brightest <= white_level), None
    )
    if white_level is None or not darkest >= 0:
        raise UnusableError("unknown range of greys", f"{darkest} to {brightest}")
    scale = np.float32(255 / white_level)
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))


def _to_srgb(colors: Image.Image, profile: bytes | None) -> Image.Image:
    if colors.mode == "LAB":
        return _make_srgb_transform(None, "LAB").apply(colors)
    transform = (
        _make_srgb_transform(profile, colors.mode)
        if isinstance(profile, bytes) and len(profile) <= MAX_PROFILE_BYTES
        else None
    )
    if transform:
        return transform.apply(colors)
    return colors if colors.mode == "RGB" else colors.convert("RGB")  # which would copy it


@functools.lru_cache(64)
def _make_srgb_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile (none: CIELAB) to sRGB; none where it would change nothing or cannot be used."""
    srgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    try:
        source_profile = ImageCms.ImageCmsProfile(
            io.BytesIO(profile) if profile else ImageCms.createProfile("LAB")
        )
        if profile and source_profile.profile.xcolor_space != PROFILE_COLOR_SPACES[mode]:
            return None
        transform = ImageCms.ImageCmsTransform(
            source_profile,
            srgb_profile,
            mode,
            "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except DECODE_ERRORS:
        return None
    if mode in ("L", "RGB"):
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        samples = (
            levels[None]
            if mode == "L"
            else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        )
        sample_image = Image.fromarray(samples)
        difference = np.asarray(transform.apply(sample_image), np.int16) - np.asarray(
            sample_image.convert("RGB"), np.int16
        )
        if np.abs(difference).max() <= 1:  # sRGB, by whichever name
            return None
    return transform
