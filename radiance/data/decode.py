"""Files of pictures to 8-bit sRGB: upright, whole, over a background, whatever they were kept as.

Nothing here trusts a file. What cannot be used raises Broken, and a picture's head bounds what decoding it will cost.
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

LARGEST = 89_478_485  # pixels: where Pillow begins to suspect a decompression bomb
LARGEST_PROFILE = 4 * 2**20  # bytes: those of presses take one or two million
SCANS = 20  # passes over LARGEST pixels that a JPEG may ask for; over fewer pixels, more
# What Pillow opens and is no picture. The rest is told by its content, whatever the file is called.
EXCLUDED = frozenset(
    (
        "EPS",  # a program, which Ghostscript runs
        *("WMF", "BUFR", "GRIB", "HDF5", "MPEG"),  # recognised, and drawn by nothing or by the system alone
        *("FITS", "MCIDAS", "SPIDER"),  # measurements
        *("CUR", "ICO", "ICNS", "GBR", "XVTHUMB"),  # cursors, icons, brushes and previews
        *("FLI", "IPTC"),  # films, and captions around something else
    )
)
# Their further frames are previews, layers and pages: the first is the picture.
STILL = ("MPO", "PSD", "TIFF")
# What Pillow raises for a broken file.
BROKEN = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, ArithmeticError, EOFError, AttributeError, AssertionError, RuntimeError,
    MemoryError, struct.error, zlib.error, ImageCms.PyCMSError,
)  # fmt: skip
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The colour space that a profile must be of to explain pixels of that mode.
SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}

Image.init()  # every format, not only the commonest
logging.getLogger("PIL").addHandler(logging.NullHandler())  # what it logs of a file goes nowhere unless someone listens


class Broken(Exception):
    """A picture that cannot be used. `kind`, in a few words, is what it is counted under."""

    def __init__(self, kind: str, detail: object = ""):
        super().__init__(f"{kind} ({detail})" if str(detail) else kind)
        self.kind = kind


def size_of(head: BinaryIO) -> tuple[int, int]:
    """Width and height in pixels, upright, of a picture that is not decoded. `head` is an open file: most formats need its first
    kilobytes, WebP and AVIF the whole.

    Raises Broken: not a picture, animated, too large. An OSError of the file itself is passed on.
    """
    with _quiet():
        opened = _opened(head)
        width, height = opened.size
        return (height, width) if _orientation(opened) >= 5 else (width, height)


def picture(content: bytes, cover: tuple[int, int] | None = None, background: tuple[int, int, int] = (255, 255, 255)) -> Image.Image:
    """A file decoded: mode "RGB", 8-bit sRGB, turned as its EXIF says, and nothing else of the file.

    Colours go through the file's ICC profile (relative colorimetric, with black point compensation), unless that is broken or of
    another colour space than the pixels; without one they are sRGB. Transparent pixels lie over `background`, blended in sRGB as
    browsers do.

    cover: (width, height) that the picture will be scaled to cover. A JPEG that is far larger is decoded at a half, a quarter or an eighth of
    its size, and never at less than twice what is needed.

    Raises Broken, and nothing else: for what size_of does, and for files that are cut short or broken.
    """
    with _quiet():
        opened = _opened(io.BytesIO(content))
        orientation, profile, box = _orientation(opened), opened.info.get("icc_profile"), None
        try:
            if opened.format in ("JPEG", "MPO"):
                _check_scans(content, opened)
                box = _draft(opened, cover[::-1] if orientation >= 5 else cover) if cover else None
            elif opened.format == "JPEG2000" and b"\xff\xd9" not in content:
                raise Broken("broken picture", "its end is missing")  # of which its decoder makes a black one
            opened.load()
            decoded = _over(opened.crop(box) if box else opened, profile, background)
        except MemoryError:
            raise Broken("too large") from None
        except (*BROKEN, Image.DecompressionBombError) as error:
            raise Broken("broken picture", error) from None
    return decoded.transpose(TURNS[orientation]) if orientation in TURNS else decoded


# --- opening ------------------------------------------------------------------------------------------------------------

_lock, _silent, _filters = threading.Lock(), 0, warnings.catch_warnings()


@contextmanager
def _quiet() -> Iterator[None]:
    """No warnings: what Pillow warns of is either counted or of no account. The filters are the process's own, so that of several
    threads the first changes them and the last puts them back."""
    global _silent, _filters
    with _lock:
        if _silent == 0:
            _filters = warnings.catch_warnings()
            _filters.__enter__()
            warnings.simplefilter("ignore")
        _silent += 1
    try:
        yield
    finally:
        with _lock:
            _silent -= 1
            if _silent == 0:
                _filters.__exit__(None, None, None)


def _opened(file: BinaryIO) -> Image.Image:
    """The head read and judged."""
    try:
        opened = Image.open(file, formats=[name for name in Image.ID if name not in EXCLUDED])
        animated = opened.format not in STILL and getattr(opened, "is_animated", False)
    except (Image.DecompressionBombError, MemoryError):
        raise Broken("too large") from None
    except BROKEN as error:
        # Pillow's own complaints have no number, and a broken file may send it to a place that cannot be.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise Broken("not a picture") from None
    if opened.width * opened.height > LARGEST:
        raise Broken("too large", f"{opened.width}×{opened.height}")
    if animated:
        raise Broken("animated")
    return opened


def _orientation(opened: Image.Image) -> int:
    """1 to 8, as in EXIF; one that cannot be read is none."""
    if opened.format == "TIFF":  # which Pillow turns itself
        return 1
    try:
        # Not PNG's own method, which decodes the whole picture to see whether EXIF follows the pixels.
        orientation = Image.Image.getexif(opened).get(ExifTags.Base.Orientation, 1)
        return orientation if orientation in TURNS else 1
    except BROKEN:
        return 1


def _check_scans(content: bytes, opened: Image.Image):
    """Raises Broken for a JPEG of thousands of scans: each may take ten bytes, and sends the decoder over the whole picture."""
    position, marker = 2, b""
    while marker != b"\xda":  # the segments before the first scan
        position = content.find(b"\xff", position) + 1
        marker = content[position : position + 1]
        if position == 0 or not marker:
            return
        if not b"\xd0" <= marker <= b"\xd8" and marker not in b"\x00\x01\xff":
            position += 1 + int.from_bytes(content[position + 1 : position + 3], "big")
    scans = 1
    for marker in re.finditer(b"\xff[\xd9\xda]", memoryview(content)[position:]):
        scans += 1
        if scans * opened.width * opened.height > SCANS * LARGEST:
            raise Broken("too many scans")
        if marker[0] == b"\xff\xd9":
            return


def _draft(opened: Image.Image, cover: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """Asks JPEG's decoder for a smaller picture, where one is enough. The part of it that holds whole pixels: at its far edges may stand
    parts of some."""
    scale = 2 * max(cover[0] / opened.width, cover[1] / opened.height)
    for factor in (8, 4, 2):
        width, height = opened.width // factor, opened.height // factor
        if width >= scale * opened.width and height >= scale * opened.height:
            opened.draft(opened.mode, (width, height))
            return 0, 0, width, height
    return None


# --- pixels -------------------------------------------------------------------------------------------------------------


def _over(opened: Image.Image, profile: bytes | None, background: tuple[int, int, int]) -> Image.Image:
    """In sRGB, and transparent pixels over the background: colours first, for the background is sRGB already."""
    colours, alpha = _parted(opened)
    colours = _in_srgb(colours, profile)
    colours.info = {}
    if alpha is None:
        return colours
    canvas = Image.new("RGB", colours.size, background)
    canvas.paste(colours, mask=alpha)
    return canvas


def _parted(opened: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours of mode L, RGB, CMYK or LAB, and how opaque each pixel is."""
    mode, key = opened.mode, opened.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(opened)
        alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
        return _grey(values), alpha
    if mode == "RGB" and isinstance(key, tuple) and max(key) > 255:  # of 16 bits, of which Pillow keeps the upper 8
        opened.info["transparency"] = tuple(value >> 8 for value in key)
    if opened.has_transparency_data:
        grey = mode in ("1", "L", "LA", "La")
        opened = opened.convert("LA" if grey else "RGBA")
        return opened.convert("L" if grey else "RGB"), opened.getchannel("A")
    if mode in ("L", "RGB", "CMYK", "LAB"):
        return opened, None
    return opened.convert("L" if mode == "1" else "RGB"), None


