"""Reduction of PNG files to what decoding needs.

Pillow refuses a PNG file with long texts, such as the workflows of other tools, or with a profile
over 1 MiB, because either could fill the memory when it is decompressed. This module leaves out all
texts but the ones that may hold an orientation, and decompresses long profiles up to a limit.
"""

import io
import struct
import zlib
from typing import BinaryIO, NamedTuple

from PIL.PngImagePlugin import MAX_TEXT_CHUNK

SIGNATURE = b"\x89PNG\r\n\x1a\n"
END_CHUNK = b"\0\0\0\0IEND\xaeB`\x82"
TEXT_TYPES = (b"tEXt", b"zTXt", b"iTXt")
PIXEL_TYPES = (b"IDAT", b"PLTE", b"tRNS", b"fdAT")  # of any length
ORIENTATION_KEYWORDS = (b"XML:com.adobe.xmp", b"Raw profile type exif")


class ReducedPng(NamedTuple):
    """A PNG file without long texts and profiles."""

    file: BinaryIO
    profile: bytes | None  # an ICC profile that is too long for Pillow


def is_png(file: BinaryIO) -> bool:
    """Return True if a file at its beginning is a PNG file; it stays at its beginning."""
    is_match = file.read(len(SIGNATURE)) == SIGNATURE
    file.seek(0)
    return is_match


def reduce_png(file: BinaryIO, max_profile_bytes: int, header_only: bool) -> ReducedPng:
    """Copy a PNG file up to the end of its pixels, without long texts and profiles.

    Args:
        file: The file, at its beginning.
        max_profile_bytes: Largest ICC profile. A larger one is left out.
        header_only: True to stop before the pixels.
    """
    parts, profile, has_pixels = [file.read(len(SIGNATURE))], None, False
    while len(header := file.read(8)) == 8:
        length, chunk_type = struct.unpack(">I4s", header)
        if chunk_type == b"IDAT":
            has_pixels = True
            if header_only:
                parts.append(header)
                break
        elif has_pixels:
            parts.append(END_CHUNK)
            break
        if chunk_type not in PIXEL_TYPES and length > _max_length(chunk_type, max_profile_bytes):
            file.seek(length + 4, io.SEEK_CUR)
            continue
        content = file.read(length + 4)
        if chunk_type == b"iCCP":
            long_profile = _decompress_profile(content[:-4], max_profile_bytes)
            if long_profile is not None:
                profile = long_profile
                continue
        if chunk_type not in TEXT_TYPES or _may_hold_orientation(chunk_type, content[:-4]):
            parts += (header, content)
    return ReducedPng(io.BytesIO(b"".join(parts)), profile or None)


def _max_length(chunk_type: bytes, max_profile_bytes: int) -> int:
    """Return the largest length of a chunk that does not belong to the pixels."""
    return max_profile_bytes if chunk_type == b"iCCP" else MAX_TEXT_CHUNK


def _decompress_profile(content: bytes, max_bytes: int) -> bytes | None:
    """Return a color profile that is too long for Pillow; empty if it exceeds `max_bytes` too."""
    _, _, method_and_data = content.partition(b"\0")
    profile = _decompress(method_and_data[1:], max_bytes)
    if profile is None or len(profile) <= MAX_TEXT_CHUNK:
        return None
    return profile if len(profile) <= max_bytes else b""


def _may_hold_orientation(chunk_type: bytes, content: bytes) -> bool:
    """Return True for a text that Pillow can read and may find an orientation in."""
    keyword, _, rest = content.partition(b"\0")
    if keyword not in ORIENTATION_KEYWORDS:
        return False
    is_compressed = chunk_type == b"zTXt" or (chunk_type == b"iTXt" and rest[:1] != b"\0")
    if not is_compressed:
        return True
    data = rest[1:] if chunk_type == b"zTXt" else rest[2:].split(b"\0", 2)[-1]
    text = _decompress(data, MAX_TEXT_CHUNK)
    return text is not None and len(text) <= MAX_TEXT_CHUNK


def _decompress(data: bytes, max_bytes: int) -> bytes | None:
    """Decompress data to at most one byte more than `max_bytes`; None if it is broken."""
    try:
        return zlib.decompressobj().decompress(data, max_bytes + 1)
    except zlib.error:
        return None
