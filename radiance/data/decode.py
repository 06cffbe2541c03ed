"""Decoding of image files to 8-bit sRGB: upright, composited over a background, in any format.

No file is trusted. A file that cannot be used raises `UnusableError`, and the header of an image
bounds the cost of decoding it.
"""

import errno
import io
import logging
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np
import PIL
from PIL import ExifTags, Image, features
from PIL.TiffImagePlugin import TILELENGTH, TILEWIDTH, TiffImageFile

from radiance.data import png
from radiance.data.colors import DECODE_ERRORS, MAX_PROFILE_BYTES, split_alpha, to_rgb, to_srgb
from radiance.data.unusable import UnusableError

MAX_PIXELS = 89_478_485  # above this, Pillow suspects a decompression bomb
MAX_SLOW_PIXELS = 2**24  # of formats that Pillow decodes in Python
MAX_FILE_BYTES = 2**30  # an uncompressed image of MAX_PIXELS pixels takes up to 0.7 GB
MAX_SCANS = 20  # scans of a JPEG of MAX_PIXELS pixels; a smaller one may have more
# Formats that Pillow opens and that are not images. Formats are recognized by content, not by name.
EXCLUDED_FORMATS = frozenset(
    (
        "EPS",  # a program, which Ghostscript runs
        *("WMF", "BUFR", "GRIB", "HDF5", "MPEG"),  # recognized, but not decoded on all systems
        *("FITS", "MCIDAS", "SPIDER"),  # measurements
        *("CUR", "ICO", "ICNS", "GBR", "XVTHUMB"),  # cursors, icons, brushes and previews
        *("FLI", "IPTC"),  # films, and captions around another file
    )
)
# Formats whose further frames are previews, layers or pages: the first frame is the image.
STILL_FORMATS = ("MPO", "PSD", "TIFF")
SLOW_FORMATS = ("QOI",)
ORIENTATION_TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
OPTIONAL_CODECS = ("jpg", "jpg_2000", "zlib", "libtiff", "webp", "avif")
Image.init()  # register all formats, not only the most common ones
logging.getLogger("PIL").addHandler(logging.NullHandler())  # print nothing about broken files


def decoder_version() -> str:
    """Return a text that changes with the formats that can be decoded."""
    codecs = [name for name in OPTIONAL_CODECS if features.check(name)]
    return " ".join([PIL.__version__, *codecs, *sorted(Image.OPEN)])


def read_image_size(file: BinaryIO) -> tuple[int, int]:
    """Read the size of an image without decoding it.

    Most formats need the first kilobytes of the file; WebP and AVIF need all of it.

    Args:
        file: Open file.

    Returns:
        Width and height of the upright image in pixels.

    Raises:
        UnusableError: The file is not an image, is animated or is too large.
        OSError: The file cannot be read.
    """
    with _suppress_warnings():
        image = _open_image(file, header_only=True)
        width, height = image.size
        return (height, width) if _read_orientation(image) >= 5 else (width, height)


