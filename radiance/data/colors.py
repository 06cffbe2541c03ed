"""Conversion of decoded images to 8-bit sRGB, with their profiles and over a background."""

import functools
import io
import struct
import zlib

import numpy as np
from PIL import Image, ImageCms

from radiance.data.unusable import UnusableError

MAX_PROFILE_BYTES = 4 * 2**20  # the profiles of printing presses take one or two million bytes
# Errors that Pillow raises for broken files.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    EOFError,
    AttributeError,
    AssertionError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    ImageCms.PyCMSError,
)
# Color space that an ICC profile must have to apply to pixels of a mode.
PROFILE_COLOR_SPACES = {"L": "GRAY", "RGB": "RGB ", "CMYK": "CMYK"}


def to_rgb(
    image: Image.Image, profile: bytes | None, background: tuple[int, int, int]
) -> Image.Image:
    """Convert to sRGB, then composite over the background, which is sRGB already."""
    colors, alpha = split_alpha(image)
    colors = to_srgb(colors, profile)
    colors.info = {}
    if alpha is None:
        return colors
    canvas = Image.new("RGB", colors.size, background)
    canvas.paste(colors, mask=alpha)
    return canvas


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Return the colors in mode L, RGB, CMYK or LAB, and the opacity of each pixel."""
    mode, transparency = image.mode, image.info.get("transparency")
    if mode in ("I", "F") or mode.startswith("I;16"):
        values = np.asarray(image)
        alpha = None
        if isinstance(transparency, int):
            alpha = Image.fromarray(np.where(values == transparency, 0, 255).astype(np.uint8))
        return _scale_to_8_bits(values), alpha
    if mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        # A transparent color of 16 bits; Pillow keeps the upper 8 bits of the pixels.
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    if image.has_transparency_data:
        is_gray = mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if is_gray else "RGBA")
        return image.convert("L" if is_gray else "RGB"), image.getchannel("A")
    if mode in ("L", "RGB", "CMYK", "LAB"):
        return image, None
    return image.convert("L" if mode == "1" else "RGB"), None


def _scale_to_8_bits(values: np.ndarray) -> Image.Image:
    """Scale gray levels of more than 8 bits to 8 bits.

    For 32-bit integers and floats, no file states which level is white. It is taken as the lowest
    common white level that no pixel exceeds.
    """
    if values.dtype.kind == "f":
        white_levels = (1, 255, 65535)
    else:
        white_levels = (65535, 2**31 - 1) if values.dtype.itemsize == 4 else (65535,)
    darkest, brightest = values.min(), values.max()
    white_level = next((level for level in white_levels if brightest <= level), None)
    if white_level is None or not darkest >= 0:
        raise UnusableError("unknown range of gray levels", f"{darkest} to {brightest}")
    scale = np.float32(255 / white_level)
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))


def to_srgb(colors: Image.Image, profile: bytes | None) -> Image.Image:
    """Convert colors to mode RGB with their profile."""
    if colors.mode == "LAB":
        transform = _make_srgb_transform(None, "LAB")
    elif isinstance(profile, bytes) and len(profile) <= MAX_PROFILE_BYTES:
        transform = _make_srgb_transform(profile, colors.mode)
    else:
        transform = None
    if transform:
        return transform.apply(colors)
    return colors if colors.mode == "RGB" else colors.convert("RGB")  # "RGB" would be copied


@functools.lru_cache(64)
def _make_srgb_transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the transform from a profile to sRGB.

    Args:
        profile: ICC profile; None for CIELAB.
        mode: Mode of the pixels.

    Returns:
        The transform; None if it would change nothing or the profile cannot be used.
    """
    srgb_profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    try:
        source_profile = ImageCms.ImageCmsProfile(
            io.BytesIO(profile) if profile else ImageCms.createProfile("LAB")
        )
        color_space = getattr(source_profile.profile, "xcolor_space", None)
        if profile and color_space != PROFILE_COLOR_SPACES[mode]:
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
    return None if mode in ("L", "RGB") and _is_identity(transform, mode) else transform


def _is_identity(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Return True if a transform changes no color by more than 1: its profile is sRGB."""
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    if mode == "L":
        samples = levels[None]
    else:
        samples = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    sample_image = Image.fromarray(samples)
    converted = np.asarray(transform.apply(sample_image), np.int16)
    unconverted = np.asarray(sample_image.convert("RGB"), np.int16)
    return bool(np.abs(converted - unconverted).max() <= 1)