def _grey(values: np.ndarray) -> Image.Image:
    """Greys of more than 8 bits, scaled to 8. Of integers of 32 bits and of floats no file says which is white: it is the least usual
    one that the brightest pixel does not exceed."""
    if values.dtype.kind == "f":
        whites = (1, 255, 65535)
    else:
        whites = (65535, 2**31 - 1) if values.dtype.itemsize == 4 else (65535,)
    darkest, brightest = values.min(), values.max()
    white = next((white for white in whites if brightest <= white), None)
    if white is None or not darkest >= 0:
        raise Broken("unknown range of greys", f"{darkest} to {brightest}")
    scale = np.float32(255 / white)
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))


def _in_srgb(colours: Image.Image, profile: bytes | None) -> Image.Image:
    if colours.mode == "LAB":
        return _transform(None, "LAB").apply(colours)
    transform = _transform(profile, colours.mode) if isinstance(profile, bytes) and len(profile) <= LARGEST_PROFILE else None
    if transform:
        return transform.apply(colours)
    return colours if colours.mode == "RGB" else colours.convert("RGB")  # which would copy it


@functools.lru_cache(64)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile (none: CIELAB) to sRGB; none where it would change nothing or cannot be used."""
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        if profile and source.profile.xcolor_space != SPACES[mode]:
            return None
        transform = ImageCms.ImageCmsTransform(
            source, srgb, mode, "RGB", ImageCms.Intent.RELATIVE_COLORIMETRIC, flags=ImageCms.Flags.BLACKPOINTCOMPENSATION
        )
    except BROKEN:
        return None
    if mode in ("L", "RGB"):
        levels = np.arange(0, 256, 15, dtype=np.uint8)
        samples = levels[None] if mode == "L" else np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
        before = Image.fromarray(samples)
        change = np.asarray(transform.apply(before), np.int16) - np.asarray(before.convert("RGB"), np.int16)
        if np.abs(change).max() <= 1:  # sRGB, by whichever name
            return None
    return transform