def decode_image(
    content: bytes,
    cover_size: tuple[int, int] | None = None,
    background: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Decode an image file to 8-bit sRGB.

    The image is rotated and flipped according to EXIF. Colors are converted with the file's ICC
    profile (relative colorimetric, with black point compensation). They are taken as sRGB if there
    is no profile, or the profile is broken or has another color space than the pixels. Transparent
    pixels are composited over the background, blended in sRGB as in browsers.

    Args:
        content: The file.
        cover_size: Width and height that the image will be scaled to cover. A much larger JPEG is
            decoded at 1/2, 1/4 or 1/8 of its size, but never below twice the size needed.
        background: Red, green and blue of the background, 0 to 255.

    Returns:
        An image of mode RGB without metadata.

    Raises:
        UnusableError: The file is not an image that can be used, or it is truncated or broken.
    """
    with _suppress_warnings():
        image = _open_image(io.BytesIO(content), header_only=False)
        orientation, profile = _read_orientation(image), image.info.get("icc_profile")
        if cover_size and orientation >= 5:  # width and height of the stored image are swapped
            cover_size = cover_size[1], cover_size[0]
        with _translate_decode_errors():
            image = _load_pixels(image, content, cover_size)
            rgb_image = to_rgb(image, profile, background)
    if orientation in ORIENTATION_TRANSPOSES:
        return rgb_image.transpose(ORIENTATION_TRANSPOSES[orientation])
    return rgb_image


def decode_mask(content: bytes) -> Image.Image:
    """Decode an image file to a mask of 8-bit gray levels.

    The mask is the alpha channel of an image that is transparent somewhere and whose visible pixels
    have one color. Otherwise it is the brightness.

    Args:
        content: The file.

    Returns:
        An image of mode L without metadata.

    Raises:
        UnusableError: The file cannot be decoded, or both its colors and its alpha channel could be
            the mask.
    """
    with _suppress_warnings():
        image = _open_image(io.BytesIO(content), header_only=False)
        orientation, profile = _read_orientation(image), image.info.get("icc_profile")
        with _translate_decode_errors():
            colors, alpha = split_alpha(_load_pixels(image, content, None))
            mask = to_srgb(colors, profile).convert("L")
    if alpha is not None and alpha.getextrema() != (255, 255):
        visible_levels = np.asarray(mask)[np.asarray(alpha) > 0]
        if len(visible_levels) and visible_levels.min() != visible_levels.max():
            raise UnusableError("both its colors and its alpha channel may be the mask")
        mask = alpha
    mask.info = {}
    if orientation in ORIENTATION_TRANSPOSES:
        return mask.transpose(ORIENTATION_TRANSPOSES[orientation])
    return mask


# --- opening --------------------------------------------------------------------------------------

_warnings_lock = threading.Lock()
_suppression_depth = 0
_warning_filters = warnings.catch_warnings()


@contextmanager
def _suppress_warnings() -> Iterator[None]:
    """Suppress warnings: those of Pillow are either counted as errors or harmless.

    Warning filters belong to the process. So the first of several threads sets them, and the last
    one restores them.
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


def _open_image(file: BinaryIO, header_only: bool) -> Image.Image:
    """Read and check the header of an image, whose pixels are not read later if `header_only`."""
    profile = None
    if png.is_png(file):
        file, profile = png.reduce_png(file, MAX_PROFILE_BYTES, header_only)
    try:
        image = Image.open(
            file, formats=[name for name in Image.ID if name not in EXCLUDED_FORMATS]
        )
        is_animated = image.format not in STILL_FORMATS and getattr(image, "is_animated", False)
    except (Image.DecompressionBombError, MemoryError):
        raise UnusableError("too large") from None
    except DECODE_ERRORS as error:
        # An error of the storage has a number. Pillow's own errors have none, except EINVAL when a
        # broken file makes it seek to an impossible position.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UnusableError("not an image") from None
    max_pixels = MAX_SLOW_PIXELS if image.format in SLOW_FORMATS else MAX_PIXELS
    for width, height in (image.size, _read_tile_size(image)):
        if width * height > max_pixels:
            raise UnusableError("too large", f"{width}×{height}")
    if is_animated:
        raise UnusableError("animated")
    if profile is not None:
        image.info["icc_profile"] = profile
    return image


def _read_tile_size(image: Image.Image) -> tuple[int, int]:
    """Return the size of a TIFF file's tiles, which may be larger than the image."""
    if not isinstance(image, TiffImageFile):
        return 0, 0
    width, height = (image.tag_v2.get(tag, 0) for tag in (TILEWIDTH, TILELENGTH))
    if not (isinstance(width, int) and isinstance(height, int)):
        raise UnusableError("not an image")
    return width, height


def _read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation from 1 to 8; 1 if it cannot be read."""
    if image.format == "TIFF":  # Pillow rotates these itself
        return 1
    try:
        # Not the method of PNG, which decodes the whole image to search for EXIF after the pixels.
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in ORIENTATION_TRANSPOSES else 1
    except DECODE_ERRORS:
        return 1


# --- decoding -------------------------------------------------------------------------------------


@contextmanager
def _translate_decode_errors() -> Iterator[None]:
    """Raise `UnusableError` for all that Pillow raises while it decodes."""
    try:
        yield
    except MemoryError:
        raise UnusableError("too large") from None
    except (*DECODE_ERRORS, Image.DecompressionBombError) as error:
        raise UnusableError("broken image", error) from None


def _load_pixels(
    image: Image.Image, content: bytes, cover_size: tuple[int, int] | None
) -> Image.Image:
    """Decode the pixels of an open image.

    Args:
        image: Image whose header was read.
        content: The file.
        cover_size: Width and height that the stored image must cover, if any.
    """
    box = None
    if image.format in ("JPEG", "MPO"):
        _check_num_scans(content, image)
        if cover_size:
            box = _request_draft(image, cover_size)
    elif image.format == "JPEG2000" and b"\xff\xd9" not in content:
        # Its decoder returns a black image for a truncated file.
        raise UnusableError("broken image", "its end is missing")
    image.load()
    return image.crop(box) if box else image


def _check_num_scans(content: bytes, image: Image.Image):
    """Raise `UnusableError` for a JPEG of thousands of scans.

    A scan may take ten bytes, and makes the decoder process the whole image.
    """
    position, marker = 2, b""
    while marker != b"\xda":  # skip the segments before the first scan
        position = content.find(b"\xff", position) + 1
        marker = content[position : position + 1]
        if position == 0 or not marker:
            return
        if not b"\xd0" <= marker <= b"\xd8" and marker not in b"\x00\x01\xff":
            position += 1 + int.from_bytes(content[position + 1 : position + 3], "big")
    num_scans = 1
    for match in re.finditer(b"\xff[\xd9\xda]", memoryview(content)[position:]):
        num_scans += 1
        if num_scans * image.width * image.height > MAX_SCANS * MAX_PIXELS:
            raise UnusableError("too many scans")
        if match[0] == b"\xff\xd9":
            return


def _request_draft(
    image: Image.Image, cover_size: tuple[int, int]
) -> tuple[int, int, int, int] | None:
    """Make the JPEG decoder return a smaller image if that is enough.

    Returns:
        The box of complete pixels: at the right and bottom there may be pixels that the image
        covers only partly. None if the image is decoded at its full size.
    """
    scale = 2 * max(cover_size[0] / image.width, cover_size[1] / image.height)
    for factor in (8, 4, 2):
        width, height = image.width // factor, image.height // factor
        if width >= scale * image.width and height >= scale * image.height:
            image.draft(image.mode, (width, height))
            return 0, 0, width, height
    return None
