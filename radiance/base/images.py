"""Convert images between Pillow and arrays, and write PNG files with metadata.

Arrays have the shape [height, width, 3]. They hold 8-bit values or float32 in [-1, 1].
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8
from PIL import Image, PngImagePlugin

from radiance.base.text_files import replace_invalid

Pixels = Float32[np.ndarray, "height width 3"]
Images = Float[np.ndarray, "b height width 3"]  # in [-1, 1]


def resize_and_crop(
    image: Image.Image, width: int, height: int, crop_x: float = 0.5, crop_y: float = 0.5
) -> UInt8[np.ndarray, "height width 3"]:
    """Scale an image to cover `width` × `height`, and crop what exceeds it.

    The proportions remain; the filter is Lanczos.

    Args:
        image: An image of mode RGB.
        width: Width of the result in pixels.
        height: Height of the result in pixels.
        crop_x: Horizontal position of the crop, from 0 (left) to 1 (right).
        crop_y: Vertical position of the crop, from 0 (top) to 1 (bottom).
    """
    scale = max(width / image.width, height / image.height)
    crop_width, crop_height = min(width / scale, image.width), min(height / scale, image.height)
    left, top = (image.width - crop_width) * crop_x, (image.height - crop_height) * crop_y
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS, box=box))


def to_array(image: Image.Image, width: int, height: int) -> Pixels:
    """Return an image as float32 in [-1, 1], scaled and cropped around its center."""
    return to_signed(resize_and_crop(image, width, height))


def to_signed(pixels: UInt8[Any, "*shape"] | Float32[Any, "*shape"]) -> Float32[Any, "*shape"]:
    """Convert 8-bit values to float32 in [-1, 1]; float32 values are returned unchanged.

    Args:
        pixels: A NumPy array, or a JAX array inside a program.
    """
    return pixels.astype(np.float32) / np.float32(127.5) - 1 if pixels.dtype == np.uint8 else pixels


def to_image(pixels: Pixels) -> Image.Image:
    """Return an array as an image, clipped to [-1, 1] and rounded to 8 bits."""
    return Image.fromarray(
        np.clip(np.rint((np.asarray(pixels, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)
    )


def make_contact_sheet(images: Sequence[Image.Image], columns: int, gap: int = 2) -> Image.Image:
    """Arrange images row by row on white.

    Args:
        images: At least one image; all cells have the size of the largest.
        columns: Number of images in a row.
        gap: Pixels between images, and around them.
    """
    width, height = max(image.width for image in images), max(image.height for image in images)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap) + gap), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (gap + i % columns * (width + gap), gap + i // columns * (height + gap)))
    return sheet


def save_png(path: str | Path, image: Image.Image, metadata: Mapping[str, Any]):
    """Write a PNG file with metadata in its text chunks.

    Args:
        path: The file. Missing folders are created.
        image: Any image that PNG supports.
        metadata: Texts are stored as they are, other values as JSON. Bytes of file names that are
            not UTF-8 become U+FFFD.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in metadata.items():
        text = value if isinstance(value, str) else json.dumps(value)
        info.add_itxt(key, replace_invalid(text))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "PNG", pnginfo=info)
